"""Speaks with the handover socket, as a caller in any language would: the server's tests see nothing of our SDK."""

from __future__ import annotations

import mmap
import os
import socket
import struct
from types import TracebackType
from typing import Final

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from lossgrad_api.v1.loss_service_pb2_grpc import LossServiceStub
from tests.server.serving import PATIENCE_SECONDS

RECORD: Final = struct.Struct("<4sI16sQ")  # docs/shared-memory.md
NOBODY: Final = bytes(16)
REGION, RELEASE = 1, 2
GRANTED, MALFORMED, NO_ROOM = 0, 1, 2


class Region:
    """A region that the server handed out."""

    def __init__(self, token: bytes, descriptor: int, byte_count: int) -> None:
        self.token = token
        self.byte_count = byte_count
        self.descriptor = descriptor
        self.memory = mmap.mmap(descriptor, byte_count)

    def place(self, offset: int, byte_count: int) -> tensor_pb2.SharedMemory:
        return tensor_pb2.SharedMemory(region=self.token, offset=offset, byte_count=byte_count)

    def tensor(self, offset: int, like: tensor_pb2.Tensor) -> tensor_pb2.Tensor:
        """Write a tensor's elements at an offset; return the tensor that names them."""
        self.memory[offset : offset + len(like.data)] = like.data
        return tensor_pb2.Tensor(
            data_type=like.data_type, shape=like.shape, shared_memory=self.place(offset, len(like.data))
        )


class Caller:
    """A connection to the handover socket."""

    def __init__(self, address: str) -> None:
        kind, _, name = address.partition(":")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(PATIENCE_SECONDS)
        self.socket.connect("\0" + name if kind == "unix-abstract" else name)
        self._regions: list[Region] = []

    def ask(self, what: int = REGION, byte_count: int = 0, token: bytes = NOBODY, mark: bytes = b"LGM1") -> None:
        self.socket.send(RECORD.pack(mark, what, token, byte_count))

    def answer(self) -> tuple[int, bytes, int, list[int]]:
        """Return what came of it, the region's name and size, and the descriptors."""
        message, descriptors, _, _ = socket.recv_fds(self.socket, 100, 4)
        mark, answer, token, byte_count = RECORD.unpack(message)
        assert mark == b"LGM1"
        return answer, token, byte_count, descriptors

    def region(self, byte_count: int) -> Region:
        self.ask(REGION, byte_count)
        answer, token, size, (descriptor,) = self.answer()
        assert answer == GRANTED
        assert size == byte_count
        self._regions.append(Region(token, descriptor, size))
        return self._regions[-1]

    def is_closed_by_the_server(self) -> bool:
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def close(self) -> None:
        self.socket.close()
        for region in self._regions:
            os.close(region.descriptor)
        self._regions.clear()

    def __enter__(self) -> Caller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def offer_of(stub: LossServiceStub) -> pb.SharedMemoryInfo:
    """Return what GetServerInfo says about shared memory."""
    info: pb.GetServerInfoResponse = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=PATIENCE_SECONDS)
    return info.shared_memory
