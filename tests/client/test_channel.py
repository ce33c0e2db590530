"""Settings from arguments and environment, and the channel arguments made of them."""
# ruff: noqa: S106 - no password here is one

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lossgrad import channel
from lossgrad.channel import ChannelSettings, is_local


def test_without_arguments_and_environment_the_defaults_hold() -> None:
    settings = ChannelSettings.resolve(environment={})
    assert settings == ChannelSettings(
        target="localhost:50051", timeout=30.0, retries=2, max_message_bytes=256 * 1024 * 1024, tls=False
    )
    assert settings.metadata == ()


def test_every_setting_has_a_variable_and_arguments_win(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text(name.upper())
    environment = {
        "LOSSGRAD_TARGET": "dns:///example:1",
        "LOSSGRAD_TOKEN": "secret",
        "LOSSGRAD_CA": str(tmp_path / "ca"),
        "LOSSGRAD_CERT": str(tmp_path / "cert"),
        "LOSSGRAD_KEY": str(tmp_path / "key"),
        "LOSSGRAD_TIMEOUT": "1.5",
        "LOSSGRAD_RETRIES": "0",
        "LOSSGRAD_MAX_MESSAGE_BYTES": "1000",
    }
    settings = ChannelSettings.resolve(environment=environment)
    assert settings == ChannelSettings(
        target="dns:///example:1",
        token="secret",
        tls=True,
        ca=b"CA",
        cert=b"CERT",
        key=b"KEY",
        timeout=1.5,
        retries=0,
        max_message_bytes=1000,
    )
    given = ChannelSettings.resolve("b:2", token="t", ca=b"x", timeout=2.0, retries=1, environment=environment)
    assert (given.target, given.token, given.ca, given.timeout, given.retries) == ("b:2", "t", b"x", 2.0, 1)


def test_a_token_travels_as_bearer_and_stays_out_of_the_repr() -> None:
    settings = ChannelSettings.resolve("localhost:1", token="secret", environment={})
    assert settings.metadata == (("authorization", "Bearer secret"),)
    assert "secret" not in repr(settings)


@pytest.mark.parametrize(
    ("target", "local"),
    [
        ("localhost:50051", True),
        ("127.0.0.1:50051", True),
        ("127.3.2.1", True),
        ("[::1]:50051", True),
        ("::1", True),
        ("dns:///localhost:50051", True),
        ("dns://1.1.1.1/localhost:50051", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:2", True),
        ("ipv6:[::1]:1", True),
        ("unix:/run/lossgrad.sock", True),
        ("unix-abstract:lossgrad", True),
        ("lossgrad:50051", False),
        ("localhost.example.com:1", False),
        ("10.0.0.1:50051", False),
        ("0.0.0.0:50051", False),
        ("dns:///lossgrad.svc:50051", False),
        ("dns://localhost/lossgrad.svc:50051", False),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", False),
        ("[2001:db8::1]:1", False),
        ("xds:///localhost:1", False),
    ],
)
def test_a_token_goes_over_plaintext_only_to_this_machine(target: str, local: bool) -> None:
    assert is_local(target) is local
    if local:
        ChannelSettings(target=target, token="secret")
    else:
        with pytest.raises(ValueError, match=r"plaintext to .* use TLS"):
            ChannelSettings(target=target, token="secret")
        ChannelSettings(target=target, token="secret", tls=True)


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        ({"timeout": 0}, {}, "timeout is 0 seconds; it must be above 0"),
        ({"timeout": float("nan")}, {}, "timeout is nan"),
        ({"retries": 5}, {}, "retries is 5; it must be 0 to 4"),
        ({"max_message_bytes": 2**31}, {}, "max_message_bytes is 2147483648; it must be 1 to 2147483647"),
        ({"cert": b"x"}, {}, "only one of cert and key"),
        ({"ca": "/nonexistent/ca.pem"}, {}, "ca '/nonexistent/ca.pem' cannot be read: No such file"),
        ({"token": "a b"}, {}, "token is empty or has spaces"),
        ({"token": ""}, {}, "token is empty"),
        ({"token": "a\nb"}, {}, "line breaks"),
        ({}, {"LOSSGRAD_TIMEOUT": "soon"}, "LOSSGRAD_TIMEOUT is 'soon'"),
        ({}, {"LOSSGRAD_TLS": "perhaps"}, "LOSSGRAD_TLS is 'perhaps': must be 0 or 1"),
    ],
)
def test_bad_settings_are_refused_with_the_value_and_the_range(
    arguments: dict[str, Any], environment: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        ChannelSettings.resolve(**arguments, environment=environment)


def test_the_retry_buffer_holds_the_largest_message() -> None:
    # Above grpc.per_rpc_retry_buffer_size, gRPC's retries silently do not happen.
    for limit in (1, 256 * 1024 * 1024, 2**31 - 1):
        options = dict(ChannelSettings(max_message_bytes=limit).options)
        assert options["grpc.max_send_message_length"] == options["grpc.max_receive_message_length"] == limit
        assert limit <= int(options["grpc.per_rpc_retry_buffer_size"]) <= 2**31 - 1


def test_the_service_config_balances_checks_health_and_retries_unary_calls() -> None:
    options = dict(ChannelSettings(retries=2).options)
    config = json.loads(str(options["grpc.service_config"]))
    assert config["loadBalancingConfig"] == [{"round_robin": {}}]
    assert config["healthCheckConfig"] == {"serviceName": "lossgrad_api.v1.LossService"}
    (method,) = config["methodConfig"]
    assert {name["method"] for name in method["name"]} == {"ComputeLoss", "GetServerInfo"}
    assert method["retryPolicy"]["maxAttempts"] == 3
    assert method["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert "methodConfig" not in json.loads(str(dict(ChannelSettings(retries=0).options)["grpc.service_config"]))


def test_a_proxy_is_not_asked_for_this_machine() -> None:
    assert dict(ChannelSettings(target="localhost:1").options)["grpc.enable_http_proxy"] == 0
    assert "grpc.enable_http_proxy" not in dict(ChannelSettings(target="lossgrad:1").options)


@pytest.mark.parametrize(("value", "is_kept"), [("1", True), ("0", False), ("", False)])
def test_the_allocator_is_the_processes_choice_by_its_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, is_kept: bool
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(channel, "keep_large_blocks", lambda: calls.append(True))
    settings = ChannelSettings.resolve("localhost:1", environment={"LOSSGRAD_KEEP_LARGE_BLOCKS": value})
    channel.connect(settings).close()
    assert calls == [True] * is_kept
