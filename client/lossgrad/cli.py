"""The `lossgrad` command: ask a server how it is, what it is, and for the losses of arrays in .npy files.

Exit codes: 0 done; 1 the call failed; 2 the command line or a file has to be changed. Whatever goes wrong is one line on
standard error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from lossgrad import __version__
from lossgrad.channel import DEFAULT_TARGET, DEFAULT_TIMEOUT_SECONDS
from lossgrad.client import LossClient
from lossgrad.errors import InvalidRequest, LossgradError, RequestTooLarge
from lossgrad.losses import L1, MSE, Huber, Loss, SmoothL1
from lossgrad.results import LossResult

_LOSSES: Final[dict[str, type[Loss]]] = {loss.name: loss for loss in (SmoothL1, Huber, L1, MSE)}
_PARAMETERS: Final = {"smooth_l1": "beta", "huber": "delta"}
_REDUCTIONS: Final = ("mean", "sum", "none", "sample_mean", "sample_sum")
_EXAMPLE: Final = "such as smooth_l1:beta=0.5, huber:delta=1.0, l1 or mse"


class UsageError(Exception):
    """What the user has to change."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        with _client(options) as client:
            options.run(client, options)
    except (UsageError, InvalidRequest, RequestTooLarge) as error:
        return _fail(error, 2)
    except LossgradError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail(RuntimeError("interrupted"), 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; there is nobody to tell
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    connection = _Parser(add_help=False)
    group = connection.add_argument_group("connection (each also from the environment)")
    group.add_argument("--target", help=f"gRPC target of the server (LOSSGRAD_TARGET; {DEFAULT_TARGET})")
    group.add_argument(
        "--timeout", type=float, help=f"seconds for each call (LOSSGRAD_TIMEOUT; {DEFAULT_TIMEOUT_SECONDS:g})"
    )
    group.add_argument("--token-file", type=Path, help="file that holds the bearer token (LOSSGRAD_TOKEN: the token)")
    group.add_argument("--tls", action="store_true", default=None, help="use TLS (LOSSGRAD_TLS=1)")
    group.add_argument("--ca", help="PEM file of the authorities to trust; turns TLS on (LOSSGRAD_CA)")
    group.add_argument("--cert", help="PEM file of this client's certificate (LOSSGRAD_CERT)")
    group.add_argument("--key", help="PEM file of its private key (LOSSGRAD_KEY)")

    parser = _Parser(prog="lossgrad", description="Ask a lossgrad server.", epilog=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--version", action="version", version=f"lossgrad {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ping | info | compute")

    ping = commands.add_parser("ping", parents=[connection], help="check that the server serves; print the round trip")
    ping.set_defaults(run=_ping)

    info = commands.add_parser("info", parents=[connection], help="print the server's version, device and limits")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    compute = commands.add_parser("compute", parents=[connection], help="compute losses of two .npy files")
    compute.add_argument("input_file", metavar="A.npy", type=Path, help="the predictions")
    compute.add_argument("target_file", metavar="B.npy", type=Path, help="the targets, which they are compared with")
    compute.add_argument(
        "--loss",
        action="append",
        default=[],
        metavar="LOSS",
        help=f"{_EXAMPLE}; may be given several times (smooth_l1)",
    )
    compute.add_argument("--reduction", default="mean", help=f"{', '.join(_REDUCTIONS)} (mean)")
    compute.add_argument("--weight", type=Path, help=".npy file of each element's weight")
    compute.add_argument("--mask", type=Path, help=".npy file of bool: false where an element takes no part")
    compute.add_argument("--allow-broadcast", action="store_true", help="broadcast unequal shapes")
    compute.add_argument("--gradient-out", type=Path, help="write the gradient with respect to the input to this file")
    compute.add_argument("--loss-out", type=Path, help="write the loss to this file; for reductions that give an array")
    compute.add_argument("--json", action="store_true", help="print JSON")
    compute.set_defaults(run=_compute)
    return parser


def _client(options: argparse.Namespace) -> LossClient:
    token = None
    if options.token_file is not None:
        try:
            token = options.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {options.token_file} cannot be read: {_cause(error)}") from error
    try:
        return LossClient(
            options.target,
            token=token,
            tls=options.tls,
            ca=options.ca,
            cert=options.cert,
            key=options.key,
            timeout=options.timeout,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error


def _ping(client: LossClient, _: argparse.Namespace) -> None:
    print(f"serving; round trip {client.ping() * 1e3:.2f} ms")


def _info(client: LossClient, options: argparse.Namespace) -> None:
    info = dataclasses.asdict(client.info())
    if options.json:
        print(json.dumps(info, indent=2))
        return
    limits = info.pop("limits")
    for name, value in (info | limits).items():
        shown = ", ".join(value) if isinstance(value, tuple) else value
        print(f"{name.replace('_', ' '):20} {shown}")


def _compute(client: LossClient, options: argparse.Namespace) -> None:
    losses = [_loss(text, options) for text in options.loss or ["smooth_l1"]]
    for flag, path in (("--gradient-out", options.gradient_out), ("--loss-out", options.loss_out)):
        if path is not None and len(losses) > 1:
            raise UsageError(f"{flag} names one file for {len(losses)} losses; give one --loss at a time")
    if options.loss_out is not None and options.reduction in ("mean", "sum"):
        raise UsageError(f"--loss-out is for arrays, and --reduction {options.reduction} gives one number; see --json")
    results = client.compute(
        _load(options.input_file, "the input"),
        _load(options.target_file, "the target"),
        losses,
        weight=None if options.weight is None else _load(options.weight, "--weight"),
        mask=None if options.mask is None else _load(options.mask, "--mask"),
        allow_broadcast=options.allow_broadcast,
    )
    if options.gradient_out is not None:
        _save(options.gradient_out, results[0].gradient, "--gradient-out")
    if options.loss_out is not None:
        _save(options.loss_out, results[0].loss, "--loss-out")
    if options.json:
        print(json.dumps([_as_json(result) for result in results], indent=2))
        return
    for result in results:
        shown = f"{list(result.loss.shape)} {result.loss.dtype}" if result.value is None else repr(result.value)
        nonfinite = f", {result.nonfinite_count} not finite" if result.nonfinite_count else ""
        print(f"{_label(result.spec)} {result.spec.reduction}: {shown} ({result.element_count} elements{nonfinite})")


def _loss(text: str, options: argparse.Namespace) -> Loss:
    """Return the loss that `name` or `name:parameter=value` stands for."""
    name, separator, setting = text.partition(":")
    function = _LOSSES.get(name)
    if function is None:
        raise UsageError(f"--loss {text!r} names no loss; give one {_EXAMPLE}")
    keywords: dict[str, Any] = {"reduction": options.reduction, "gradient": options.gradient_out is not None}
    if separator:
        parameter, _, value = setting.partition("=")
        if parameter != _PARAMETERS.get(name):
            takes = f"takes only {_PARAMETERS[name]}=" if name in _PARAMETERS else "takes no parameter"
            raise UsageError(f"--loss {text!r}: {name} {takes}; give one {_EXAMPLE}")
        try:
            keywords[parameter] = float(value)
        except ValueError:
            raise UsageError(f"--loss {text!r}: {value!r} is not a number; give one {_EXAMPLE}") from None
    return function(**keywords)


def _load(path: Path, what: str) -> Any:
    try:
        array = np.load(path, allow_pickle=False)  # a pickle could run anything
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"{what} {str(path)!r} cannot be read as a .npy file: {_cause(error)}") from error
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
        raise UsageError(f"{flag} {str(path)!r} cannot be written: {_cause(error)}") from error


def _as_json(result: LossResult) -> dict[str, Any]:
    return {
        "loss": result.spec.name,
        **{name: _number(getattr(result.spec, name)) for name in ("beta", "delta") if hasattr(result.spec, name)},
        "reduction": result.spec.reduction,
        "value": None if result.value is None else _number(result.value),
        "shape": list(result.loss.shape),
        "dtype": str(result.loss.dtype),
        "element_count": result.element_count,
        "weight_sum": _number(result.weight_sum),
        "nonfinite_count": result.nonfinite_count,
        "timing": dataclasses.asdict(result.timing),
    }


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)  # JSON has no NaN and no infinity


def _label(spec: Loss) -> str:
    name = _PARAMETERS.get(spec.name)
    return spec.name if name is None else f"{spec.name}({name}={getattr(spec, name):g})"


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _fail(error: BaseException, code: int) -> int:
    line = " ".join(str(error).split())
    print(f"lossgrad: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
