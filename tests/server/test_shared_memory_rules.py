"""What a name, a size and a place in shared memory may be."""

from __future__ import annotations

import pytest

from lossgrad_server.config import ConfigError, ServerConfig
from lossgrad_server.errors import Code, InvalidRequest, Reason, RequestError, TooLarge
from lossgrad_server.shared_memory.rules import (
    MAX_PART_BYTES,
    Budget,
    canonical_key,
    check_name,
    check_part,
    shown,
)

PREFIXES = ("lossgrad", "input_")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("/lossgrad", "lossgrad"),
        ("lossgrad", "lossgrad"),
        ("/lossgrad_a.b-c_1", "lossgrad_a.b-c_1"),
        ("/input_simple", "input_simple"),
        ("/lossgrad" + "x" * 247, "lossgrad" + "x" * 247),
    ],
)
def test_a_key_with_one_leading_slash_or_none_is_a_name(key: str, name: str) -> None:
    assert canonical_key(key, PREFIXES) == name


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "//lossgrad",
        "///lossgrad",
        "/./lossgrad",
        "/lossgrad/../other",
        "/lossgrad/a",
        "/lossgrad/",
        "/../dev/shm/lossgrad",
        "..",
        "/..",
        ".",
        "/lossgrad\0",
        "/lossgrad\0/../x",
        "/lossgrad\n",
        "/lossgrad ",
        " /lossgrad",
        "/lossgräd",
        "/lossgrad\u2215x",
        "/ｌossgrad",
        "\\lossgrad",
        "/lossgrad%2f..",
        "/lossgrad" + "x" * 248,
    ],
)
def test_no_trick_of_paths_is_a_name(key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        canonical_key(key, PREFIXES)
    assert caught.value.reason == Reason.BAD_REGION
    assert caught.value.field == "key"


@pytest.mark.parametrize(
    "key", ["/other", "/LOSSGRAD", "/xlossgrad", "/triton_python_backend_shm_region_1", "/sem.lossgrad"]
)
def test_a_key_needs_one_of_the_prefixes(key: str) -> None:
    with pytest.raises(InvalidRequest, match="begin with '/lossgrad' or '/input_'"):
        canonical_key(key, PREFIXES)


@pytest.mark.parametrize(("name", "is_good"), [("", False), ("x", True), ("x" * 256, True), ("é" * 129, False)])
def test_a_region_is_called_what_its_caller_likes_within_bounds(name: str, is_good: bool) -> None:
    if is_good:
        check_name(name)
    else:
        with pytest.raises(InvalidRequest):
            check_name(name)


@pytest.mark.parametrize(("offset", "count"), [(0, 0), (0, 100), (100, 0), (40, 60)])
def test_a_part_may_be_anywhere_in_its_region(offset: int, count: int) -> None:
    check_part("input", offset, count, 100)


@pytest.mark.parametrize(
    ("offset", "count"),
    [
        (0, 101),
        (101, 0),
        (41, 60),
        (-1, 1),
        (0, -1),
        (2**64 - 1, 1),
        (2**64 - 50, 100),
        (2**63, 2**63),
        (1, 2**64 - 1),
    ],
)
def test_a_part_outside_its_region_is_refused_whatever_would_overflow(offset: int, count: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_part("input", offset, count, 100)
    assert caught.value.reason == Reason.BAD_REGION
    assert str(count) in caught.value.message
    assert "100 bytes" in caught.value.message


def test_a_part_is_never_more_than_one_system_call_copies() -> None:
    check_part("input", 0, MAX_PART_BYTES, 1 << 40)
    with pytest.raises(InvalidRequest):
        check_part("input", 0, MAX_PART_BYTES + 1, 1 << 40)


def test_what_is_shown_of_a_name_is_short_and_printable() -> None:
    assert shown("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert len(shown("x" * 10_000)) < 80


def test_a_budget_bounds_regions_and_bytes() -> None:
    budget = Budget(2, 100)
    budget.take(60)
    with pytest.raises(TooLarge, match="has 41 bytes, 60 of the server's 100") as caught:
        budget.take(41)
    assert caught.value.reason == Reason.REGIONS_FULL
    budget.take(40)
    with pytest.raises(TooLarge, match="2 regions, its limit is 2"):
        budget.take(0)
    budget.give_back(60)
    budget.take(1)
    assert (budget.regions, budget.bytes) == (2, 41)


@pytest.mark.parametrize("prefixes", ["", ",", "a,", "a,,b", "/lossgrad", "a b", "../x", "a\0"])
def test_prefixes_that_would_let_everything_through_are_refused(prefixes: str) -> None:
    with pytest.raises(ConfigError, match="--shared-memory-prefixes"):
        ServerConfig(shared_memory_prefixes=prefixes)


def test_prefixes_are_given_with_commas() -> None:
    assert ServerConfig().region_prefixes == ("lossgrad",)
    assert ServerConfig(shared_memory_prefixes="lossgrad, input_").region_prefixes == ("lossgrad", "input_")


def test_the_errors_are_those_of_the_protocol() -> None:
    with pytest.raises(RequestError) as caught:
        Budget(0, 0).take(1)
    assert caught.value.code == Code.RESOURCE_EXHAUSTED
