"""The kernels of one launch, in their order, over an arena that holds its operands and tables."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from lossgrad_server.engine import cuda_kernel
from lossgrad_server.engine.cuda_broadcast import expand_operands, round_outputs
from lossgrad_server.engine.cuda_fields import BLOCK_LOG2, CHUNK_ELEMENTS
from lossgrad_server.engine.cuda_layout import Launch, Layout
from lossgrad_server.engine.cuda_template import Stage

# Triton's decorator keeps a kernel's signature, but its arguments become something else on the way.
_kernels: Any = cuda_kernel

# Warps of one program: no result depends on them. With 4, the loss kernel takes 128 registers on sm_90 and spills none.
_WARPS: Final = 4


def compute(arena: Tensor, layout: Layout) -> None:
    """Launch all that computes, on the current stream. Weights are summed first, for what divides by their sum."""
    expand_operands(arena, layout)
    for launch in layout.launches:
        _launch(arena, launch)
    round_outputs(arena, layout)


def _launch(arena: Tensor, launch: Launch) -> None:
    grid = (launch.tile_count,)
    tiles = arena[launch.table.start : launch.table.stop].view(torch.int64)
    # Contracted to a multiply-add, a product would not be rounded, and the bits would be the compiler's choice.
    options = {"num_warps": _WARPS, "enable_fp_fusion": False}
    kernel = launch.kernel
    match kernel.stage:
        case Stage.WEIGHTS:
            _kernels.weight_kernel[grid](
                arena, tiles, ROWS=kernel.has_rows, CHUNK=CHUNK_ELEMENTS, LEVELS=BLOCK_LOG2, **options
            )
        case Stage.LOSSES:
            _kernels.loss_kernel[grid](
                arena,
                tiles,
                OPERAND=kernel.operand,
                OUTPUT=kernel.output,
                ROWS=kernel.has_rows,
                SELECTED=kernel.is_selected,
                CHUNK=CHUNK_ELEMENTS,
                LEVELS=BLOCK_LOG2,
                **options,
            )
        case Stage.WEIGHT_FOLDS | Stage.LOSS_FOLDS:
            _kernels.fold_kernel[grid](arena, tiles, LEVELS=BLOCK_LOG2, **options)
