"""Every setting of the server: its default, its range, and the reason for it. Read once, from flags and environment.

A setting is a field of ServerConfig. Its flag is its name with dashes, its environment variable LOSSGRAD_ and its name in
capitals; a flag wins over the environment. The parts of the server get the values that they need, never this object.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lossgrad_server import __version__
from lossgrad_server.logs import FORMATS

MIB: Final = 1 << 20
INT32_MAX: Final = (1 << 31) - 1  # the limits that GetServerInfo tells travel as int32 and int64
INT64_MAX: Final = (1 << 63) - 1
DAY_SECONDS: Final = 86_400
ENVIRONMENT_PREFIX: Final = "LOSSGRAD_"
_PREFIX: Final = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_CHOICES: Final = {
    "engine": ("fused", "plain"),
    "isolation": ("auto", "thread", "process"),
    "log_level": ("debug", "info", "warning", "error"),
    "log_format": FORMATS,
}


class ConfigError(ValueError):
    """A setting that cannot be used. One line that names the setting, its value, and what is allowed."""


def _setting(default: Any, help: str, *, least: float | None = None, most: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Every setting of a server."""

    host: str = _setting(
        "127.0.0.1",
        "Address to serve on. Loopback, so that nothing is reachable from outside unless asked for; 0.0.0.0 or [::] for "
        "every interface; unix:/path or unix-abstract:name for a socket, which needs no port.",
    )
    port: int = _setting(50051, "Port to serve on, gRPC's customary one; 0 picks a free one.", least=0, most=65535)
    metrics_host: str = _setting("127.0.0.1", "Address to serve Prometheus metrics on, loopback like --host.")
    metrics_port: int = _setting(
        8002,
        "Port to serve Prometheus metrics on, over HTTP; where Triton's tools look. 0 picks a free one; -1 serves none.",
        least=-1,
        most=65535,
    )
    device: str = _setting("auto", "Where to compute: cpu, cuda:N, or auto, which takes the first GPU if there is one.")
    engine: str = _setting(
        "fused",
        "What computes: fused, kernels of our own that read every operand once; or plain, torch's own operations, slower, "
        "for where the kernels do not run.",
    )
    threads: int = _setting(
        0,
        "Threads that compute on the CPU; 0 takes every core that this process may use. Results do not depend on it.",
        least=0,
        most=1024,
    )
    processes: int = _setting(
        1,
        "On the CPU: how many processes serve on the port, each with its share of the connections; --threads and what "
        "bounds the whole server are divided among them. One moves what one core can, so that cores beyond two or three "
        "are better used by another. A GPU wants one.",
        least=1,
        most=256,
    )
    isolation: str = _setting(
        "auto",
        "Where the device's worker lives: thread, in the server's process; process, in one of its own, which is replaced "
        "when it dies, hangs or loses its device, while the server stays up; auto, which is process for a GPU and thread "
        "for the CPU, where a copy more costs more than there is to gain.",
    )
    worker_timeout_seconds: float = _setting(
        30.0,
        "With --isolation process: how long a batch may take before its process is taken for hung and is replaced; as much "
        "again for each 256 MiB of it. A batch takes milliseconds.",
        least=0.1,
        most=DAY_SECONDS,
    )
    max_message_bytes: int = _setting(
        256 * MIB,
        "Largest message taken or sent. gRPC's own 4 MiB is too small for tensors; its hard wall is 2 GiB.",
        least=64 * 1024,
        most=2047 * MIB,
    )
    max_queued_requests: int = _setting(
        2048,
        "Most requests waiting or running at a time; beyond it callers are told to come back. Above the most that one "
        "stream may have inside, so that one stream alone is never refused.",
        least=1,
        most=INT32_MAX,
    )
    max_queued_bytes: int = _setting(
        1024 * MIB,
        "Most bytes of tensors waiting or running at a time, answers included: the server's memory is bounded by about "
        "this. A request is always taken when nothing else is inside.",
        least=1,
        most=INT64_MAX,
    )
    max_stream_requests: int = _setting(
        1024,
        "Most requests in one message of a stream, and most unanswered requests of one stream before it is not read "
        "from; 64 in a message already give nearly all that packing gives.",
        least=1,
        most=INT32_MAX,
    )
    max_groups: int = _setting(
        4096,
        "Most groups of one accumulation; each takes about a kilobyte for each of its losses while the stream is open, and "
        "as little in every snapshot.",
        least=1,
        most=INT32_MAX,
    )
    max_batch_requests: int = _setting(256, "Most requests in a batch; bounds how long a batch's first waits.", least=1)
    max_batch_elements: int = _setting(
        16 * MIB, "Most elements in a batch; larger batches gain nothing and add latency.", least=1
    )
    max_batch_bytes: int = _setting(
        256 * MIB, "Most bytes in a batch, answers included; bounds the memory on the device.", least=1
    )
    allow_shared_memory: bool = _setting(
        False,
        "Share memory with callers on this machine, so that tensors need not travel: for the SDK's shared_memory=True and "
        "for Open Inference's system regions. Off, because it lets callers name and fill memory that the server reads; a "
        "proxy on this machine makes its callers look local.",
    )
    shared_memory_prefixes: str = _setting(
        "lossgrad",
        "What the names of Open Inference's system regions must begin with, after the leading slash; several with commas. "
        "Short ones let callers name memory of other programs of theirs. The SDK's memory has no names.",
    )
    allow_cuda_shared_memory: bool = _setting(
        False,
        "With --allow-shared-memory: take CUDA IPC handles too, for Open Inference's CUDA regions, from callers that run as "
        "the server's own user. Off, because of what a handle's memory may do (docs/shared-memory.md); never run on a GPU.",
    )
    max_shared_memory_bytes: int = _setting(
        4096 * MIB,
        "Most bytes of shared memory at a time. The SDK's callers that find no room send their tensors in messages.",
        least=1,
        most=INT64_MAX,
    )
    open_inference: bool = _setting(
        True,
        "Serve the Open Inference Protocol too, on the same port and from the same batches, for Triton's clients and tools.",
    )
    triton_metrics: bool = _setting(
        False,
        "Serve Triton's nv_inference_* metrics beside our own, for dashboards that were made for it: of requests of the "
        "Open Inference Protocol.",
    )
    tls_cert: str = _setting(
        "",
        "PEM file of the server's certificate with its chain; with --tls-key this turns TLS on. Read again when it changes.",
    )
    tls_key: str = _setting("", "PEM file of the certificate's private key, without a password.")
    tls_client_ca: str = _setting(
        "",
        "PEM file of authorities: callers must then show a certificate of one of them (mutual TLS).",
    )
    token_file: str = _setting(
        "",
        "File of bearer tokens, one to a line: callers must then send one of them. Read again when it changes. Health "
        "checks need none.",
    )
    insecure: bool = _setting(
        False,
        "Serve without TLS on an address that others can reach. Without it that is refused, because tensors and tokens "
        "would travel in plaintext.",
    )
    reflection: bool = _setting(
        False, "Serve gRPC reflection, for tools such as grpcurl. Off, because it is of no use to clients."
    )
    max_connections: int = _setting(
        4096,
        "Most connections at a time; those beyond are closed at once. Each costs a descriptor and some memory. A client "
        "needs one.",
        least=1,
        most=INT32_MAX,
    )
    transfer_timeout_seconds: float = _setting(
        60.0,
        "Most time that a call's message may take to come in, or a stream's to go out; a peer that takes longer is cut off, "
        "so that one that stalls holds no memory. 256 MiB in a minute are 36 Mbit/s.",
        least=1,
        most=DAY_SECONDS,
    )
    max_connection_age_seconds: float = _setting(
        0.0,
        "Ask clients to reconnect after about this long, so that new replicas get load; 0 never does. Set 300 behind a "
        "client-side balancer.",
        least=0,
        most=DAY_SECONDS,
    )
    drain_delay_seconds: float = _setting(
        0.5,
        "After SIGTERM, keep serving this long while health says NOT_SERVING, so that clients and balancers go elsewhere "
        "first. With 0, a call that comes in the moment of closing can be cut off; Kubernetes wants 5.",
        least=0,
        most=DAY_SECONDS,
    )
    drain_grace_seconds: float = _setting(
        30.0,
        "After that, let calls in flight finish for at most this long; most take milliseconds.",
        least=0,
        most=DAY_SECONDS,
    )
    tracing: bool = _setting(
        False,
        "Make OpenTelemetry spans of requests, under their callers' traces, and exemplars in the metrics. Where they go is "
        "set by the standard OTEL_* variables. Needs the extra otel.",
    )
    log_level: str = _setting("info", "Least severe log line to write: debug, info, warning or error.")
    log_format: str = _setting(
        "auto", "How log lines look: text, json, or auto, which is text on a terminal and json elsewhere."
    )

    def __post_init__(self) -> None:
        """Check every value. Raises ConfigError."""
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            least, most = setting.metadata["least"], setting.metadata["most"]
            if (least is not None and not value >= least) or (most is not None and not value <= most):
                allowed = f"at least {least}" if most is None else f"{least} to {most}"
                raise ConfigError(f"{flag(setting.name)} is {value}; it must be {allowed}")
        if self.triton_metrics and not self.open_inference:
            raise ConfigError(
                "--triton-metrics counts Open Inference requests, and --open-inference is false; choose one"
            )
        for name, words in _CHOICES.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{flag(name)} is {getattr(self, name)!r}; it must be {_either(words)}")
        if not all(_PREFIX.fullmatch(prefix) for prefix in self.region_prefixes):
            raise ConfigError(
                f"--shared-memory-prefixes is {self.shared_memory_prefixes!r}; it must be names of letters, digits, '.', "
                "'_' and '-', with commas between them"
            )

    @property
    def address(self) -> str:
        """The address to listen on, as gRPC takes it."""
        return self.host if self.is_socket else f"{self.host}:{self.port}"

    @property
    def region_prefixes(self) -> tuple[str, ...]:
        """What the names of system regions must begin with, one of them."""
        return tuple(prefix.strip() for prefix in self.shared_memory_prefixes.split(","))

    @property
    def is_socket(self) -> bool:
        """Whether it listens on a unix socket, which has no port."""
        return self.host.startswith(("unix:", "unix-abstract:"))


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def flag(name: str) -> str:
    """Return the flag of a setting."""
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    """Return the environment variable of a setting."""
    return ENVIRONMENT_PREFIX + name.upper()


