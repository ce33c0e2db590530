"""Compiles kernels for a GPU that need not be there, and prints what matters of the code, as JSON.

A program of its own, because triton either interprets or compiles in one process: `python cuda_compiling.py 90`.
"""

from __future__ import annotations

import collections
import json
import re
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lossgrad_server.engine import cuda_kernel, cuda_launch
from lossgrad_server.engine.cuda_builder import template_of
from lossgrad_server.engine.cuda_template import Kernel
from lossgrad_server.engine.cuda_worker import warm_up_items

# Global memory by width, what would round differently than IEEE 754 says, and float atomics.
_INSTRUCTION = re.compile(
    r"(?:ld|st)\.global[.\w]*|atom[.\w]*|(?:fma|mad)\.[.\w]*f(?:16|32|64)|[\w.]*\.ftz[.\w]*|[\w.]*approx[.\w]*|div[.\w]*f\d\d"
)


def compiled(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Return the instructions of a kernel's PTX, counted."""
    function, constants, options = cuda_launch.specialization(kernel)
    names = function.arg_names
    pointers = {"arena": "*u8", "tiles": "*i64"}
    source = ASTSource(
        function,
        signature={name: pointers.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    compile: Any = triton.compile
    code = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return {
        "kernel": [int(value) for value in kernel],
        "instructions": collections.Counter(_INSTRUCTION.findall(code.asm["ptx"])),
    }


def main() -> None:
    """Compile every kernel that the worker's warm-up uses."""
    assert not cuda_kernel.INTERPRETED
    codes = {code for item in warm_up_items() for code in template_of(item.header).programs[:, 0].tolist()}
    kernels = [compiled(Kernel.of_code(code), int(sys.argv[1])) for code in sorted(codes)]
    json.dump({"triton": triton.__version__, "kernels": kernels}, sys.stdout)


if __name__ == "__main__":
    main()
