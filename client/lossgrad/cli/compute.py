"""`lossgrad compute`: the losses of two arrays in .npy files, in one request."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from lossgrad.cli.connecting import connected
from lossgrad.cli.losses import json_number, label_of, parameter_of, read_loss
from lossgrad.cli.outcome import ExitCode, UsageError, cause
from lossgrad.results import LossResult


def run(options: argparse.Namespace) -> ExitCode:
    """Compute, print, and write what is to be written."""
    losses = [
        read_loss(text, reduction=options.reduction, gradient=options.gradient_out is not None)
        for text in options.loss or ["smooth_l1"]
    ]
    for flag, path in (("--gradient-out", options.gradient_out), ("--loss-out", options.loss_out)):
        if path is not None and len(losses) > 1:
            raise UsageError(f"{flag} names one file for {len(losses)} losses; give one --loss at a time")
    if options.loss_out is not None and options.reduction in ("mean", "sum"):
        raise UsageError(f"--loss-out is for arrays, and --reduction {options.reduction} gives one number; see --json")
    input, target = _load(options.input_file, "the input"), _load(options.target_file, "the target")
    weight = None if options.weight is None else _load(options.weight, "--weight")
    mask = None if options.mask is None else _load(options.mask, "--mask")
    with connected(options) as client:
        results = client.compute(
            input, target, losses, weight=weight, mask=mask, allow_broadcast=options.allow_broadcast
        )
    if options.gradient_out is not None:
        _save(options.gradient_out, results[0].gradient, "--gradient-out")
    if options.loss_out is not None:
        _save(options.loss_out, results[0].loss, "--loss-out")
    if options.json:
        print(json.dumps([_as_json(result) for result in results], indent=2))
        return ExitCode.DONE
    for result in results:
        shown = f"{list(result.loss.shape)} {result.loss.dtype}" if result.value is None else repr(result.value)
        nonfinite = f", {result.nonfinite_count} not finite" if result.nonfinite_count else ""
        print(f"{label_of(result.spec)} {result.spec.reduction}: {shown} ({result.element_count} elements{nonfinite})")
    return ExitCode.DONE


def _load(path: Path, what: str) -> Any:
    try:
        array = np.load(path, allow_pickle=False)  # a pickle could run anything
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read as a .npy file: {cause(error)}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise UsageError(f"{what} {str(path)!r} is an archive of arrays; give a .npy file with one array")
    if array.dtype.kind == "V":
        raise UsageError(
            f"{what} {str(path)!r} has data type {array.dtype}, as NumPy saves bfloat16 and records; save it as float32"
        )
    return array


def _save(path: Path, array: Any, flag: str) -> None:
    try:
        with path.open("wb") as file:  # numpy.save would add a suffix of its own to a path
            np.save(file, array)
    except OSError as error:
        raise UsageError(f"{flag} {str(path)!r} cannot be written: {cause(error)}") from error


def _as_json(result: LossResult) -> dict[str, Any]:
    return {
        "loss": result.spec.name,
        **parameter_of(result.spec),
        "reduction": result.spec.reduction,
        "value": None if result.value is None else json_number(result.value),
        "shape": list(result.loss.shape),
        "dtype": str(result.loss.dtype),
        "element_count": result.element_count,
        "weight_sum": json_number(result.weight_sum),
        "nonfinite_count": result.nonfinite_count,
        "timing": dataclasses.asdict(result.timing),
    }
