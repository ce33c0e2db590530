"""Evaluate a model's real predictions remotely, from a process that needs neither torch nor a GPU.

Run it beside a server: `lossgrad-server &`, then `python examples/sync_client.py`. LOSSGRAD_TARGET names another server.
"""

# mypy: allow-untyped-calls

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Ridge
from sklearn.model_selection import train_test_split

import lossgrad


def main() -> None:
    """Fit a ridge regression, then ask the server how wrong its predictions are."""
    train_x, test_x, train_y, test_y = train_test_split(*load_diabetes(return_X_y=True), random_state=0)
    prediction = Ridge(alpha=0.1).fit(train_x, train_y).predict(test_x).astype(np.float32)
    target = test_y.astype(np.float32)

    with lossgrad.LossClient() as client:
        # One loss and its gradient, which says in which direction, and how far, each prediction should move.
        result = client.smooth_l1(prediction, target, beta=10.0, gradient=True)
        assert result.gradient is not None
        print(f"SmoothL1(beta=10) {result.value:.4f}; gradient {result.gradient.shape} {result.gradient.dtype}")

        # Several losses over the same tensors are one upload and one round trip.
        specs = [lossgrad.SmoothL1(beta=1.0), lossgrad.Huber(delta=25.0), lossgrad.L1(), lossgrad.MSE()]
        for spec, several in zip(specs, client.compute(prediction, target, specs), strict=True):
            print(f"{spec}: {several.value:.4f}")

        # One number per sample, in float32 because the tensors are: which patients does the model get most wrong?
        errors = client.l1(prediction, target, reduction="sample_sum").loss
        print("worst five:", ", ".join(f"{error:.1f}" for error in np.sort(errors)[:-6:-1]))

        # Only some elements: the masked ones are selected away, so even a NaN behind the mask stays behind it.
        high = client.l1(prediction, target, mask=target > 200)
        print(f"L1 over the {high.element_count} patients above 200: {high.value:.4f}")


if __name__ == "__main__":
    main()
