"""Evaluate many batches at a time with asyncio: the server gathers concurrent requests into one batch by itself.

Run it beside a server: `lossgrad-server &`, then `python examples/asyncio_client.py`.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import asyncio
import math

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

import lossgrad

BATCH_SIZE = 32


async def main() -> None:
    """Predict the lower half of handwritten digits from the upper half; evaluate all batches concurrently."""
    pixels = load_digits().data.astype(np.float32)
    upper, lower = pixels[:, :32], pixels[:, 32:]
    model = Ridge().fit(upper[:1000], lower[:1000])
    prediction, target = model.predict(upper[1000:]), lower[1000:]

    async with lossgrad.AsyncLossClient() as client:

        async def evaluate(start: int) -> lossgrad.LossResult:
            rows = slice(start, start + BATCH_SIZE)
            # Sums add up; means of batches of unequal size would not.
            return await client.smooth_l1(prediction[rows], target[rows], beta=2.0, reduction="sum")

        results = await asyncio.gather(*map(evaluate, range(0, len(target), BATCH_SIZE)))

    # `value` is the float64 that the server summed; None only where a loss is a tensor.
    total = math.fsum(result.value for result in results if result.value is not None)
    elements = sum(result.element_count for result in results)
    print(f"{len(results)} batches, {elements} pixels")
    print(f"SmoothL1(beta=2) {total / elements:.6f}")
    print(f"largest batch on the server: {max(result.timing.batch_request_count for result in results)} requests")


if __name__ == "__main__":
    asyncio.run(main())
