"""States and slices for the tests of accumulation, as hypothesis makes them."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import strategies as st

from lossgrad_api.accumulation import Accumulation, LossFunction, LossTotal
from lossgrad_api.exact_sums import ExactSum

LOSSES = (LossFunction("smooth_l1", 0.5), LossFunction("mse"))

numbers = st.one_of(
    st.floats(0, 1e6), st.floats(-1e300, 1e300), st.sampled_from([math.inf, -math.inf, math.nan, -0.0, 5e-324])
)
functions = st.one_of(
    st.builds(LossFunction, st.just("smooth_l1"), st.floats(0)),
    st.builds(LossFunction, st.just("huber"), st.floats(0, exclude_min=True)),
    st.sampled_from([LossFunction("l1"), LossFunction("mse")]),
)


@st.composite
def totals(draw: Any) -> LossTotal:
    """Return the total of a few elements' losses, each of which is a partial of its own."""
    losses = draw(st.lists(numbers, max_size=4))
    weights = draw(st.lists(st.floats(0, 1e6), min_size=len(losses), max_size=len(losses)))
    ordered = [loss for loss in losses if not math.isnan(loss)]
    return LossTotal(
        ExactSum(losses),
        ExactSum(weights),
        len(losses),
        sum(not math.isfinite(loss) for loss in losses),
        min(ordered, default=math.inf) + 0.0,
        max(ordered, default=-math.inf) + 0.0,
    )


def slices(
    loss_count: int = len(LOSSES), max_size: int = 10
) -> st.SearchStrategy[list[tuple[str, int, list[LossTotal]]]]:
    """Return slices as (group, elements, a total of each loss)."""

    def with_elements(group: str, masked: int, own: list[LossTotal]) -> tuple[str, int, list[LossTotal]]:
        return group, masked + max(total.element_count for total in own), own

    one = st.builds(
        with_elements,
        st.sampled_from(["", "a", "b", "é"]),
        st.integers(0, 3),
        st.lists(totals(), min_size=loss_count, max_size=loss_count),
    )
    return st.lists(one, max_size=max_size)


def state_of(slices: list[tuple[str, int, list[LossTotal]]], losses: tuple[LossFunction, ...] = LOSSES) -> Accumulation:
    """Return the state of one stream of slices, numbered from 1."""
    state = Accumulation(losses)
    for sequence, (group, element_count, own) in enumerate(slices, 1):
        state.add(sequence, group, element_count, own)
    return state
