"""What the tests of `lossgrad evaluate` share: data in files, and expected numbers by NumPy in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from lossgrad.cli import main

LOSSES: Final = ("smooth_l1:beta=0.5", "huber:delta=2", "l1", "mse")
Array = np.ndarray[Any, Any]


def elementwise(loss: str, predictions: Array, targets: Array) -> Array:
    """Return each element's loss in float64, from the definitions in docs/semantics.md."""
    name, _, parameter = loss.partition(":")
    value = float(parameter.partition("=")[2] or 1)
    difference = np.abs(predictions.astype(np.float64) - targets.astype(np.float64))
    if name == "smooth_l1":
        return np.where(difference < value, 0.5 * difference**2 / value, difference - 0.5 * value)
    if name == "huber":
        return np.where(difference < value, 0.5 * difference**2, value * (difference - 0.5 * value))
    return difference if name == "l1" else difference**2


def gradient(loss: str, predictions: Array, targets: Array) -> Array:
    """Return each element's derivative in float64."""
    name, _, parameter = loss.partition(":")
    value = float(parameter.partition("=")[2] or 1)
    difference = predictions.astype(np.float64) - targets.astype(np.float64)
    if name == "smooth_l1":
        return np.clip(difference / value, -1, 1)
    if name == "huber":
        return np.clip(difference, -value, value)
    return np.sign(difference) if name == "l1" else 2 * difference


def make_pair(count: Any = 300_000, dtype: Any = np.float32, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    predictions = rng.standard_normal(count).astype(dtype)
    return predictions, (predictions + rng.standard_normal(count)).astype(dtype)


def save_shards(folder: Path, arrays: dict[str, Array], count: int) -> None:
    """Write each array to a folder of its own, cut into files of unequal lengths."""
    for name, array in arrays.items():
        (folder / name).mkdir()
        bounds = [len(array) * index**2 // count**2 for index in range(count + 1)]
        for index in range(count):
            np.save(folder / name / f"{index:03}.npy", array[bounds[index] : bounds[index + 1]])


class Evaluate:
    """Runs `lossgrad evaluate` in this process, on a server."""

    def __init__(self, target: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.target = target
        self._capsys = capsys
        self.err = ""
        self.out = ""

    def run(self, arguments: str) -> int:
        """Return the exit code; keep what was written."""
        command = ["evaluate", *arguments.split(), "--target", self.target]
        code = main(command)
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return code

    def json(self, arguments: str) -> Any:
        """Return what it prints as JSON."""
        code = self.run(f"{arguments} --json --quiet")
        assert code == 0, self.err
        return json.loads(self.out, parse_constant=lambda name: pytest.fail(f"bare {name}"))

    def losses(self, arguments: str) -> list[dict[str, Any]]:
        """Return the totals, for comparing them to the bit: JSON has every digit."""
        losses: list[dict[str, Any]] = self.json(arguments)["losses"]
        return losses


def close(value: float, expected: float, dtype: Any) -> bool:
    """Whether a sum is as exact as is promised for the data's type."""
    relative = {np.dtype(np.float64): 1e-15, np.dtype(np.float32): 1e-7}.get(np.dtype(dtype), 2e-7)
    return math.isclose(value, expected, rel_tol=relative)
