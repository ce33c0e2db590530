"""NaN and infinity: what the formula of the fast loops does not get right, element by element.

A chunk whose partial sum is finite holds neither, since no loss of a NaN or an infinity is finite; so only chunks whose
sum is not are computed again, here. Elements that the fast loops got right keep their bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_blocks import clamp
from lossgrad_server.engine.cpu_intrinsics import array_at, fused_multiply_add
from lossgrad_server.engine.cpu_layout import (
    BLOCK,
    MASK,
    SCRATCH_DIFFERENCE,
    SCRATCH_GRADIENT,
    SCRATCH_LOSS,
    SCRATCH_MASK,
    SCRATCH_SCALE,
    SCRATCH_SPECIAL,
    SCRATCH_WEIGHT,
    SPEC_DIVISOR,
    SPEC_EDGE,
    SPEC_FACTOR,
)
from lossgrad_server.engine.cpu_native import inlined, native
from lossgrad_server.engine.cpu_tables import frame_at, job_of, spec_of, spec_state
from lossgrad_server.jobs import LossKind

_SMOOTH_L1, _HUBER, _L1, _MSE = (int(kind) for kind in LossKind)


@inlined
def special_loss(kind: Any, parameter: Any, d: Any) -> Any:
    """Return the loss of a difference that is NaN or infinite."""
    if (kind == _SMOOTH_L1 or kind == _HUBER) and np.isinf(parameter):
        # The formula's "elsewhere", inf - 0.5 inf.
        return np.nan
    return abs(d)


@inlined
def derivative(kind: Any, parameter: Any, d: Any) -> Any:
    """Return the derivative of the loss for any difference."""
    if kind == _MSE:
        return 2.0 * d
    if kind == _HUBER:
        return clamp(d, parameter)
    if kind == _SMOOTH_L1 and parameter > 0:
        if np.isinf(parameter):
            return np.sign(d) if np.isinf(d) else d * 0.0
        return clamp(d / parameter, 1.0)
    # L1: 0 at NaN, as torch has it.
    return 0.0 if np.isnan(d) else np.sign(d)


@native("int64(int64, int64, int64)")
def recompute_block(address: int, index: int, count: int) -> int:
    """Compute a block's losses and gradients of one spec again, from the differences and weights in scratch memory.

    They go to scratch memory as float64. Leaves at SCRATCH_SPECIAL the sum of the terms that are not finite, how many
    those are, and how many losses are not finite; a term is a loss times its weight. NaN is always the same one.
    """
    frame = frame_at(address)
    job = job_of(frame)
    spec = spec_of(frame, index)
    own = spec_state(frame, index)
    factor, edge, divisor = own[SPEC_FACTOR], own[SPEC_EDGE], own[SPEC_DIVISOR]
    scratch = frame.scratch
    differences = array_at(scratch + SCRATCH_DIFFERENCE, BLOCK, np.float64)
    weights = array_at(scratch + SCRATCH_WEIGHT, BLOCK, np.float64)
    gradient_weights = array_at(scratch + (SCRATCH_SCALE if spec.divides_rows else SCRATCH_WEIGHT), BLOCK, np.float64)
    mask = array_at(scratch + SCRATCH_MASK, BLOCK, np.uint8)
    gradients = array_at(scratch + SCRATCH_GRADIENT, BLOCK, np.float64)
    losses = array_at(scratch + SCRATCH_LOSS, BLOCK, np.float64)
    has_mask = job.types[MASK] != 0
    total = 0.0
    term_count = 0
    loss_count = 0
    for j in range(count):
        if has_mask and mask[j] == 0:
            gradients[j] = 0.0
            losses[j] = 0.0
            continue
        d = differences[j]
        p = clamp(d * spec.scale * spec.second_scale, spec.limit)
        if np.isfinite(d):
            loss = abs(p * fused_multiply_add(-spec.half, p, d))
        else:
            loss = special_loss(spec.kind, spec.parameter, d)
        if not np.isfinite(loss):
            loss_count += 1
        term = loss * weights[j]
        if not np.isfinite(term):
            total += term
            term_count += 1
        if np.isfinite(d) and np.isfinite(factor) and np.isfinite(gradient_weights[j]):
            if job.is_float64 and abs(p) >= spec.limit:
                gradient = edge if p > 0 else -edge
            else:
                gradient = p * factor
            gradient = gradient * gradient_weights[j]
        else:
            slope = derivative(spec.kind, spec.parameter, d)
            gradient = slope * gradient_weights[j] * spec.gradient_scale / divisor
        gradients[j] = np.nan if np.isnan(gradient) else gradient
        losses[j] = np.nan if np.isnan(term) else term
    special = array_at(scratch + SCRATCH_SPECIAL, 3, np.float64)
    special[0] = total
    special[1] = term_count
    special[2] = loss_count
    return 0
