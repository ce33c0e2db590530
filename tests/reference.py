"""What lossgrad's answer to a job must be: slow, and obviously right, for every engine to be held against.

Independent of the engines: numpy holds the arrays, and every number comes from the textbook formula in exact rational
arithmetic, rounded once to float64. Sums are exact (math.fsum). `rounded` gives what a data type can hold of a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any

import numpy as np

from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, Role, SpecPlan, TensorPlan
from lossgrad_server.work import SPEC_RESULT, Buffer, SpecTotal, WorkResult

Array = np.ndarray[Any, np.dtype[Any]]
Float64Array = np.ndarray[Any, np.dtype[np.float64]]

_NUMPY_TYPES = {
    DataType.FLOAT16: np.float16,
    DataType.FLOAT32: np.float32,
    DataType.FLOAT64: np.float64,
    DataType.INT64: np.int64,
    DataType.INT32: np.int32,
    DataType.INT16: np.int16,
    DataType.INT8: np.int8,
    DataType.UINT8: np.uint8,
}
# The elements of which a sum has one number.
CHUNK = 4096
# Bits of the significand, the smallest power of two held, the largest number held.
_FORMATS = {
    DataType.FLOAT16: (11, -24, 65504.0),
    DataType.BFLOAT16: (8, -133, float.fromhex("0x1.fep127")),
    DataType.FLOAT32: (24, -149, float.fromhex("0x1.fffffep127")),
}


@dataclass(frozen=True)
class SpecAnswer:
    """The answer to one spec, in float64. `loss` is a float for mean and sum. Gradients may be None."""

    loss: float | Float64Array
    element_count: int
    weight_sum: float
    nonfinite_count: int
    input_gradient: Float64Array | None = None
    target_gradient: Float64Array | None = None


def answer(plan: JobPlan, operands: Sequence[Buffer]) -> list[SpecAnswer]:
    """Return the answer to each spec, not rounded to the data types of the outputs.

    The target's gradient is always there where the input's is, whether or not the plan sends it.
    """
    elements = _elements(plan, operands)
    return [_answer_spec(plan, spec, *elements) for spec in plan.specs]


def _elements(plan: JobPlan, operands: Sequence[Buffer]) -> tuple[Float64Array, Float64Array, Array]:
    """Return the elements' differences, weights and masks, in the result's shape."""
    arrays = [decode(buffer, tensor) for buffer, tensor in zip(operands, plan.operands, strict=True)]
    shape = plan.result_shape
    differences = _differences(arrays[0], arrays[1], plan.result_type)
    weight = arrays[2] if plan.weight is not None else np.ones(())
    mask = arrays[-1] != 0 if plan.mask is not None else np.ones((), np.bool_)
    return differences, np.broadcast_to(weight.astype(np.float64), shape), np.broadcast_to(mask, shape)


def totals(plan: JobPlan, operands: Sequence[Buffer]) -> list[SpecTotal]:
    """Return the totals of each spec: every element's loss, and every chunk's sum, rounded once."""
    differences, weights, masks = (values.ravel() for values in _elements(plan, operands))
    chunks = [np.flatnonzero(masks[start : start + CHUNK]) + start for start in range(0, len(masks), CHUNK)]
    answers: list[SpecTotal] = []
    for spec in plan.specs:
        losses = {
            index: product(element(spec.kind, spec.parameter, float(differences[index]))[0], float(weights[index]))
            for index in np.concatenate([*chunks, np.empty(0, np.int64)]).tolist()
        }
        ordered = [loss + 0.0 for loss in losses.values() if not math.isnan(loss)]
        answers.append(
            SpecTotal(
                min(ordered, default=math.inf),
                max(ordered, default=-math.inf),
                exact_partials(exact_sum(losses[index] for index in chunk.tolist()) for chunk in chunks),
                exact_partials(exact_sum(weights[chunk].tolist()) for chunk in chunks),
            )
        )
    return answers


def merged(parts: Sequence[SpecTotal]) -> SpecTotal:
    """Return the total of several parts."""
    return SpecTotal(
        min(part.minimum for part in parts),
        max(part.maximum for part in parts),
        exact_partials(chain.from_iterable(part.partials for part in parts)),
        exact_partials(chain.from_iterable(part.weight_partials for part in parts)),
    )


def exact_partials(terms: Iterable[float]) -> tuple[float, ...]:
    """Return a sum as SpecTotal has it: the float64 nearest to it, the one nearest to what that leaves, and so on."""
    terms = list(terms)
    special = [term for term in terms if not math.isfinite(term)]
    if special:
        return (sum(special),)
    left = sum(map(Fraction, terms), Fraction())
    partials: list[float] = []
    while left:
        partials.append(rounded_fraction(left))
        if math.isinf(partials[-1]):
            return (partials[-1],)
        left -= Fraction(partials[-1])
    return tuple(partials)


def _answer_spec(
    plan: JobPlan, spec: SpecPlan, differences: Float64Array, weights: Float64Array, masks: Array
) -> SpecAnswer:
    shape = plan.result_shape
    losses = np.zeros(shape)
    derivatives = np.zeros(shape)
    gradients = np.zeros(shape)
    nonfinite_count = 0
    groups: dict[int, list[tuple[int, ...]]] = {}  # the unmasked elements that are reduced together
    for sample in range(shape[0]) if spec.reduction.is_per_sample else [0]:
        groups[sample] = []
    for index in np.ndindex(shape):
        if masks[index]:
            loss, derivative = element(spec.kind, spec.parameter, float(differences[index]))
            nonfinite_count += not math.isfinite(loss)
            losses[index] = product(loss, float(weights[index]))
            derivatives[index] = derivative
            gradients[index] = product(derivative, float(weights[index]), spec.gradient_scale)
            groups[index[0] if spec.reduction.is_per_sample else 0].append(index)

    totals: list[float] = []
    for indices in groups.values():
        total = exact_sum(float(losses[index]) for index in indices)
        if spec.reduction.is_mean:
            divisor = spec.denominator
            if divisor is None:
                divisor = exact_sum(float(weights[index]) for index in indices)
            total = quotient(total, divisor)
            for index in indices:
                factors = (float(derivatives[index]), float(weights[index]), spec.gradient_scale)
                gradients[index] = quotient_of_product(factors, divisor)
        totals.append(total)

    result: float | Float64Array
    if spec.reduction == Reduction.NONE:
        result = losses
    else:
        result = totals[0] if spec.reduction.is_scalar else np.array(totals, np.float64)
    unmasked = [index for indices in groups.values() for index in indices]
    return SpecAnswer(
        loss=result,
        element_count=len(unmasked),
        weight_sum=exact_sum(float(weights[index]) for index in unmasked),
        nonfinite_count=nonfinite_count,
        input_gradient=sum_back(gradients, plan.input.shape) if spec.include_gradient else None,
        target_gradient=-sum_back(gradients, plan.target.shape) if spec.include_gradient else None,
    )


def element(kind: LossKind, parameter: float, d: float) -> tuple[float, float]:
    """Return the loss of one element with difference `d`, and its derivative, each rounded once."""
    if kind == LossKind.SMOOTH_L1 and parameter == 0:
        kind = LossKind.L1
    sign = float(np.sign(d))
    if math.isnan(d):
        return math.nan, 0.0 if kind == LossKind.L1 else math.nan
    if math.isinf(d):
        # beta = inf and delta = inf: "elsewhere" of the formula, inf - inf.
        loss = math.nan if kind in (LossKind.SMOOTH_L1, LossKind.HUBER) and math.isinf(parameter) else math.inf
        slope = {LossKind.HUBER: parameter, LossKind.MSE: math.inf}.get(kind, 1.0)
        return loss, sign * slope
    x = Fraction(d)
    if kind == LossKind.L1:
        return abs(d), sign
    if kind == LossKind.MSE:
        return rounded_fraction(x * x), rounded_fraction(2 * x)
    if math.isinf(parameter):
        return (0.0, 0.0) if kind == LossKind.SMOOTH_L1 else (rounded_fraction(x * x / 2), d)
    bound = Fraction(parameter)
    if kind == LossKind.SMOOTH_L1:
        if abs(x) < bound:
            return rounded_fraction(x * x / (2 * bound)), rounded_fraction(x / bound)
        return rounded_fraction(abs(x) - bound / 2), sign
    if abs(x) < bound:
        return rounded_fraction(x * x / 2), d
    return rounded_fraction(bound * (abs(x) - bound / 2)), sign * parameter


def _differences(input: Array, target: Array, result_type: DataType) -> Float64Array:
    """Return input - target, subtracted in float64 if that is the type they promote to, in float32 otherwise."""
    dtype = np.float64 if result_type == DataType.FLOAT64 else np.float32
    with np.errstate(all="ignore"):
        return np.asarray(input.astype(dtype) - target.astype(dtype)).astype(np.float64)


def sum_back(values: Float64Array, shape: tuple[int, ...]) -> Float64Array:
    """Sum a result's values back to the shape of an operand that was broadcast to it."""
    terms: dict[tuple[int, ...], list[float]] = {index: [] for index in np.ndindex(shape)}
    for index in np.ndindex(values.shape):
        own = index[values.ndim - len(shape) :]
        terms[tuple(0 if extent == 1 else i for i, extent in zip(own, shape, strict=True))].append(float(values[index]))
    result = np.zeros(shape)
    for index, of_index in terms.items():
        result[index] = exact_sum(of_index)
    return result


