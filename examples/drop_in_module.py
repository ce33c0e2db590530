"""Train with gradients that come from the server: `lossgrad.nn` in the place of `torch.nn`, and nothing else changed.

Run it beside a server: `lossgrad-server &`, then `python examples/drop_in_module.py`.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes

import lossgrad


def main() -> None:
    """Fit a small network to the diabetes data and print its loss as it falls."""
    features, progression = load_diabetes(return_X_y=True, scaled=False)
    inputs = torch.tensor(features, dtype=torch.float32)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    targets = torch.tensor(progression, dtype=torch.float32).unsqueeze(1) / 100

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    with lossgrad.LossClient() as client:
        criterion = lossgrad.nn.SmoothL1Loss(beta=0.5, client=client)  # was: torch.nn.SmoothL1Loss(beta=0.5)
        for epoch in range(1, 61):
            optimizer.zero_grad()
            # One round trip: the gradient comes back with the loss, so backward() needs none.
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            if epoch == 1 or epoch % 20 == 0:
                print(f"epoch {epoch:2d}  loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
