"""What importing lossgrad brings along, and how it does without what is not installed."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

import lossgrad

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocker())
"""
OPTIONAL = {
    "torch",
    "lossgrad_server",
    "ml_dtypes",
    "rich",
    "grpc_health",
    "grpc_reflection",
    "prometheus_client",
    "numba",
}


def run(code: str, *blocked: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(blocked=set(blocked) or "()") + code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_client_does_not_import_torch_or_the_server() -> None:
    run("import lossgrad; assert not {'torch', 'lossgrad_server', 'ml_dtypes'} & set(sys.modules)")
    run("from lossgrad import *; assert 'torch' not in sys.modules; LossClient")
    run("import lossgrad.cli; assert 'torch' not in sys.modules")


def test_importing_the_package_waits_for_nothing_heavy() -> None:
    run("import lossgrad; assert not {'grpc', 'numpy', 'google', 'asyncio'} & set(sys.modules), sys.modules")
    # The module of the same name takes the function's place only if it comes first.
    run("import lossgrad.embedded; from lossgrad.embedded import embedded; assert lossgrad.embedded is embedded")
    # Nor does the command's help.
    run("import lossgrad.cli; assert not {'grpc', 'numpy', 'google', 'asyncio'} & set(sys.modules), sys.modules")
    run("import lossgrad; assert {'LossClient', 'nn', '__version__'} <= set(dir(lossgrad))")


def test_the_client_works_where_only_its_own_dependencies_are(target: str) -> None:
    out = run(
        f"""
import numpy as np
import lossgrad
with lossgrad.LossClient({target!r}) as client:
    result = client.smooth_l1(np.array([1.0, 3.0]), [0.0, 0.0], gradient=True)
    print(result.value, result.gradient.tolist(), [r.value for r in client.stream([(1.0, 2.0)] * 2, lossgrad.L1())])
from lossgrad.cli import main
main(["ping", "--target", {target!r}])
""",
        *OPTIONAL,
    )
    first, second = out.splitlines()
    assert first == "1.5 [0.5, 0.5] [1.0, 1.0]"
    assert second.startswith("serving")


def test_without_torch_the_drop_in_modules_say_what_to_install() -> None:
    out = run(
        """
import lossgrad
try:
    lossgrad.nn
except ModuleNotFoundError as error:
    print(error)
""",
        "torch",
    )
    assert out == "lossgrad.nn needs torch, which is not installed: pip install 'lossgrad[torch]'\n"


@pytest.mark.parametrize("missing", ["lossgrad_server", "torch", "prometheus_client"])
def test_without_the_server_embedded_says_what_to_install(missing: str) -> None:
    out = run(
        """
import lossgrad
try:
    with lossgrad.embedded():
        pass
except ModuleNotFoundError as error:
    print(error)
""",
        missing,
    )
    assert f"needs the server ({missing}" in out
    assert "pip install 'lossgrad[server]'" in out


def test_large_blocks_are_kept_only_when_asked_for() -> None:
    run(
        "import lossgrad, sys; assert 'lossgrad_api.allocator' not in sys.modules; "
        "assert lossgrad.keep_large_blocks() in (True, False)"
    )


def test_nn_is_found_as_an_attribute() -> None:
    run("import lossgrad; assert lossgrad.nn.SmoothL1Loss(); from lossgrad import nn; assert nn is lossgrad.nn")
    with pytest.raises(AttributeError, match="module 'lossgrad' has no attribute 'nothing'"):
        lossgrad.nothing  # noqa: B018


def test_the_version_is_the_distributions() -> None:
    assert lossgrad.__version__ == importlib.metadata.version("lossgrad")
    for name in lossgrad.__all__:
        assert hasattr(lossgrad, name)