def exact_sum(values: Iterable[float]) -> float:
    """Return the sum, rounded once."""
    values = [float(value) for value in values]
    special = [value for value in values if not math.isfinite(value)]
    if special:
        return sum(special)
    try:
        return math.fsum(values)
    except OverflowError:
        return rounded_fraction(sum(map(Fraction, values), Fraction()))


def product(*factors: float) -> float:
    """Return the product, rounded once; as IEEE 754 has it where a factor is not finite."""
    if all(map(math.isfinite, factors)):
        return rounded_fraction(math.prod(map(Fraction, map(float, factors)), start=Fraction(1)))
    return math.prod(map(float, factors))


def quotient(dividend: float, divisor: float) -> float:
    """Return dividend / divisor as IEEE 754 has it."""
    with np.errstate(all="ignore"):
        return float(np.float64(dividend) / np.float64(divisor))


def quotient_of_product(factors: Sequence[float], divisor: float) -> float:
    """Return the factors' product over the divisor, rounded once; as IEEE 754 has it where one is not finite, or 0."""
    if divisor != 0 and math.isfinite(divisor) and all(map(math.isfinite, factors)):
        exact = math.prod(map(Fraction, map(float, factors)), start=Fraction(1)) / Fraction(divisor)
        return rounded_fraction(exact)
    return quotient(product(*factors), divisor)


