"""`embedded()`: a lossgrad server inside this process. The only place where the client imports the server, lazily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lossgrad.client import LossClient


@contextmanager
def embedded(*, timeout: float | None = None, **server_settings: Any) -> Iterator[LossClient]:
    """Run a server in this process and give a client of it: same engine, same answers bit for bit, no network.

    `server_settings` are those of lossgrad_server.config.ServerConfig, such as device="cpu". Needs lossgrad[server].
    """
    from lossgrad.client import LossClient

    try:
        from lossgrad_server.embedded import EmbeddedServer

        server = EmbeddedServer(**server_settings)
        server.start()
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"lossgrad.embedded() needs the server ({error.name} is not installed): pip install 'lossgrad[server]'",
            name=error.name,
        ) from error
    try:
        with LossClient.from_channel(
            server.channel(),
            target="the embedded server",
            timeout=timeout,
            max_message_bytes=server_settings.get("max_message_bytes"),
        ) as client:
            yield client
    finally:
        server.stop()
