"""A load generator in a process of its own: calls at a fixed rate, whether or not earlier ones were answered.

Run as `python -m tests.faults.generator '{...Load...}'`; it writes a Report as JSON. Each call asks for the mean absolute
difference between tensors of its own number and of zeros, so that an answer to any other call is seen to be wrong.
`load.py` starts it. It calls with plain gRPC, without retries: what it counts is what the server did.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from typing import Any

import grpc
import grpc.aio
import numpy as np

from lossgrad_api.codec import COMPUTE_LOSS
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1.tensor_pb2 import DATA_TYPE_FLOAT32, Tensor

PUSHBACK = "grpc-retry-pushback-ms"


@dataclasses.dataclass(frozen=True)
class Load:
    """What to send: `rate` calls a second for `seconds`, each with `deadline_seconds` to be answered."""

    target: str
    rate: float
    seconds: float
    deadline_seconds: float
    elements: int = 64


@dataclasses.dataclass(frozen=True)
class Call:
    """One call's outcome: its status, when it began after the first one, how long it took, whether it was right."""

    code: str
    began: float
    seconds: float
    is_right: bool
    has_pushback: bool


def message(number: int, elements: int) -> bytes:
    """Return a ComputeLossRequest whose answer is `number`."""

    def tensor(value: int) -> Tensor:
        return Tensor(
            data_type=DATA_TYPE_FLOAT32, shape=[elements], data=np.full(elements, value, np.float32).tobytes()
        )

    spec = pb.LossSpec(l1=pb.L1Loss())
    return pb.ComputeLossRequest(specs=[spec], input=tensor(number), target=tensor(0)).SerializeToString()


async def run(load: Load) -> list[Call]:
    """Send the load; return every call's outcome."""
    calls: list[Call] = []
    async with grpc.aio.insecure_channel(load.target) as channel:
        await channel.channel_ready()
        method: Any = channel.unary_unary(COMPUTE_LOSS)
        tasks: list[asyncio.Task[None]] = []
        first = time.monotonic()

        async def call(number: int) -> None:
            request = message(number, load.elements)
            began = time.monotonic()
            code, is_right, has_pushback = "OK", True, False
            try:
                answer = await method(request, timeout=load.deadline_seconds)
                is_right = pb.ComputeLossResponse.FromString(answer).results[0].scalar == number
            except grpc.aio.AioRpcError as error:
                code = error.code().name
                has_pushback = any(key == PUSHBACK for key, _ in error.trailing_metadata() or ())
            calls.append(Call(code, began - first, time.monotonic() - began, is_right, has_pushback))

        for number in range(round(load.rate * load.seconds)):
            wait = first + number / load.rate - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(call(number % 4096)))
        await asyncio.gather(*tasks)
    return calls


if __name__ == "__main__":
    outcomes = asyncio.run(run(Load(**json.loads(sys.argv[1]))))
    json.dump([dataclasses.astuple(outcome) for outcome in outcomes], sys.stdout)