def rounded_fraction(value: Fraction) -> float:
    """Return the float64 nearest to a fraction, infinite where that overflows."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def rounded(values: float | Array, data_type: DataType) -> Float64Array:
    """Return float64 values rounded once, to nearest even, to what the data type holds."""
    array = np.asarray(values, np.float64)
    if data_type == DataType.FLOAT64:
        return array
    *_, largest = _FORMATS[data_type]
    with np.errstate(all="ignore"):
        unit = spacing(array, data_type)
        result = np.where(np.isfinite(array), np.rint(array / unit) * unit, array)
        return np.asarray(np.where(np.abs(result) > largest, np.copysign(np.inf, result), result))


def spacing(values: float | Array, data_type: DataType) -> Float64Array:
    """Return the distance between the data type's numbers at the values' magnitude (one ulp)."""
    array = np.abs(np.asarray(values, np.float64))
    if data_type == DataType.FLOAT64:
        return np.asarray(np.spacing(np.minimum(array, np.finfo(np.float64).max)))
    bits, smallest_exponent, _ = _FORMATS[data_type]
    _, exponent = np.frexp(array)
    return np.asarray(
        np.ldexp(1.0, np.where(array > 0, np.maximum(exponent - bits, smallest_exponent), smallest_exponent))
    )


def decode(data: Buffer, tensor: TensorPlan) -> Array:
    """Return a tensor's bytes as an array; bfloat16 as float32, which holds it exactly; bool as 0 and 1."""
    data = bytes(data)
    if tensor.data_type == DataType.BFLOAT16:
        flat = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    elif tensor.data_type == DataType.BOOL:
        flat = (np.frombuffer(data, np.uint8) != 0).astype(np.uint8)
    else:
        flat = np.frombuffer(data, _NUMPY_TYPES[tensor.data_type])
    return flat.reshape(tensor.shape)


def encode(values: Any, data_type: DataType) -> bytes:
    """Return values as the bytes of a tensor of that type, each rounded once."""
    if data_type == DataType.BOOL:
        return np.asarray(values, np.bool_).tobytes()
    if not data_type.is_floating_point:
        return np.asarray(values).astype(_NUMPY_TYPES[data_type]).tobytes()
    array = rounded(values, data_type)
    with np.errstate(all="ignore"):
        if data_type == DataType.BFLOAT16:
            return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return array.astype(_NUMPY_TYPES[data_type]).tobytes()


