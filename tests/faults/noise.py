"""Messages of noise, as fuzzers send them. Seeded."""

from __future__ import annotations

import random
from typing import Any, Final

import numpy as np

from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.v1 import tensor_pb2
from tests.server.requests import request

# What is never told to those who send nonsense: anything of the inside.
INSIDE: Final = ("Traceback", ".py", "Error(", "Exception", "0x", "numpy", "torch.", "lossgrad_server", "site-packages")


class Noise:
    """Messages of noise: random bytes, right requests with some bytes changed, and requests with absurd values."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)

    def message(self) -> bytes:
        return self._chance.choice((self._bytes, self._changed, self._absurd))()

    def _bytes(self) -> bytes:
        return self._chance.randbytes(self._chance.choice((0, 1, 2, 7, 64, 500)))

    def _changed(self) -> bytes:
        chance = self._chance
        shape = [chance.randrange(4) for _ in range(chance.randrange(4))]
        data = np.zeros(shape, np.float32)
        message = bytearray(request(data, data).SerializeToString())
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(message))
            if chance.random() < 0.3:
                del message[at:]
                message += chance.randbytes(chance.randrange(20))
                if not message:
                    break
            else:
                message[at] = chance.randrange(256)
        return bytes(message)

    def _absurd(self) -> bytes:
        chance: Any = self._chance
        extents = [0, 1, 3, 2**31, 2**62, 2**63 - 1, 2**63, 2**64 - 1]

        def tensor() -> tensor_pb2.Tensor:
            ndim = chance.choice((0, 1, 2, 3, 8, 65, 1000))
            return tensor_pb2.Tensor(
                data_type=chance.choice((0, 1, 2, 3, 4, 5, 99, 2**31 - 1, -1)),
                shape=[chance.choice(extents) for _ in range(ndim)],
                data=bytes(chance.choice((0, 1, 4, 12, 100))),
            )

        beta = chance.choice((0.0, -0.0, -1.0, float("nan"), float("inf"), 1e-320, 1e308))
        spec = chance.choice(
            (
                pb.LossSpec(smooth_l1=pb.SmoothL1Loss(beta=beta), include_gradient=True),
                pb.LossSpec(huber=pb.HuberLoss(delta=beta)),
                pb.LossSpec(mse=pb.MseLoss(), denominator=beta),
                pb.LossSpec(l1=pb.L1Loss(), reduction=chance.choice((0, 1, 2, 3, 4, 77))),
                pb.LossSpec(),
            )
        )
        return pb.ComputeLossRequest(
            specs=[spec] * chance.choice((0, 1, 2, 17)),
            input=tensor(),
            target=tensor(),
            allow_broadcast=chance.random() < 0.5,
        ).SerializeToString()
