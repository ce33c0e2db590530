"""Settings: each has a flag, an environment variable, a default and a range, and a bad one is told in one line."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from typing import Any

import pytest

from lossgrad_server.config import ConfigError, ServerConfig, argument_parser, from_command_line

SETTINGS = dataclasses.fields(ServerConfig)
# For each kind of setting, a text that is not its default, and its value.
OTHER = {int: ("70000", 70000), float: ("1.5", 1.5), str: ("cpu", "cpu"), bool: ("true", True)}
SPECIAL: dict[str, tuple[str, Any]] = {
    "port": ("0", 0),
    "metrics_port": ("-1", -1),
    "threads": ("3", 3),
    "processes": ("2", 2),
    "engine": ("plain", "plain"),
    "log_level": ("debug", "debug"),
    "log_format": ("json", "json"),
    "open_inference": ("false", False),
    "isolation": ("process", "process"),
}


def other(setting: dataclasses.Field[Any]) -> tuple[str, Any]:
    return SPECIAL.get(setting.name, OTHER[type(setting.default)])


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    return "LOSSGRAD_" + name.upper()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_every_setting_can_be_given_as_a_flag_and_in_the_environment_and_the_flag_wins(
    setting: dataclasses.Field[Any],
) -> None:
    text, value = other(setting)
    assert value != setting.default
    default = str(setting.default)
    by_flag = from_command_line([f"{flag(setting.name)}={text}"], {})
    by_variable = from_command_line([], {variable(setting.name): text})
    by_both = from_command_line([f"{flag(setting.name)}={default}"], {variable(setting.name): text})
    assert by_flag == by_variable == dataclasses.replace(ServerConfig(), **{setting.name: value})
    assert by_both == ServerConfig()


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_the_help_shows_every_setting_with_its_default_and_its_variable(setting: dataclasses.Field[Any]) -> None:
    # One paragraph for each flag, its words wrapped.
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n  (?=-)", argument_parser().format_help())]
    (paragraph,) = (part for part in paragraphs if re.match(rf"{flag(setting.name)}\b(?!-)", part))
    default = str(setting.default).lower() if isinstance(setting.default, bool) else setting.default
    assert f"Default: {default}. [{variable(setting.name)}]" in paragraph


def test_nothing_given_means_the_defaults() -> None:
    assert from_command_line([], {}) == ServerConfig()
    assert from_command_line([], {"LOSSGRAD_TARGET": "the client's", "OTHER": "1"}) == ServerConfig()


@pytest.mark.parametrize(
    ("text", "value"), [("1", True), ("YES", True), ("on", True), ("0", False), ("False", False), ("off", False)]
)
def test_a_switch_takes_the_usual_words(text: str, value: bool) -> None:
    assert from_command_line([], {"LOSSGRAD_REFLECTION": text}).reflection is value
    assert from_command_line(["--reflection", text], {}).reflection is value
    assert from_command_line(["--reflection"], {}).reflection is True


BAD = [
    (["--port", "x"], {}, "--port is 'x'; it must be a whole number"),
    (["--port", "65536"], {}, "--port is 65536; it must be 0 to 65535"),
    (["--port", "-1"], {}, "--port is -1; it must be 0 to 65535"),
    (["--metrics-port", "-2"], {}, "--metrics-port is -2; it must be -1 to 65535"),
    (["--threads", "1.5"], {}, "--threads is '1.5'; it must be a whole number"),
    (["--processes", "0"], {}, "--processes is 0; it must be 1 to 256"),
    (["--max-message-bytes", "1024"], {}, "--max-message-bytes is 1024; it must be 65536 to 2146435072"),
    (["--max-message-bytes", "4294967296"], {}, "--max-message-bytes is 4294967296; it must be 65536 to 2146435072"),
    (["--max-batch-requests", "0"], {}, "--max-batch-requests is 0; it must be at least 1"),
    # GetServerInfo tells these as int32 and int64.
    (["--max-queued-requests", "2147483648"], {}, "--max-queued-requests is 2147483648; it must be 1 to 2147483647"),
    (["--max-stream-requests", "2147483648"], {}, "--max-stream-requests is 2147483648; it must be 1 to 2147483647"),
    (["--max-queued-bytes", str(1 << 63)], {}, f"--max-queued-bytes is {1 << 63}; it must be 1 to {(1 << 63) - 1}"),
    (["--drain-grace-seconds", "nan"], {}, "--drain-grace-seconds is nan; it must be 0 to 86400"),
    (["--drain-delay-seconds", "inf"], {}, "--drain-delay-seconds is inf; it must be 0 to 86400"),
    (["--max-connection-age-seconds", "inf"], {}, "--max-connection-age-seconds is inf; it must be 0 to 86400"),
    (["--drain-delay-seconds", "soon"], {}, "--drain-delay-seconds is 'soon'; it must be a number"),
    (["--engine", "fast"], {}, "--engine is 'fast'; it must be fused or plain"),
    (["--log-level", "loud"], {}, "--log-level is 'loud'; it must be debug, info, warning or error"),
    (["--reflection", "maybe"], {}, "--reflection is 'maybe'; it must be true or false"),
    ([], {"LOSSGRAD_PORT": "x"}, "LOSSGRAD_PORT is 'x'; it must be a whole number"),
    ([], {"LOSSGRAD_REFLECTION": ""}, "LOSSGRAD_REFLECTION is ''; it must be true or false"),
]


@pytest.mark.parametrize(("arguments", "environment", "line"), BAD, ids=[line for _, _, line in BAD])
def test_a_bad_setting_is_told_with_its_value_and_what_is_allowed(
    arguments: list[str], environment: dict[str, str], line: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        from_command_line(arguments, environment)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("host", "address", "is_socket"),
    [
        ("127.0.0.1", "127.0.0.1:7", False),
        ("[::]", "[::]:7", False),
        ("unix:/run/lossgrad.sock", "unix:/run/lossgrad.sock", True),
        ("unix-abstract:lossgrad", "unix-abstract:lossgrad", True),
        ("unixbox", "unixbox:7", False),
    ],
)
def test_an_address_is_a_host_with_its_port_or_a_socket(host: str, address: str, is_socket: bool) -> None:
    config = ServerConfig(host=host, port=7)
    assert (config.address, config.is_socket) == (address, is_socket)


def test_one_stream_alone_is_never_refused_by_the_default_limits() -> None:
    """A stream is read from while it has fewer inside than its limit, and a message may bring as many again."""
    config = ServerConfig()
    assert config.max_queued_requests >= 2 * config.max_stream_requests - 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--port", "x"], "lossgrad-server: --port is 'x'; it must be a whole number"),
        (["--log-level", "loud"], "lossgrad-server: --log-level is 'loud'; it must be debug, info, warning or error"),
    ],
)
def test_the_program_ends_with_2_and_one_line_and_does_not_wait_for_torch(arguments: list[str], line: str) -> None:
    program = (
        "import sys; from lossgrad_server.__main__ import main; code = main(); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stdout, result.stderr) == (2, "", line + "\n")