def unpack(plan: JobPlan, result: WorkResult) -> list[SpecAnswer]:
    """Return a worker's result as answers, so that the two can be compared. Checks each output's length."""
    assert len(result.scalars) == SPEC_RESULT.size * len(plan.specs)
    outputs: dict[tuple[int, Role], Float64Array] = {}
    for output, data in zip(plan.outputs, result.outputs, strict=True):
        assert memoryview(data).nbytes == output.tensor.byte_count
        outputs[output.spec_index, output.role] = decode(data, output.tensor).astype(np.float64)
    answers: list[SpecAnswer] = []
    for index, (scalar, element_count, weight_sum, nonfinite) in enumerate(SPEC_RESULT.iter_unpack(result.scalars)):
        if not plan.specs[index].reduction.is_scalar:
            assert scalar == 0.0
        answers.append(
            SpecAnswer(
                loss=outputs.get((index, Role.LOSS), scalar),
                element_count=element_count,
                weight_sum=weight_sum,
                nonfinite_count=nonfinite,
                input_gradient=outputs.get((index, Role.INPUT_GRADIENT)),
                target_gradient=outputs.get((index, Role.TARGET_GRADIENT)),
            )
        )
    return answers


def assert_matches(plan: JobPlan, operands: Sequence[Buffer], result: WorkResult, *, ulps: float = 4) -> None:
    """Fail unless a worker's result is the reference's, rounded once.

    Float64 numbers may be off by `ulps` (8 with a sum of several terms behind them); what is rounded to a narrower type
    must be the nearest number of that type, or within a 2^-16 of a tie.
    """
    for spec, got, expected in zip(plan.specs, unpack(plan, result), answer(plan, operands), strict=True):
        context = f"{spec}"
        assert got.element_count == expected.element_count, context
        assert got.nonfinite_count == expected.nonfinite_count, context
        assert_close(got.weight_sum, expected.weight_sum, DataType.FLOAT64, ulps, context)
        assert_close(
            got.loss,
            expected.loss,
            DataType.FLOAT64 if spec.reduction.is_scalar else plan.result_type,
            ulps if spec.reduction == Reduction.NONE else 2 * ulps,
            context,
        )
        for name, tensor in (("input_gradient", plan.input), ("target_gradient", plan.target)):
            gradient: Float64Array | None = getattr(got, name)
            wanted: Float64Array | None = getattr(expected, name)
            if gradient is None:
                assert wanted is None or (name == "target_gradient" and not plan.sends_target_gradient), context
                continue
            assert wanted is not None
            assert_close(
                gradient, wanted, tensor.data_type, ulps, f"{name} of {context}", cancelled=_cancellation(plan, tensor)
            )


def _cancellation(plan: JobPlan, tensor: TensorPlan) -> float:
    """Return how much is summed into one element of a gradient: positive and negative terms may cancel."""
    return 0.0 if tensor.element_count == plan.element_count else plan.element_count / max(tensor.element_count, 1)


def assert_close(
    got_values: float | Array,
    expected_values: float | Array,
    data_type: DataType,
    ulps: float,
    context: str,
    *,
    cancelled: float = 0.0,
) -> None:
    """Fail unless the values are the expected ones, rounded once to the type, up to `ulps` of float64.

    `cancelled` terms of about the expected values' largest magnitude, or 1, may have been summed.
    """
    got, expected = np.asarray(got_values, np.float64), np.asarray(expected_values, np.float64)
    assert got.shape == expected.shape, context
    finite = np.isfinite(expected) & np.isfinite(rounded(expected, data_type))
    np.testing.assert_array_equal(got[~finite], rounded(expected, data_type)[~finite], err_msg=context)
    got, expected = got[finite], expected[finite]
    magnitude = max(chain([1.0], np.abs(expected).flat))
    allowed = ulps * spacing(expected, DataType.FLOAT64) + cancelled * magnitude * ulps * np.finfo(np.float64).eps
    if data_type != DataType.FLOAT64:
        allowed = allowed + spacing(expected, data_type) * (0.5 + 2.0**-17)
    wrong = ~(np.abs(got - expected) <= allowed)
    assert not wrong.any(), (
        f"{context}: got {got[wrong][:3]}, expected {expected[wrong][:3]} ({int(wrong.sum())} wrong)"
    )
