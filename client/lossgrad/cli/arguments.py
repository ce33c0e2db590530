"""The command line: every command with its arguments. Nothing heavy is imported here, so that --help is there at once."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from lossgrad.cli.outcome import UsageError

LOSS_EXAMPLE: Final = "such as smooth_l1:beta=0.5, huber:delta=1.0, l1 or mse"
REDUCTIONS: Final = ("mean", "sum", "none", "sample_mean", "sample_sum")
_EPILOG: Final = (
    "Exit codes: 0 done; 1 a check failed, or data that a policy refuses; 2 the command line or a file has to be changed; "
    "3 the server cannot be reached or failed; 130 interrupted, 143 terminated. Whatever goes wrong is one line on "
    "standard error. See docs/command-line.md."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see: {self.prog} --help)")


class _Version(argparse.Action):
    """Looks the version up only when asked for it: reading the distribution's metadata takes as long as all else."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        import lossgrad

        print(f"lossgrad {lossgrad.__version__}")
        parser.exit()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line as values. Raises UsageError; exits for --help and --version, as argparse does."""
    parser = _Parser(
        prog="lossgrad", description="Losses and gradients from a lossgrad server: ask it, load it.", epilog=_EPILOG
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_ping(commands)
    _add_info(commands)
    _add_compute(commands)
    _add_evaluate(commands)
    _add_merge(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_top(commands)
    return parser.parse_args(arguments)


_Commands = argparse._SubParsersAction  # what argparse gives, and has no public name for


def _add_command(
    commands: _Commands[_Parser], name: str, help: str, *, embedded: bool = False, several: bool = False
) -> _Parser:
    """Add a command with the arguments that say how its server is reached."""
    parser = commands.add_parser(name, help=help, description=f"{help[0].upper()}{help[1:]}.")
    group = parser.add_argument_group("connection (each also from the environment)")
    group.add_argument(
        "--target",
        action="append" if several else "store",
        help=f"gRPC target of the server{', several for several' if several else ''} (LOSSGRAD_TARGET; localhost:50051)",
    )
    if embedded:
        group.add_argument(
            "--embedded", action="store_true", help="compute in this process, without a server; needs lossgrad[server]"
        )
    group.add_argument("--timeout", type=float, metavar="SECONDS", help="for each call (LOSSGRAD_TIMEOUT; 30)")
    group.add_argument("--token-file", type=Path, help="file that holds the bearer token (LOSSGRAD_TOKEN: the token)")
    group.add_argument("--tls", action="store_true", default=None, help="use TLS (LOSSGRAD_TLS=1)")
    group.add_argument("--ca", help="PEM file of the authorities to trust; turns TLS on (LOSSGRAD_CA)")
    group.add_argument("--cert", help="PEM file of this client's certificate (LOSSGRAD_CERT)")
    group.add_argument("--key", help="PEM file of its private key (LOSSGRAD_KEY)")
    return parser


def _add_losses(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    help = f"{LOSS_EXAMPLE}; may be given several times (smooth_l1)"
    parser.add_argument("--loss", action="append", default=[], metavar="LOSS", help=help)


def _add_ping(commands: _Commands[_Parser]) -> None:
    _add_command(commands, "ping", "check that the server serves; print the round trip")


def _add_info(commands: _Commands[_Parser]) -> None:
    info = _add_command(commands, "info", "print the server's version, device and limits")
    info.add_argument("--json", action="store_true", help="print JSON")


def _add_compute(commands: _Commands[_Parser]) -> None:
    compute = _add_command(commands, "compute", "compute losses of two .npy files", embedded=True)
    compute.add_argument("input_file", metavar="A.npy", type=Path, help="the predictions")
    compute.add_argument("target_file", metavar="B.npy", type=Path, help="the targets, which they are compared with")
    _add_losses(compute)
    compute.add_argument("--reduction", default="mean", help=f"{', '.join(REDUCTIONS)} (mean)")
    compute.add_argument("--weight", type=Path, help=".npy file of each element's weight")
    compute.add_argument("--mask", type=Path, help=".npy file of bool: false where an element takes no part")
    compute.add_argument("--allow-broadcast", action="store_true", help="broadcast unequal shapes")
    compute.add_argument("--gradient-out", type=Path, help="write the gradient with respect to the input to this file")
    compute.add_argument("--loss-out", type=Path, help="write the loss to this file; for reductions that give an array")
    compute.add_argument("--json", action="store_true", help="print JSON")


def _add_evaluate(commands: _Commands[_Parser]) -> None:
    evaluate = _add_command(
        commands, "evaluate", "evaluate predictions against targets, in files of any size", embedded=True, several=True
    )
    evaluate.add_argument(
        "files",
        nargs="*",
        metavar="PREDICTIONS TARGETS",
        help="each PATH[:NAME]: a .npy, .npz, .safetensors, .parquet, .arrow or .feather file, a folder of them, or a "
        "pattern in quotes; NAME is an array inside. A bare NAME is one in the files of the predictions",
    )
    _add_losses(evaluate)
    data = evaluate.add_argument_group("data")
    data.add_argument("--weight", metavar="FILE", help="each element's weight, or each row's; PATH[:NAME] as above")
    data.add_argument("--mask", metavar="FILE", help="bool, false where an element or row takes no part")
    data.add_argument("--group-by", metavar="FILE", help="which group each row (or element) is in: integers or text")
    data.add_argument("--group-by-file", action="store_true", help="each file of the predictions is a group")
    data.add_argument(
        "--nan-policy",
        choices=("propagate", "omit", "raise"),
        default="propagate",
        help="NaN in the data makes the result NaN, is left out, or is an error (propagate)",
    )
    output = evaluate.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses by group and along the data")
    output.add_argument(
        "--gradient-out",
        metavar="FILE.npy",
        help="write the gradient with respect to the predictions; {loss} in the name stands for the loss",
    )
    output.add_argument("--gradient-of", choices=("mean", "sum"), default="mean", help="over all elements (mean)")
    output.add_argument("--state-out", type=Path, metavar="FILE", help="write the exact state, for `lossgrad merge`")
    output.add_argument("--quiet", action="store_true", help="show no progress")
    course = evaluate.add_argument_group("course")
    course.add_argument(
        "--checkpoint", type=Path, metavar="FILE", help="keep what is done in this file, and go on from it"
    )
    course.add_argument("--checkpoint-every", type=float, default=5.0, metavar="SECONDS", help="how often (5)")
    course.add_argument("--workers", type=int, default=1, metavar="N", help="processes that read and send (1)")
    course.add_argument(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="how long to go on without any server (60); where it is given, also how long to wait for the first one",
    )
    course.add_argument(
        "--keep-going", action="store_true", help="leave out what the server cannot evaluate; exit 1 then"
    )


def _add_merge(commands: _Commands[_Parser]) -> None:
    help = "put together what several `lossgrad evaluate --state-out` wrote"
    merge = commands.add_parser("merge", help=help, description=f"{help[0].upper()}{help[1:]}.")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE", help="states, of the same losses")
    merge.add_argument("--json", action="store_true", help="print JSON")
    merge.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the losses by group")
    merge.add_argument("--state-out", type=Path, metavar="FILE", help="write the state of all of them")


def _add_bench(commands: _Commands[_Parser]) -> None:
    bench = _add_command(commands, "bench", "put load on a server and show how long it takes to answer")
    load = bench.add_argument_group("load (each may be given several times; --in-flight 1, 8 and 64)")
    load.add_argument(
        "--rate",
        type=float,
        action="append",
        default=[],
        metavar="PER_SECOND",
        help="requests a second, sent whether or not the ones before are answered; latency counts from when a request "
        "was meant to be sent",
    )
    load.add_argument(
        "--in-flight",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="callers that each wait for their answer",
    )
    load.add_argument(
        "--arrivals", choices=("poisson", "even"), default="poisson", help="how --rate is spread (poisson)"
    )
    load.add_argument("--seconds", type=float, default=5.0, help="how long each load is measured (5)")
    load.add_argument("--warm-up", type=float, default=1.0, metavar="SECONDS", help="how long it is not, before (1)")
    load.add_argument("--connections", type=int, default=1, metavar="N", help="how many to share it among (1)")
    load.add_argument(
        "--unary", action="store_true", help="a call for each request; small ones share a stream otherwise"
    )
    request = bench.add_argument_group("request")
    request.add_argument("--shape", default="1024", help="of both tensors, such as 64x3x32x32 (1024)")
    request.add_argument("--dtype", default="float32", help="float16, float32 or float64 (float32)")
    _add_losses(request)
    request.add_argument("--gradient", action="store_true", help="ask for the gradient too")
    bench.add_argument("--json", action="store_true", help="print JSON")


def _add_doctor(commands: _Commands[_Parser]) -> None:
    doctor = _add_command(commands, "doctor", "find out why a server cannot be used, or that it can")
    doctor.add_argument("--json", action="store_true", help="print JSON")


def _add_top(commands: _Commands[_Parser]) -> None:
    help = "show what servers do right now, from their metrics"
    top = commands.add_parser("top", help=help, description=f"{help[0].upper()}{help[1:]}. Ends with ctrl-C.")
    top.add_argument(
        "--metrics",
        action="append",
        metavar="HOST:PORT",
        help="a server's metrics; several are added up (127.0.0.1:8002)",
    )
    top.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks (1)")
    top.add_argument("--once", action="store_true", help="print one look and end")
