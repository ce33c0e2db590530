"""What torch does for jobs that are not direct: operands expanded and converted before, outputs summed and rounded after.

Plain torch operations on the arena, on the current stream. Rare, so clear before fast.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from lossgrad_server.engine.cuda_layout import Layout
from lossgrad_server.engine.reductions import sum_to_shape
from lossgrad_server.engine.tensors import TORCH_TYPES, round_into
from lossgrad_server.jobs import DataType

# How many elements are rounded at a time, so that temporaries stay small.
_PIECE_ELEMENTS: Final = 4 * 1024 * 1024


def expand_operands(arena: Tensor, layout: Layout) -> None:
    """Write the operands of jobs that are not direct as the kernels read them."""
    for job, template in enumerate(layout.templates):
        for expansion in template.expansions:
            tensor = expansion.tensor
            # Bools are bytes, any but 0 true: a byte other than 0 or 1 inside a torch.bool is undefined behaviour.
            stored = DataType.UINT8 if tensor.data_type == DataType.BOOL else tensor.data_type
            source = _elements(arena, layout.offset(job, expansion.source), stored, tensor.element_count)
            if tensor.data_type == DataType.BOOL:
                source = source != 0
            written = DataType.UINT8 if expansion.data_type == DataType.BOOL else expansion.data_type
            target = _elements(arena, layout.offset(job, expansion.target), written, template.plan.element_count)
            target.view(template.plan.result_shape).copy_(source.view(tensor.shape))


def round_outputs(arena: Tensor, layout: Layout) -> None:
    """Sum the outputs of jobs that are not direct back to their shapes, and round them to their types."""
    for job, template in enumerate(layout.templates):
        for rounding in template.roundings:
            tensor, plan = rounding.tensor, template.plan
            wide = _elements(arena, layout.offset(job, rounding.source), DataType.FLOAT64, plan.element_count)
            output = _elements(arena, layout.offset(job, rounding.target), tensor.data_type, tensor.element_count)
            if tensor.element_count != plan.element_count:
                wide = sum_to_shape(wide.view(plan.result_shape), tensor.shape)
            for start in range(0, tensor.element_count, _PIECE_ELEMENTS):
                values = wide[start : start + _PIECE_ELEMENTS]
                round_into(output[start : start + _PIECE_ELEMENTS], -values if rounding.is_negated else values)


def _elements(arena: Tensor, offset: int, data_type: DataType, count: int) -> Tensor:
    dtype: torch.dtype = TORCH_TYPES[data_type]
    return arena[offset : offset + count * data_type.itemsize].view(dtype)
