"""The same engine inside this process: for notebooks, tests and one-off jobs. It needs `lossgrad[server]`, no server.

The answers have the same bits as those of a server on the same kind of device.
"""

from __future__ import annotations

import numpy as np

import lossgrad


def main() -> None:
    """Compute two losses in this process, and look at where the loss turns from quadratic to linear."""
    distance = np.linspace(-2.0, 2.0, 9, dtype=np.float32)
    zeros = np.zeros_like(distance)

    with lossgrad.embedded() as client:
        smooth = client.smooth_l1(distance, zeros, beta=1.0, reduction="none", gradient=True)
        plain = client.l1(distance, zeros, reduction="none", gradient=True)
        assert smooth.gradient is not None
        assert plain.gradient is not None
        # The gradient is that of the sum of the losses, as torch's loss.sum().backward() would leave it.
        print("distance  smooth_l1  gradient   l1  gradient")
        for row in zip(distance, smooth.loss, smooth.gradient, plain.loss, plain.gradient, strict=True):
            print("{:8.2f}  {:9.4f}  {:8.2f}  {:3.1f}  {:8.2f}".format(*row))
        print("computed on", smooth.timing.device)


if __name__ == "__main__":
    main()
