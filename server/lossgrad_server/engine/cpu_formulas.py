"""The four losses as one formula, so that one kernel computes them all, and its factors for each of them.

With d = input - target:

    p = clamp(d * scale, -limit, limit)
    loss * divisor = p * (d - half * p)
    derivative * divisor = slope * p below the limit; derivative = +-edge at it

This is g = clamp(d / beta, -1, 1), loss = g * (d - beta * g / 2) with its factors moved to where they are applied once
and not for every element. Multiplying by `scale`, a power of two, is exact. Nothing overflows or underflows before the
result does, for the reasons given at each loss.

`special_loss` and `special_derivative` say what the formula does not: what becomes of NaN and infinity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from lossgrad_server.jobs import LossKind, SpecPlan

# Float32 differences, 2^-149 to 2^128, are computed with in float64, where their squares and their products with these
# bounds are exact enough and far from overflow. A limit of FAR is beyond all of them, one of NEAR below them all.
FAR: Final = 2.0**240
NEAR: Final = 2.0**-240


@dataclass(frozen=True, slots=True)
class Factors:
    """The factors of one spec. The formula's `scale` is `scale * second_scale`: it may be beyond what one float64 holds."""

    limit: float
    divisor: float
    slope: float = 1.0
    edge: float = 1.0
    half: float = 0.5
    scale: float = 1.0
    second_scale: float = 1.0


def factors(spec: SpecPlan, *, is_float64: bool) -> Factors:
    """Return the factors of a spec, for differences in float64 or in float32."""
    is_l1 = spec.kind == LossKind.L1 or (spec.kind == LossKind.SMOOTH_L1 and spec.parameter == 0)
    if is_l1:
        return _l1_float64() if is_float64 else Factors(limit=NEAR, divisor=NEAR)
    match spec.kind:
        case LossKind.SMOOTH_L1:
            return _smooth_l1_float64(spec.parameter) if is_float64 else _smooth_l1_float32(spec.parameter)
        case LossKind.HUBER:
            # p is the gradient itself: nothing is scaled that would have to be divided out.
            limit = spec.parameter if is_float64 else min(spec.parameter, FAR)
            return Factors(limit=limit, divisor=1.0, edge=spec.parameter)
        case _:
            # In float64, loss = p * d with p = d: half of it, as below, would be finite where the loss overflows.
            return Factors(math.inf, divisor=1.0, slope=2.0, half=0.0) if is_float64 else Factors(FAR, divisor=0.5)


def _smooth_l1_float32(beta: float) -> Factors:
    # p = clamp(d, -beta, beta): loss * beta = p * (d - p / 2). A beta below NEAR is an L1 loss to the last bit of a
    # float64; a p beyond FAR there is none.
    divisor = max(beta, NEAR)
    return Factors(limit=min(divisor, FAR), divisor=divisor)


def _smooth_l1_float64(beta: float) -> Factors:
    # Squares of float64 differences may overflow and underflow, so p is g times a limit in (1/2, 1].
    if math.isinf(beta):
        return Factors(limit=1.0, divisor=1.0, half=0.0, scale=0.0)
    limit, exponent = math.frexp(beta)
    if limit == 0.5:
        limit, exponent = 1.0, exponent - 1
    first = max(exponent, -1022)  # the scale of a subnormal beta is beyond what one float64 holds
    return Factors(
        limit=limit,
        divisor=limit,
        half=math.ldexp(1.0, exponent - 1),  # half * p = p / scale / 2
        scale=math.ldexp(1.0, -first),
        second_scale=math.ldexp(1.0, first - exponent),
    )


def _l1_float64() -> Factors:
    # p is +-1 for the smallest difference, 2^-1074, and 0 for 0.
    return Factors(limit=1.0, divisor=1.0, half=0.0, scale=2.0**600, second_scale=2.0**600)