def from_command_line(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """Return the config that flags and environment give. Raises ConfigError; --help and bad flags end the program."""
    parser = argument_parser()
    given = vars(parser.parse_args(arguments))
    values: dict[str, Any] = {}
    for setting in dataclasses.fields(ServerConfig):
        if given[setting.name] is not None:
            source, text = flag(setting.name), given[setting.name]
        elif environment_variable(setting.name) in environment:
            source = environment_variable(setting.name)
            text = environment[source]
        else:
            continue
        values[setting.name] = _parse(source, text, type(setting.default))
    return ServerConfig(**values)


def argument_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; its help argues for every default."""
    parser = argparse.ArgumentParser(
        prog="lossgrad-server",
        description="Serve SmoothL1, Huber, L1 and MSE losses, and their gradients, over gRPC.",
        epilog="Every setting can also be given as an environment variable, shown in brackets; a flag wins.",
    )
    parser.add_argument("--version", action="version", version=f"lossgrad-server {__version__}")
    for setting in dataclasses.fields(ServerConfig):
        is_switch = isinstance(setting.default, bool)
        help_text = (
            f"{setting.metadata['help']} Default: {str(setting.default).lower() if is_switch else setting.default}."
        )
        parser.add_argument(
            flag(setting.name),
            dest=setting.name,
            metavar=type(setting.default).__name__.upper(),
            # A switch may stand alone.
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
            help=f"{help_text} [{environment_variable(setting.name)}]".replace("%", "%%"),
        )
    return parser


def _parse(source: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() in ("1", "true", "yes", "on"):
            return True
        if text.lower() in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{source} is {text!r}; it must be true or false")
    try:
        return kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[kind]
        raise ConfigError(f"{source} is {text!r}; it must be {name}") from None
