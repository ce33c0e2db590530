"""States of accumulations: the same bytes for any order, sharding and resumption; what cannot be a state is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_api import accumulation
from lossgrad_api.accumulation import Accumulation, LossFunction, LossTotal, StateError
from lossgrad_api.exact_sums import ExactSum
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.server.accumulating import LOSSES, functions, slices, state_of

TOTAL = LossTotal(ExactSum([3.0, 1e-20]), ExactSum([2.0]), 2, 0, 1.0, 2.0)


# ---- The same bytes, always ----


@given(st.data())
def test_any_partition_permutation_and_merge_tree_gives_the_same_bytes(data: st.DataObject) -> None:
    parts = data.draw(slices())
    expected = state_of(parts)
    expected.last_sequence = 0
    shuffled = data.draw(st.permutations(parts))
    shards: list[Accumulation] = []
    while shuffled:
        size = data.draw(st.integers(1, len(shuffled)))
        shards.append(state_of(list(shuffled[:size])))
        shuffled = shuffled[size:]
    shards.append(Accumulation(LOSSES))
    while len(shards) > 1:
        some = [
            shards.pop(data.draw(st.integers(0, len(shards) - 1)))
            for _ in range(data.draw(st.integers(1, len(shards))))
        ]
        shards.append(Accumulation.merge(some))
    merged = Accumulation.merge(shards)
    assert merged.to_bytes() == expected.to_bytes()


@given(slices(), st.integers(0, 10))
def test_a_state_that_was_stored_and_gone_on_from_gives_the_same_bytes(
    parts: list[tuple[str, int, list[LossTotal]]], cut: int
) -> None:
    stored = state_of(parts[:cut]).to_bytes()
    state = Accumulation.from_bytes(stored)
    for sequence, (group, element_count, own) in enumerate(parts[cut:], 1 + len(parts[:cut])):
        state.add(sequence, group, element_count, own)
    assert state.to_bytes() == state_of(parts).to_bytes()


@given(slices(loss_count=3), st.lists(functions, min_size=3, max_size=3))
def test_the_bytes_are_what_the_generated_classes_write(
    parts: list[tuple[str, int, list[LossTotal]]], losses: list[LossFunction]
) -> None:
    state = state_of(parts, tuple(losses))
    message = state.to_message()
    assert message.SerializeToString(deterministic=True) == state.to_bytes()
    assert Accumulation.from_message(message) == state
    assert [group.group for group in message.groups] == sorted({group for group, _, _ in parts}, key=str.encode)
    assert message.element_count == sum(element_count for _, element_count, _ in parts)
    assert message.last_sequence == len(parts)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=30))
def test_sums_that_nobody_normalised_mean_the_same(values: list[float]) -> None:
    """Another client may write any numbers whose exact sum is the total."""
    state = state_of([("", 1, [TOTAL, LossTotal(ExactSum(values), ExactSum(), 1, 0, 0.0, 0.0)])]).to_message()
    del state.groups[0].states[1].partial_sums[:]
    state.groups[0].states[1].partial_sums.extend(values)
    state.element_count = 2
    total = Accumulation.from_message(state).groups[""].totals[1]
    assert total.sum == math.fsum(values)


def test_a_copy_stays_as_it_was() -> None:
    state = state_of([("a", 2, [TOTAL, TOTAL])])
    copy = state.copy()
    before = copy.to_bytes()
    state.add(2, "a", 2, [TOTAL, TOTAL])
    state.add(3, "b", 2, [TOTAL, TOTAL])
    assert copy.to_bytes() == before
    assert state.to_bytes() != before
    assert copy != state


# ---- What the totals say ----


def test_the_totals_give_sum_mean_and_weights() -> None:
    total = LossTotal(ExactSum([1.0, 2.0, 4.0]), ExactSum([0.5, 1.5]), 3, 0, 1.0, 4.0)
    assert (total.sum, total.weight_sum, total.mean, total.mean_over(10.0)) == (7.0, 2.0, 3.5, 0.7)
    nothing = LossTotal()
    assert (nothing.sum, nothing.weight_sum, nothing.min, nothing.max) == (0.0, 0.0, math.inf, -math.inf)
    assert math.isnan(nothing.mean)


def test_totals_over_all_groups() -> None:
    state = state_of([("a", 2, [TOTAL, TOTAL]), ("b", 2, [TOTAL, LossTotal()]), ("a", 5, [TOTAL, TOTAL])])
    smooth_l1, mse = state.overall
    assert (smooth_l1.element_count, mse.element_count) == (6, 4)
    assert (smooth_l1.sum, mse.sum) == (9.0, 6.0)
    assert state.element_count == 9
    assert repr(state) == "Accumulation(smooth_l1(beta=0.5), mse: 2 groups, 9 elements, last_sequence 3)"


def test_zeros_of_both_signs_are_one_extreme() -> None:
    minus, plus = LossTotal(min=-0.0, max=-0.0, element_count=1), LossTotal(min=0.0, max=0.0, element_count=1)
    for total in (minus + plus, plus + minus, minus + minus):
        assert math.copysign(1.0, total.min) == math.copysign(1.0, total.max) == 1.0


def test_the_losses_have_their_defaults_filled_in() -> None:
    assert LossFunction.from_message(pb.LossSpec(smooth_l1=pb.SmoothL1Loss())) == ("smooth_l1", 1.0)
    assert LossFunction.from_message(pb.LossSpec(huber=pb.HuberLoss(delta=2.0), include_gradient=True)) == (
        "huber",
        2.0,
    )
    assert str(LossFunction("huber", 2.0)) == "huber(delta=2.0)"
    assert str(LossFunction("l1")) == "l1"


# ---- What is refused ----


def refusal(message: pb.Accumulation | bytes, max_groups: int | None = None) -> StateError:
    data = message if isinstance(message, bytes) else message.SerializeToString()
    with pytest.raises(StateError) as caught:
        Accumulation.from_bytes(data, max_groups=max_groups)
    return caught.value


def good() -> pb.Accumulation:
    state = state_of([("a", 2, [TOTAL, TOTAL]), ("b", 2, [TOTAL, TOTAL])])
    return state.to_message()


def set_state(**values: object) -> Callable[[pb.Accumulation], None]:
    def change(message: pb.Accumulation) -> None:
        state = message.groups[1].states[0]
        for name, value in values.items():
            if isinstance(value, list):
                del getattr(state, name)[:]
                getattr(state, name).extend(value)
            else:
                setattr(state, name, value)

    return change


def set_own(**values: object) -> Callable[[pb.Accumulation], None]:
    def change(message: pb.Accumulation) -> None:
        for name, value in values.items():
            setattr(message, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "field", "text"),
    [
        (set_state(partial_sums=[1.0, math.nan]), "groups[1].states[0].partial_sums", "must stand alone"),
        (set_state(partial_sums=[math.inf, -math.inf]), "groups[1].states[0].partial_sums", "must stand alone"),
        (
            set_state(partial_sums=[1.0] * 65),
            "groups[1].states[0].partial_sums",
            "has 65 numbers; no sum needs more than 64",
        ),
        (set_state(weight_partial_sums=[1.0] * 65), "groups[1].states[0].weight_partial_sums", "has 65 numbers"),
        (set_state(weight_partial_sums=[math.nan, 2.0]), "groups[1].states[0].weight_partial_sums", "must stand alone"),
        (
            set_state(weight_sum=3.0),
            "groups[1].states[0].weight_sum",
            "is 3.0; it must be the sum of weight_partial_sums, 2.0",
        ),
        (set_state(element_count=-1), "groups[1].states[0].element_count", "is -1; it must be 0 to"),
        (set_state(element_count=(1 << 62) + 1), "groups[1].states[0].element_count", "it must be 0 to"),
        (set_state(element_count=0), "groups[1].states[0].element_count", "above 0 where there are sums"),
        (set_state(nonfinite_count=-1), "groups[1].states[0].nonfinite_count", "is -1"),
        (
            set_state(nonfinite_count=3),
            "groups[1].states[0].nonfinite_count",
            "is 3; it must be 0 to element_count, which is 2",
        ),
        (set_state(min=2.5), "groups[1].states[0].min", "is 2.5; it must be at most max, which is 2.0"),
        (set_state(min=math.nan), "groups[1].states[0].min", "is nan"),
        (set_state(max=math.nan), "groups[1].states[0].min", "max, which is nan"),
        (set_state(max=-math.inf), "groups[1].states[0].min", "max, which is -inf"),
        (set_own(last_sequence=-1), "last_sequence", "is -1; it must be at least 0"),
        (set_own(element_count=-1), "element_count", "is -1"),
        (set_own(element_count=3), "element_count", "is 3; it must be what its groups hold, 4, to"),
        (lambda message: message.groups.append(message.groups[0]), "groups[2]", "'a', which comes twice"),
        (
            lambda message: setattr(message.groups[0], "group", "é" * 65),
            "groups[0].group",
            "has 130 bytes; at most 128",
        ),
        (lambda message: message.groups[0].states.pop(), "groups[0].states", "has 1 states, but there are 2 losses"),
        (lambda message: message.specs.pop(), "groups[0].states", "has 2 states, but there are 1 losses"),
        (lambda message: message.specs.extend(list(message.specs) * 8), "specs", "is of 18 losses; it must be 1 to 16"),
        (lambda message: message.ClearField("specs"), "specs", "is of 0 losses"),
        (lambda message: message.specs.append(pb.LossSpec()), "specs[2].function", "names no loss"),
        (
            lambda message: setattr(message.specs[0].smooth_l1, "beta", -1.0),
            "specs[0]",
            "beta is -1.0; it must be at least 0",
        ),
        (
            lambda message: setattr(message.specs[0].huber, "delta", math.nan),
            "specs[0]",
            "delta is nan; it must be above 0",
        ),
    ],
)
def test_what_cannot_be_a_state_is_refused(change: Callable[[pb.Accumulation], None], field: str, text: str) -> None:
    message = good()
    change(message)
    error = refusal(message)
    assert error.field == field
    assert text in str(error)


def test_a_state_with_too_many_groups_is_refused_before_they_are_read() -> None:
    error = refusal(good(), max_groups=1)
    assert isinstance(error, accumulation.TooManyGroups)
    assert str(error) == "the state has more than 1 groups, the most that are taken"
    assert Accumulation.from_bytes(good().SerializeToString(), max_groups=2).element_count == 4


def test_a_group_larger_than_any_can_be_is_refused_before_it_is_parsed() -> None:
    group = pb.GroupState(group="a", states=[pb.LossState(partial_sums=[1.0] * 3000)])
    error = refusal(pb.Accumulation(groups=[group]))
    assert error.field == "groups[0]"
    assert str(accumulation.MAX_GROUP_BYTES) in str(error)


def test_the_largest_group_that_can_be_fits_the_bound() -> None:
    sums = ExactSum([1.7976931348623157e308] * 15 + [2.0**exponent for exponent in range(969, -1075, -54)])
    total = LossTotal(sums, sums, 1 << 62, 1 << 62, 1e-300, 1e300)
    state = Accumulation([LossFunction("smooth_l1", 0.1)] * 16)
    state.add(1, "g" * 128, 1 << 62, [total] * 16)
    assert len(sums.partials) > 50
    assert len(state.to_bytes()) > 14_000
    assert Accumulation.from_bytes(state.to_bytes()) == state


def test_a_head_larger_than_any_can_be_is_refused_before_it_is_parsed() -> None:
    specs = pb.Accumulation(specs=[pb.LossSpec()] * 40_000)
    assert "more than 65536 bytes beside its groups" in str(refusal(specs))


@given(st.binary(max_size=60))
def test_bytes_that_are_no_state_are_refused_with_a_state_error(data: bytes) -> None:
    for garbage in (data, good().SerializeToString() + data, good().SerializeToString()[: len(data)]):
        try:
            state = Accumulation.from_bytes(garbage)
        except StateError:
            continue
        assert Accumulation.from_bytes(state.to_bytes()) == state


def test_states_of_other_losses_do_not_merge() -> None:
    with pytest.raises(StateError, match=r"smooth_l1\(beta=0.5\), mse, another of l1; merge states of the same losses"):
        Accumulation.merge([Accumulation(LOSSES), Accumulation([LossFunction("l1")])])
    with pytest.raises(StateError, match="no state to merge"):
        Accumulation.merge([])
    with pytest.raises(StateError, match="element_count"):
        Accumulation.merge([Accumulation(LOSSES, element_count=1 << 62), Accumulation(LOSSES, element_count=1)])


def test_slices_are_numbered_ascending_from_1() -> None:
    state = Accumulation(LOSSES)
    with pytest.raises(StateError, match="slice 0 comes after slice 0"):
        state.add(0, "", 2, [TOTAL, TOTAL])
    state.add(7, "", 2, [TOTAL, TOTAL])
    with pytest.raises(StateError, match="slice 7 comes after slice 7; number slices ascending, from 1"):
        state.add(7, "", 2, [TOTAL, TOTAL])
    assert state.last_sequence == 7
    assert state.element_count == 2
