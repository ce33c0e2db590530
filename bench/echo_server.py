"""The floor of bench.transport: bytes in, bytes out, on the same kind of server with the same options and allocator.

It looks at nothing but a request's length, and answers with bytes made beforehand, of the size that lossgrad-server's answer
to such a request has. No service in Python on grpcio can be faster.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from bench import transport_messages
from bench.transport_probe import with_probe
from lossgrad_api import codec
from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server.config import ServerConfig
from lossgrad_server.transport.grpc_server import server_options
from lossgrad_server.transport.health import Health

Context = grpc.aio.ServicerContext[bytes, bytes]


class Echo:
    """Answers by a request's length: each known one has an answer; any other gets that of the nearest known one."""

    def __init__(self, tensor_sizes: list[int], packed_counts: list[int], most_packed_bytes: int) -> None:
        self._unary = {len(transport_messages.request(size)): transport_messages.answer(size) for size in tensor_sizes}
        self._stream: dict[int, bytes] = {}
        for size in tensor_sizes:
            for count in packed_counts:
                if count == 1 or size * count <= most_packed_bytes:
                    length = len(transport_messages.stream_request(size, count))
                    self._stream[length] = transport_messages.stream_answer(size, count)
        transport_messages.tensors.cache_clear()

    def service(self) -> grpc.GenericRpcHandler:
        """Return the handlers, under the loss service's names, without serializers."""
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "ComputeLoss": grpc.unary_unary_rpc_method_handler(self._compute_loss),
            "StreamComputeLoss": grpc.stream_stream_rpc_method_handler(self._stream_compute_loss),
            "GetServerInfo": grpc.unary_unary_rpc_method_handler(self._get_server_info),
        }
        return grpc.method_handlers_generic_handler(codec.SERVICE, handlers)

    async def _compute_loss(self, request: bytes, context: Context) -> bytes:
        return _find(self._unary, len(request))

    async def _stream_compute_loss(self, messages: AsyncIterator[bytes], context: Context) -> None:
        async for message in messages:
            await context.write(_find(self._stream, len(message)))

    async def _get_server_info(self, request: bytes, context: Context) -> bytes:
        return bytes(100)


def _find(answers: dict[int, bytes], length: int) -> bytes:
    found = answers.get(length)
    if found is None:
        found = answers[length] = answers[min(answers, key=lambda known: abs(known - length))]
    return found


async def serve(address: str, echo: Echo) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = grpc.aio.server(
        options=server_options(ServerConfig().max_message_bytes, 0.0, ServerConfig().max_connections)
    )
    server.add_generic_rpc_handlers([echo.service()])
    health = Health()  # which the SDK's channels ask for
    health.add_to(server)
    await health.set_ready(True)
    port = server.add_insecure_port(address)
    await server.start()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    print(f"echo-server ready on {address if address.startswith('unix') else f'127.0.0.1:{port}'}", flush=True)
    await stopped.wait()
    await server.stop(None)


def main() -> None:
    """Run the server from the command line; bench.transport does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--address", default="127.0.0.1:0", help="where to listen; unix:/path for a socket")
    parser.add_argument("--tensor-bytes", type=int, nargs="+", required=True, help="the sizes that will be asked for")
    parser.add_argument("--packed", type=int, nargs="+", default=[1], help="how many requests a stream's messages hold")
    parser.add_argument("--most-packed-bytes", type=int, default=4 * 1024 * 1024, help="tensor bytes in one message")
    parser.add_argument("--probe", action="store_true", help="report the event loop's lag on SIGUSR1")
    arguments = parser.parse_args()
    keep_large_blocks()
    serving = serve(arguments.address, Echo(arguments.tensor_bytes, arguments.packed, arguments.most_packed_bytes))
    asyncio.run(with_probe(serving) if arguments.probe else serving)


if __name__ == "__main__":
    main()
