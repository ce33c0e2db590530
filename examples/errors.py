"""What goes wrong, and how it is told: every error names the values at fault and what to change.

Run it beside a server: `lossgrad-server &`, then `python examples/errors.py`.
"""

from __future__ import annotations

import numpy as np

import lossgrad


def show(title: str, error: lossgrad.LossgradError) -> None:
    """Print what a caller can act on."""
    # Where no server answered, gRPC's own words come first, and then a line of ours.
    print(f"{title}\n  {type(error).__name__}: {str(error).splitlines()[-1]}")
    print(f"  code={error.code.name} reason={error.reason} field={error.field}")


def main() -> None:
    """Send what the server refuses."""
    ones = np.ones((4, 3), dtype=np.float32)

    with lossgrad.LossClient() as client:
        try:
            client.smooth_l1(ones, np.ones((4, 1), dtype=np.float32))
        except lossgrad.InvalidRequest as error:  # also a ValueError
            show("Shapes that differ; torch would broadcast them in silence or with a warning:", error)

        try:
            client.smooth_l1(ones, ones, beta=-1.0)
        except lossgrad.InvalidRequest as error:
            show("A beta below zero:", error)

        try:
            client.l1(ones, ones, reduction="avg")
        except lossgrad.InvalidRequest as error:
            show("A reduction that does not exist:", error)

    # Nobody listens on this port; the caller learns it after the time to connect, not after the full timeout.
    with lossgrad.LossClient("127.0.0.1:9", timeout=1.0) as client:
        try:
            client.l1(ones, ones)
        except lossgrad.Unavailable as error:  # worth trying again, here or elsewhere
            show("No server:", error)


if __name__ == "__main__":
    main()
