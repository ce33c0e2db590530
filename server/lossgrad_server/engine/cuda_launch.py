"""The kernels of one launch, in their order, over an arena that holds its operands and tables."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from lossgrad_server.engine import cuda_folds, cuda_kernel
from lossgrad_server.engine.cuda_broadcast import expand_operands, round_outputs
from lossgrad_server.engine.cuda_fields import BLOCK_LOG2, CHUNK_ELEMENTS
from lossgrad_server.engine.cuda_layout import Launch, Layout
from lossgrad_server.engine.cuda_template import Kernel, Stage

# Warps of one program: no result depends on them. With 4, the loss kernel takes 128 registers on sm_90 and spills none.
_WARPS: Final = 4


def compute(arena: Tensor, layout: Layout) -> None:
    """Launch all that computes, on the current stream. Weights are summed first, for what divides by their sum."""
    expand_operands(arena, layout)
    for launch in layout.launches:
        _launch(arena, launch)
    round_outputs(arena, layout)


def specialization(kernel: Kernel) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return a kernel's function, its compile-time arguments and Triton's options."""
    # Contracted to a multiply-add, a product would not be rounded, and the bits would be the compiler's choice.
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}
    match kernel.stage:
        case Stage.WEIGHTS:
            constants = {"ROWS": kernel.has_rows, "CHUNK": CHUNK_ELEMENTS, "LEVELS": BLOCK_LOG2}
            return cuda_kernel.weight_kernel, constants, options
        case Stage.LOSSES:
            constants = {
                "OPERAND": kernel.operand,
                "OUTPUT": kernel.output,
                "ROWS": kernel.has_rows,
                "SELECTED": kernel.is_selected,
                "CHUNK": CHUNK_ELEMENTS,
                "LEVELS": BLOCK_LOG2,
            }
            return cuda_kernel.loss_kernel, constants, options
        case Stage.WEIGHT_FOLDS | Stage.LOSS_FOLDS:
            return cuda_folds.fold_kernel, {"LEVELS": BLOCK_LOG2}, options


def _launch(arena: Tensor, launch: Launch) -> None:
    tiles = arena[launch.table.start : launch.table.stop].view(torch.int64)
    function, constants, options = specialization(launch.kernel)
    function[(launch.tile_count,)](arena, tiles, **constants, **options)
