"""Hostile sequences against a server's shared memory: `python -m tests.server.shared_memory_fuzz N SEED`.

Handlers are called directly, as the transport calls them, many sequences at a time: callers register what is not theirs,
name places that overflow, cut regions short, unregister and go away while their requests are computed. Every answer with
numbers must be what a model of the memory says; no error may hold a name that its caller did not give. Prints what happened
as JSON. Whoever runs this sees a crash as the process's end.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np

from lossgrad_api import codec
from lossgrad_api.inference import messages
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.app import Server
from lossgrad_server.config import ServerConfig
from lossgrad_server.errors import InternalError, RequestError
from lossgrad_server.shared_memory.sharing import SharedMemory

PREFIX: Final = "/inference.GRPCInferenceService/"
REMOTE: Final = "ipv4:10.1.2.3:4"
ODD: Final = (0, 1, 4, 8, 4096, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1)
SECRETS: Final = ("memfd", "/proc", ".py", "Traceback", "Errno", "lossgrad_server", "secret", "other program")
COUNT: Final = 64  # elements of a tensor; the regions have four times as many, between ones that nobody may read


class FakeCall:
    """A call from somewhere."""

    method = ""
    metadata: dict[str, str | bytes] = {}  # noqa: RUF012
    deadline = None

    begun_ns = 0

    def __init__(self, peer: str) -> None:
        self.peer = peer


class Fuzz:
    """One server, and the objects that callers share with it."""

    def __init__(self, server: Server, shared: SharedMemory, directory: Path, seed: int) -> None:
        self.methods = {method.name: method for method in server._core.methods}
        self.shared = shared
        self.directory = directory
        self.random = random.Random(seed)
        self.seen: collections.Counter[str] = collections.Counter()
        self.made = 0
        (directory / "lossgrad_link").symlink_to("/etc/passwd")
        (directory / "lossgrad_directory").mkdir()
        os.mkfifo(directory / "lossgrad_fifo")
        (directory / "other").write_bytes(b"other program" * 100)

    def odd(self) -> int:
        return self.random.choice(ODD)

    async def call(self, name: str, message: Any, peer: str) -> bytes | None:
        """Call a handler; None where it refuses, as it may."""
        handler = self.methods[name].unary
        assert handler is not None
        try:
            answer = await handler(message.SerializeToString(), FakeCall(peer))
        except RequestError as error:
            self.check(error)
            self.seen[f"refused {error.reason}"] += 1
            return None
        self.seen[f"answered {name.rpartition('/')[2]}"] += 1
        return answer

    def check(self, error: RequestError) -> None:
        """Check that a refusal is one, and tells nothing that its caller did not say."""
        assert not isinstance(error, InternalError), "a fault of ours"
        tokens = [segment.token.hex() for segment in self.shared.segments._segments.values()]
        for secret in (*SECRETS, str(self.directory), *tokens):
            assert secret not in error.message, error.message

    # --- POSIX regions, by the Open Inference Protocol ---

    async def system(self) -> None:
        """Do one hostile sequence with regions of POSIX shared memory."""
        pick = self.random
        self.made += 1
        name, key = f"r{self.made}", f"lossgrad_{self.made}"
        # Callers of this sequence's own: somebody else's "unregister all" would be another reason for a refusal.
        peer, other = (f"ipv4:127.0.0.1:{2 * self.made + which}" for which in range(2))
        path = self.directory / key
        values = np.full(8 * COUNT, 1e30, "<f4")  # what nobody may read, but for the half that is registered
        mine = slice(2 * COUNT, 6 * COUNT)
        values[mine] = np.round(np.random.default_rng(self.made).normal(size=4 * COUNT), 3)
        path.write_bytes(values.tobytes())
        register = messages().SystemSharedMemoryRegisterRequest
        bad = ("", "/", "..", "/..", "//" + key, "/../" + key, "/x/" + key, "lossgrad_link", "lossgrad_directory",
               "lossgrad_fifo", "/other", "lossgrad_absent", key + "\0", "/./" + key, "lossgrad_" + "x" * 300)  # fmt: skip
        await self.call(
            PREFIX + "SystemSharedMemoryRegister", register(name="b" + name, key=pick.choice(bad), byte_size=8), peer
        )
        await self.call(
            PREFIX + "SystemSharedMemoryRegister",
            register(name="o" + name, key=key, offset=self.odd(), byte_size=pick.choice(ODD[5:])), peer,
        )  # fmt: skip
        good = register(name=name, key=pick.choice(("", "/")) + key, offset=8 * COUNT, byte_size=16 * COUNT)
        await self.call(PREFIX + "SystemSharedMemoryRegister", good, REMOTE)
        registered = await self.call(PREFIX + "SystemSharedMemoryRegister", good, peer)
        assert registered is not None
        assert await self.call(PREFIX + "ModelInfer", self.infer(name, 0, COUNT * 4), other) is None
        await self.call(PREFIX + "ModelInfer", self.infer(name, self.odd(), self.odd() % 2**63), peer)
        size = pick.randrange(8 * COUNT * 4)  # where it is cut, if it is
        cut = np.frombuffer(values.tobytes()[:size].ljust(values.nbytes, b"\0"), "<f4")
        answers = [self.call(PREFIX + "ModelInfer", self.infer(name, 0, 4 * COUNT), peer) for _ in range(2)]
        hostile = pick.choice(("nothing", "cut", "gone", "unregister", "grow"))
        unregister = messages().SystemSharedMemoryUnregisterRequest
        if hostile == "unregister":
            answers.append(self.call(PREFIX + "SystemSharedMemoryUnregister", unregister(name=name), peer))
        cutting = asyncio.ensure_future(asyncio.to_thread(self.change, path, hostile, size))
        if pick.random() < 0.5:
            await cutting
        results = await asyncio.gather(*answers, cutting)
        for answer in results[:2]:
            if answer is None:
                assert hostile in ("cut", "unregister")
                continue
            response = messages().ModelInferResponse.FromString(answer)
            (loss,) = struct.unpack("<f", response.raw_output_contents[0])
            # A gradient that is written just after the cut makes the object long again: of zeros, which the other request
            # may then read. They are its maker's doing, and in the region.
            may_hold = (values, cut) if hostile == "cut" else (values,)
            sums = [
                float(abs(input[mine][:COUNT].astype("f8") - target[mine][COUNT : 2 * COUNT]).sum())
                for input in may_hold
                for target in may_hold
            ]
            assert any(abs(loss - one) <= 1e-5 * one for one in sums), "something else than the region was read"
            self.seen[f"right, {hostile}"] += 1
        await self.call(PREFIX + "SystemSharedMemoryUnregister", unregister(name=name), other)
        await self.call(PREFIX + "SystemSharedMemoryUnregister", unregister(name=pick.choice((name, ""))), peer)
        with contextlib.suppress(FileNotFoundError):
            after = path.read_bytes()
            end = min(len(after), 8 * COUNT)
            was = cut if hostile == "cut" and len(after) > size else values
            assert after[:end] == was.tobytes()[:end], "what is before the region was written"
            tail = slice(6 * COUNT * 4, min(len(after), 8 * COUNT * 4))
            assert hostile == "cut" or after[tail] == values.tobytes()[tail], "what is behind the region was written"
            path.unlink()

    def change(self, path: Path, hostile: str, size: int) -> None:
        if hostile == "cut":
            os.truncate(path, size)
        elif hostile == "grow":
            os.truncate(path, 1 << 20)
        elif hostile == "gone":
            path.unlink()

    def infer(self, region: str, offset: int, byte_size: int) -> Any:
        """Return l1's sum and gradient over two tensors of a region, the gradient put into its second half."""
        request = messages().ModelInferRequest(model_name="l1_grad")
        request.parameters["reduction"].string_param = "sum"
        for index, name in enumerate(("INPUT", "TARGET")):
            tensor = request.inputs.add(name=name, datatype="FP32", shape=[1, COUNT])
            self.place(tensor.parameters, region, offset + index * 4 * COUNT, byte_size)
        request.outputs.add(name="LOSS")
        self.place(request.outputs.add(name="GRAD").parameters, region, offset + 8 * COUNT, byte_size)
        return request

    def place(self, parameters: Any, region: str, offset: int, byte_size: int) -> None:
        parameters["shared_memory_region"].string_param = region
        parameters["shared_memory_byte_size"].int64_param = byte_size
        parameters["shared_memory_offset"].int64_param = offset % 2**63

    # --- segments, by the native protocol ---

    async def segment(self) -> None:
        """Do one hostile sequence with segments."""
        pick = self.random
        mine, other = object(), object()
        segment, descriptor = self.shared.segments.create(mine, 16 * COUNT)
        values = np.round(np.random.default_rng(self.made).normal(size=4 * COUNT), 3).astype("<f4")
        os.pwrite(descriptor, values.tobytes(), 0)
        for size in (0, 16 * COUNT - 1, 2**20):
            with contextlib.suppress(PermissionError):
                os.ftruncate(descriptor, size)
                raise AssertionError("a sealed file changed its size")
        token = segment.token
        assert self.shared.segments.take(other, token) is None
        for bad in (bytes(16), token[:-1], token + b"x", bytes(reversed(token)), b""):
            await self.call(codec.COMPUTE_LOSS, self.native(bad, 0, 4 * COUNT), "unix:")
        for _ in range(3):
            await self.call(codec.COMPUTE_LOSS, self.native(token, self.odd(), self.odd()), "unix:")
        sums = float(abs(values[:COUNT].astype("f8") - values[COUNT : 2 * COUNT]).sum())
        answers = [
            asyncio.ensure_future(self.call(codec.COMPUTE_LOSS, self.native(token, 0, 4 * COUNT), "unix:"))
            for _ in range(2)
        ]
        if pick.random() < 0.5:
            await asyncio.sleep(0)
        self.shared.segments.take_all(mine)  # while they are computed, perhaps
        del segment
        for answer in await asyncio.gather(*answers):
            if answer is not None:
                (result,) = pb.ComputeLossResponse.FromString(answer).results
                assert abs(result.scalar - sums) <= 1e-5 * sums, "something else than the segment was read"
                self.seen["right, segment"] += 1
        os.close(descriptor)

    def native(self, token: bytes, offset: int, byte_count: int) -> pb.ComputeLossRequest:
        request = pb.ComputeLossRequest(
            specs=[pb.LossSpec(l1=pb.L1Loss(), reduction=pb.REDUCTION_SUM, include_gradient=True)]
        )
        for index, tensor in enumerate((request.input, request.target)):
            tensor.data_type = 3  # type: ignore[assignment]
            tensor.shape.append(COUNT)
            tensor.shared_memory.region = token
            tensor.shared_memory.offset = (offset + index * 4 * COUNT) % 2**64
            tensor.shared_memory.byte_count = byte_count
        request.outputs.region = token
        request.outputs.offset = (offset + 8 * COUNT) % 2**64
        request.outputs.byte_count = byte_count
        return request


async def run(sequences: int, seed: int) -> dict[str, int]:
    """Run so many sequences; return how often what happened."""
    server = Server(ServerConfig(port=0, metrics_port=-1, device="cpu", allow_shared_memory=True, log_level="error"))
    await server.start()
    shared = server._core.shared_memory
    assert shared is not None
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        shared.system_regions._directory = directory
        fuzz = Fuzz(server, shared, directory, seed)
        for first in range(0, sequences, 8):
            tasks = [
                fuzz.system() if number % 2 else fuzz.segment() for number in range(first, min(first + 8, sequences))
            ]
            await asyncio.gather(*tasks)
            fuzz.seen["sequences"] += len(tasks)
        assert shared.segments.count == shared.system_regions.count == 0, "something was left"
    await server.stop()
    return dict(fuzz.seen)


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(int(sys.argv[1]), int(sys.argv[2])))))  # noqa: T201
