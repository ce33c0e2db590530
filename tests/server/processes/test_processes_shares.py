"""What each of several processes gets of the settings, and what is refused because it cannot be divided."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.engine import torch_build
from lossgrad_server.processes import shares


def config(**settings: Any) -> ServerConfig:
    return ServerConfig(**{"device": "cpu", "processes": 4, **settings})


def test_what_bounds_the_whole_server_is_divided_and_nothing_else_changes() -> None:
    whole = config(
        threads=8, max_queued_requests=40_000, max_queued_bytes=1001, max_connections=10, metrics_port=8002, host="::1"
    )
    share = shares.share_of(whole, 4711)
    assert share == dataclasses.replace(
        whole,
        processes=1,
        port=4711,
        metrics_port=-1,
        isolation="thread",
        threads=2,
        max_queued_requests=10_000,
        max_queued_bytes=251,  # rounded up
        max_connections=3,
    )


def test_nobody_gets_nothing() -> None:
    share = shares.share_of(config(threads=3, max_queued_bytes=1, max_connections=1), 1)
    assert (share.threads, share.max_queued_bytes, share.max_connections) == (1, 1, 1)


@pytest.mark.parametrize(
    ("requests", "stream", "expected"), [(2048, 1024, 1024), (512, 1024, 512), (8192, 1024, 2048), (100, 10, 25)]
)
def test_one_stream_alone_is_never_refused_by_a_share_of_the_queue(requests: int, stream: int, expected: int) -> None:
    share = shares.share_of(config(max_queued_requests=requests, max_stream_requests=stream), 1)
    assert share.max_queued_requests == expected


def test_without_a_number_of_threads_the_cores_that_may_be_used_are_divided() -> None:
    with mock.patch("os.sched_getaffinity", return_value=set(range(16))):
        assert shares.share_of(config(), 1).threads == 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"host": "unix:/run/x.sock"}, ("--host is unix:/run/x.sock", "only one process can listen")),
        ({"host": "unix-abstract:x"}, ("--host is unix-abstract:x", "--processes at 1")),
        ({"isolation": "process"}, ("--isolation is 'process'", "choose --isolation thread")),
        ({"device": "cuda:1"}, ("--device is 'cuda:1', which is a GPU", "--device cpu")),
        ({"allow_shared_memory": True}, ("--allow-shared-memory", "another's")),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_reason_and_the_way_out(
    settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError) as caught:
        shares.check(config(**settings))
    message = str(caught.value)
    assert message.startswith("--processes is 4 and ")
    assert "\n" not in message
    for each in words:
        assert each in message


@pytest.mark.parametrize("is_for_cuda", [False, True])
def test_auto_is_the_cpu_only_where_torch_knows_no_gpu(is_for_cuda: bool) -> None:
    with mock.patch.object(torch_build, "is_for_cuda", return_value=is_for_cuda):
        if not is_for_cuda:
            shares.check(config(device="auto"))
            return
        with pytest.raises(ConfigError, match="'auto', which may be a GPU"):
            shares.check(config(device="auto"))
