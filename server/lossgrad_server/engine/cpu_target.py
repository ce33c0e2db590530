"""Which processors the CPU kernels are compiled for: a few levels that many share, so that compiled kernels can be shipped.

numba compiles for the very processor that it runs on, and its cache is of no use on any other. The x86-64 levels v3 (AVX2)
and v4 (AVX-512) cost these kernels nothing, and what was compiled for a level runs wherever the level is. The bits of
results are the same on all of them. Source of the levels: the x86-64 psABI, 3.1.1.

`python -m lossgrad_server.engine.cpu_target` compiles for every level, into NUMBA_CACHE_DIR: for an image's build.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, MutableMapping
from typing import Final

_V3: Final = ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4: Final = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

# Best first: LLVM's name of the level -> the features that a processor must have for it.
LEVELS: Final = {"x86-64-v4": _V4, "x86-64-v3": _V3}


def level(features: Mapping[str, bool]) -> str | None:
    """Return the best level of a processor with these features, as LLVM names them; None where it has none."""
    return next((name for name, needed in LEVELS.items() if all(features.get(one) for one in needed)), None)


def environment(name: str) -> dict[str, str]:
    """Return the environment variables by which numba compiles for a level."""
    return {"NUMBA_CPU_NAME": name, "NUMBA_CPU_FEATURES": ",".join(f"+{feature}" for feature in LEVELS[name])}


def host_features() -> dict[str, bool]:
    """Return this processor's features, as LLVM names them."""
    import llvmlite.binding

    get: Callable[[], Mapping[str, bool]] = llvmlite.binding.get_host_cpu_features
    return dict(get())


def choose(environ: MutableMapping[str, str]) -> None:
    """Let numba compile for this processor's level, unless the environment says for what. For before its import."""
    if "NUMBA_CPU_NAME" in environ:
        return
    best = level(host_features())
    if best is not None:
        environ.update(environment(best))


def main() -> None:
    """Compile the kernels for every level, each in a process of its own."""
    program = "from lossgrad_server.engine.cpu_kernel import load_kernel; load_kernel()"
    for name in LEVELS:
        environ = {**os.environ, **environment(name)}
        subprocess.run([sys.executable, "-c", program], env=environ, check=True)  # noqa: S603 - this same Python


if __name__ == "__main__":
    main()
