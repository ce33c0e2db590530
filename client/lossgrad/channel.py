"""How a client reaches its server: settings from arguments and environment, and the gRPC channel made of them."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import grpc
import grpc.aio

from lossgrad.throttle import MAX_TOKENS, TOKEN_RATIO
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_api.codec import SERVICE

if TYPE_CHECKING:
    from lossgrad.metrics import ClientMetrics, CollectorRegistry, MethodMetrics

DEFAULT_TARGET: Final = "localhost:50051"
DEFAULT_TIMEOUT_SECONDS: Final = 30.0
DEFAULT_RETRIES: Final = 2
DEFAULT_MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024

_MAX_INT32: Final = 2**31 - 1
_MAX_GRPC_ATTEMPTS: Final = 5  # gRPC's own cap
# A message is its tensors and a header of at most 64 KiB; retries buffer the whole call, framing included.
_RETRY_BUFFER_SLACK: Final = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class ChannelSettings:
    """All that a client is told about its connection. `resolve` fills in what the caller leaves out."""

    target: str = DEFAULT_TARGET
    token: str | None = field(default=None, repr=False)
    tls: bool = False
    ca: bytes | None = field(default=None, repr=False)
    cert: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    timeout: float = DEFAULT_TIMEOUT_SECONDS
    retries: int = DEFAULT_RETRIES
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES
    bulk: bool = False  # whether its requests go after those of others
    keep_large_blocks: bool = (
        False  # whether connecting tells the C library to keep large blocks, for the whole process
    )
    coalesce: bool = True  # whether a client's small calls share a stream
    shared_memory: bool = False  # whether tensors stay in shared memory where the server is on this machine
    metrics: ClientMetrics | None = field(default=None, repr=False)  # what counts, where the caller wants that

    def __post_init__(self) -> None:
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout!r} seconds; it must be above 0 (math.inf: no limit)")
        if not 0 <= self.retries < _MAX_GRPC_ATTEMPTS:
            raise ValueError(f"retries is {self.retries}; it must be 0 to {_MAX_GRPC_ATTEMPTS - 1}")
        if not 0 < self.max_message_bytes <= _MAX_INT32:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; it must be 1 to {_MAX_INT32}")
        if (self.cert is None) != (self.key is None):
            raise ValueError("only one of cert and key is given; a client certificate needs both")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise ValueError("token is empty or has spaces, line breaks or non-ASCII letters; send the bare token")
        if self.token is not None and not self.tls and not is_local(self.target):
            raise ValueError(
                f"a token would travel in plaintext to {self.target!r}; use TLS (ca=..., or tls=True for the system's "
                "authorities), or a target on this machine"
            )

    @classmethod
    def resolve(
        cls,
        target: str | None = None,
        *,
        token: str | None = None,
        tls: bool | None = None,
        ca: str | Path | bytes | None = None,
        cert: str | Path | bytes | None = None,
        key: str | Path | bytes | None = None,
        timeout: float | None = None,
        retries: int | None = None,
        max_message_bytes: int | None = None,
        coalesce: bool | None = None,
        shared_memory: bool | None = None,
        bulk: bool | None = None,
        metrics: CollectorRegistry | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ChannelSettings:
        """Return the settings: each argument, or else its LOSSGRAD_ variable, or else the default.

        `ca`, `cert` and `key` are paths of PEM files, or their contents as bytes. Any of them turns TLS on, unless `tls`
        is False.
        """
        environ = os.environ if environment is None else environment

        def setting(name: str, given: Any, convert: Any, default: Any) -> Any:
            if given is not None:
                return given
            text = environ.get(f"LOSSGRAD_{name}", "")
            if not text:
                return default
            try:
                return convert(text)
            except ValueError as error:
                raise ValueError(f"LOSSGRAD_{name} is {text!r}: {error}") from None

        authority, certificate, private_key = (
            _pem(setting(name, given, str, None), name.lower())
            for name, given in (("CA", ca), ("CERT", cert), ("KEY", key))
        )
        return cls(
            target=setting("TARGET", target, str, DEFAULT_TARGET),
            token=setting("TOKEN", token, str, None),
            tls=setting("TLS", tls, _boolean, authority is not None or certificate is not None),
            ca=authority,
            cert=certificate,
            key=private_key,
            timeout=setting("TIMEOUT", timeout, float, DEFAULT_TIMEOUT_SECONDS),
            retries=setting("RETRIES", retries, int, DEFAULT_RETRIES),
            max_message_bytes=setting("MAX_MESSAGE_BYTES", max_message_bytes, int, DEFAULT_MAX_MESSAGE_BYTES),
            # No argument: it is the process's, and no client's.
            keep_large_blocks=setting("KEEP_LARGE_BLOCKS", None, _boolean, False),
            coalesce=setting("COALESCE", coalesce, _boolean, True),
            shared_memory=setting("SHARED_MEMORY", shared_memory, _boolean, False),
            bulk=setting("BULK", bulk, _boolean, False),
            metrics=None if metrics is None else _metrics_of(metrics),
        )

    @classmethod
    def of_given_channel(cls, target: str, **settings: Any) -> ChannelSettings:
        """Return the settings of a client over a channel of the caller's own, which has its own target and security."""
        calls = ("LOSSGRAD_TIMEOUT", "LOSSGRAD_RETRIES", "LOSSGRAD_MAX_MESSAGE_BYTES")
        environment = {name: os.environ[name] for name in calls if name in os.environ}
        return cls.resolve(target, environment=environment, **settings)

    def metrics_of(self, method: str) -> MethodMetrics | None:
        """Return what counts the requests of a method; None where nothing does."""
        return None if self.metrics is None else self.metrics.method(method)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        return self.metadata_for(bulk=self.bulk)

    def metadata_for(self, *, bulk: bool) -> tuple[tuple[str, str], ...]:
        """Return what a call carries that lets others go first, or that does not."""
        token = () if self.token is None else (("authorization", f"Bearer {self.token}"),)
        return (*token, ("lossgrad-priority", "bulk")) if bulk else token

    @property
    def options(self) -> list[tuple[str, int | str]]:
        """The channel arguments."""
        options: list[tuple[str, int | str]] = [
            # gRPC's own default of 4 MiB is one small batch. The server has the same limit.
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            # A call beyond this (256 KiB by default) is silently never retried.
            ("grpc.per_rpc_retry_buffer_size", min(self.max_message_bytes + _RETRY_BUFFER_SLACK, _MAX_INT32)),
            # Finds a dead peer behind a load balancer in 25 s instead of a quarter of an hour of TCP's patience.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            # Fewer, larger frames: a quarter less CPU at 1 MiB, measured; nothing elsewhere.
            ("grpc.http2.max_frame_size", 16_777_215),
            # Bounds an attempt to connect, which gRPC lets take 20 s.
            ("grpc.min_reconnect_backoff_ms", 5_000),
            # A failed connection is tried again after this; gRPC's 1 s would outlast the retries of a call, and its 2 min
            # the restart of a server.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # New pods have new addresses; gRPC asks for them at most every 30 s.
            ("grpc.dns_min_time_between_resolutions_ms", 5_000),
            # Channels of one process share sockets by target. After a fork the child's would share the parent's.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.service_config", json.dumps(self.service_config)),
        ]
        if is_local(self.target):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy would look for this machine's address on its own
        return options

    @property
    def service_config(self) -> dict[str, Any]:
        """Balancing, health checks and retries, as gRPC reads them."""
        config: dict[str, Any] = {
            # pick_first, the default, sends everything to one pod for ever, and takes no part in health checking.
            "loadBalancingConfig": [{"round_robin": {}}],
            "healthCheckConfig": {"serviceName": SERVICE},
        }
        if self.retries:
            # Where most calls fail, trying them again keeps the server from recovering. throttle.py does it for streams.
            config["retryThrottling"] = {"maxTokens": MAX_TOKENS, "tokenRatio": TOKEN_RATIO}
            config["methodConfig"] = [
                {
                    # Not the streams: an open one cannot be retried by gRPC, so the SDK does it (window.py).
                    "name": [{"service": SERVICE, "method": method} for method in ("ComputeLoss", "GetServerInfo")],
                    "retryPolicy": {
                        "maxAttempts": 1 + self.retries,
                        "initialBackoff": "0.1s",  # gRPC adds the jitter, and obeys grpc-retry-pushback-ms
                        "maxBackoff": "2s",
                        "backoffMultiplier": 3,
                        # CANCELLED too: gRPC's servers give it to calls that nobody cancelled when a peer floods them with
                        # resets. What this side cancels, gRPC does not retry.
                        "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
                    },
                }
            ]
        return config


class Channel(Protocol):
    """What a client needs of a channel: grpc.Channel has it, and so has the in-process one of `embedded()`."""

    def unary_unary(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        """Return a callable (request, timeout, metadata) -> response."""

    def stream_stream(self, method: str, request_serializer: Any = None, response_deserializer: Any = None) -> Any:
        """Return a callable (request_iterator, timeout, metadata) -> response iterator."""

    def close(self) -> None:
        """End everything under way."""


def connect(settings: ChannelSettings) -> grpc.Channel:
    """Return a channel. It connects at its first call."""
    _set_allocator(settings)
    if settings.tls:
        return grpc.secure_channel(settings.target, _credentials(settings), options=settings.options)
    return grpc.insecure_channel(settings.target, options=settings.options)


def connect_aio(settings: ChannelSettings) -> grpc.aio.Channel:
    """Return a channel of the running event loop. It connects at its first call."""
    _set_allocator(settings)
    if settings.tls:
        return grpc.aio.secure_channel(settings.target, _credentials(settings), options=settings.options)
    return grpc.aio.insecure_channel(settings.target, options=settings.options)


def _set_allocator(settings: ChannelSettings) -> None:
    if settings.keep_large_blocks:
        keep_large_blocks()


def is_local(target: str) -> bool:
    """Whether every address of a gRPC target is on this machine: loopback or a unix socket."""
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    scheme, separator, rest = target.partition(":")
    if separator and scheme in ("dns", "ipv4", "ipv6"):
        target = re.sub(r"^//[^/]*/", "", rest)
    return all(_is_loopback(_host(address)) for address in target.split(","))


def _host(address: str) -> str:
    if address.startswith("["):
        return address[1:].partition("]")[0]
    return address if address.count(":") > 1 else address.partition(":")[0]


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _credentials(settings: ChannelSettings) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(settings.ca, settings.key, settings.cert)


def _pem(value: str | Path | bytes | None, name: str) -> bytes | None:
    if value is None or isinstance(value, bytes):
        return value
    try:
        return Path(value).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {str(value)!r} cannot be read: {error.strerror or error}") from error


def _metrics_of(registry: CollectorRegistry) -> ClientMetrics:
    from lossgrad.metrics import ClientMetrics

    return ClientMetrics.of(registry)


def _boolean(text: str) -> bool:
    values: Sequence[Sequence[str]] = (("0", "false", "no", "off"), ("1", "true", "yes", "on"))
    for result, words in enumerate(values):
        if text.lower() in words:
            return bool(result)
    raise ValueError("must be 0 or 1")
