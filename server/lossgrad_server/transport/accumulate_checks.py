"""Checks what comes over an AccumulateLoss stream: its config, the state to go on from, its slices. Raises RequestError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from lossgrad_api import codec
from lossgrad_api.accumulation import LossFunction, StateError, TooManyGroups, check_group_name
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.errors import InvalidRequest, Reason, RequestError, TooLarge
from lossgrad_server.jobs import JobPlan, SpecPlan
from lossgrad_server.transport.checks import check_size, check_specs, malformed, plan_of
from lossgrad_server.work import WorkItem

# What a group takes in a state, at most: two sums in 56 numbers each and the rest of a LossState, for each loss.
_GROUP_BYTES: Final = 256
_LOSS_BYTES: Final = 1024


@dataclass(frozen=True, slots=True)
class CheckedConfig:
    """An AccumulationConfig without its state.

    `specs` are those of the slices: a mean whose gradient is asked for has its denominator. `shared` are the indices of
    those for which that is element_count.
    """

    specs: tuple[SpecPlan, ...]
    losses: tuple[LossFunction, ...]
    shared: tuple[int, ...]
    element_count: int | None
    snapshot_every_slices: int
    allow_broadcast: bool


def check_config(config: pb.AccumulationConfig) -> CheckedConfig:
    """Return a config as values."""
    try:
        specs = check_specs(config.specs)
    except RequestError as error:
        error.field = f"config.{error.field}"
        raise
    element_count = config.element_count if config.HasField("element_count") else None
    if element_count is not None and element_count < 0:
        raise _bad_value("config.element_count", element_count, "at least 0, or not set")
    if config.snapshot_every_slices < 0:
        raise _bad_value("config.snapshot_every_slices", config.snapshot_every_slices, "at least 0")
    shared: list[int] = []
    for index, spec in enumerate(specs):
        if spec.reduction.is_per_sample:
            raise InvalidRequest(
                f"config.specs[{index}].reduction is {spec.reduction.name.lower()}, which has no total; send none, mean "
                "or sum",
                reason=Reason.UNKNOWN_REDUCTION,
                field=f"config.specs[{index}].reduction",
            )
        if not (spec.reduction.is_mean and spec.include_gradient and spec.denominator is None):
            continue
        if element_count is None:
            raise InvalidRequest(
                f"config.specs[{index}] asks for the gradient of a mean, which divides by a number that only the last "
                "slice completes; set element_count, or the spec's denominator",
                reason=Reason.MISSING_FIELD,
                field="config.element_count",
            )
        shared.append(index)
    return CheckedConfig(
        # Without elements there is no gradient to divide.
        tuple(
            replace(spec, denominator=float(element_count)) if index in shared and element_count else spec
            for index, spec in enumerate(specs)
        ),
        tuple(LossFunction.from_message(spec) for spec in config.specs),
        tuple(shared),
        element_count,
        config.snapshot_every_slices,
        config.allow_broadcast,
    )


def check_losses(config: CheckedConfig, losses: Sequence[LossFunction]) -> None:
    """Check that a state is of the losses that the config names."""
    if tuple(losses) != config.losses:
        raise InvalidRequest(
            f"config.resume_from is a state of {', '.join(map(str, losses))}, but config.specs are "
            f"{', '.join(map(str, config.losses))}; go on with the losses that it was begun with, in their order",
            reason=Reason.BAD_STATE,
            field="config.resume_from.specs",
        )


def bad_state(error: StateError) -> RequestError:
    """Return what a caller is told whose `resume_from` cannot be a state."""
    path = f"config.resume_from.{error.field}".rstrip(".")
    if isinstance(error, TooManyGroups):
        return TooLarge(f"config.resume_from: {error}; use fewer", reason=Reason.TOO_MANY_GROUPS, field=path)
    message = f"config.resume_from: {error}; send a state as a server gave it"
    return InvalidRequest(message, reason=Reason.BAD_STATE, field=path)


class SliceChecker:
    """Checks the slices of one stream, in their order. Slices that differ in values only are checked once."""

    def __init__(
        self, config: CheckedConfig, *, last_sequence: int, element_count: int, max_message_bytes: int
    ) -> None:
        self._config = config
        self._last_sequence = 0
        self._held_sequence = last_sequence
        self._element_count = element_count
        self._max_message_bytes = max_message_bytes
        self._known: codec.KnownRequests[JobPlan] = codec.KnownRequests(codec.SLICE_LAYOUT)

    def is_held(self, part: codec.SliceView) -> bool:
        """Check a slice's number; return whether the state that the stream began with holds the slice already."""
        if part.sequence <= self._last_sequence:
            raise InvalidRequest(
                f"slice {part.sequence} comes after slice {self._last_sequence}; number the slices of a stream ascending, "
                "from 1",
                reason=Reason.BAD_SEQUENCE,
                field="slice.sequence",
            )
        self._last_sequence = part.sequence
        return part.sequence <= self._held_sequence

    def check(self, part: codec.SliceView) -> tuple[JobPlan, WorkItem]:
        """Return the slice's plan, and what the worker needs."""
        try:
            plan, item = self._check(part)
            self._count(plan)
            return plan, item
        except RequestError as error:
            error.message = f"slice {part.sequence}: {error.message}"
            error.field = error.field and f"slice.{error.field}"
            raise

    def _check(self, part: codec.SliceView) -> tuple[JobPlan, WorkItem]:
        known = self._known.find(part.data, part.start, part.end)
        if known is not None:
            plan, operands = known
            return plan, WorkItem(plan.header, operands)
        try:
            view = codec.split_slice(part.data, part.start, part.end)
            message = codec.parse_slice_header(part.data, part.start, part.end)
        except codec.CodecError as error:
            raise malformed(error) from None
        config = self._config
        plan = plan_of(config.specs, message, view, allow_broadcast=config.allow_broadcast, wants_totals=True)
        check_size(plan, self._max_message_bytes)
        self._check_shared(plan)
        if all(tensor.byte_count for tensor in plan.operands):  # otherwise there is no view to find for the empty one
            self._known.remember(part.data, part.start, part.end, plan)
        views = (view.input, view.target, view.weight, view.mask)
        present = (True, True, plan.weight is not None, plan.mask is not None)
        return plan, WorkItem(plan.header, tuple(view for view, there in zip(views, present, strict=True) if there))

    def _check_shared(self, plan: JobPlan) -> None:
        for index in self._config.shared[:1]:
            name = "weight" if plan.weight is not None else "mask" if plan.mask is not None else None
            if name is not None:
                raise InvalidRequest(
                    f"it has a {name}, but config.specs[{index}] asks for the gradient of a mean, which then divides by the "
                    f"sum of all slices' weights; set that spec's denominator to it, or send no {name}",
                    reason=Reason.MISSING_FIELD,
                    field=name,
                )

    def _count(self, plan: JobPlan) -> None:
        self._element_count += plan.element_count
        expected = self._config.element_count
        if expected is not None and self._element_count > expected:
            raise InvalidRequest(
                f"with it the slices hold {self._element_count} elements, but config.element_count is {expected}; send no "
                "more, or set what they hold",
                reason=Reason.ELEMENT_COUNT_MISMATCH,
            )

    def check_end(self) -> None:
        """Check that nothing is missing, once every slice was checked."""
        expected = self._config.element_count
        if expected is not None and self._element_count != expected:
            raise InvalidRequest(
                f"the slices hold {self._element_count} elements, but config.element_count is {expected}; send the rest, "
                "or set what they hold",
                reason=Reason.ELEMENT_COUNT_MISMATCH,
                field="config.element_count",
            )


class GroupChecker:
    """Bounds the groups of one stream, so that its state stays small and fits a message."""

    def __init__(self, groups: Sequence[str], loss_count: int, *, max_groups: int, max_message_bytes: int) -> None:
        self._groups = set(groups)
        self._max_groups = max_groups
        self._max_message_bytes = max_message_bytes
        self._fitting = max_message_bytes // (_GROUP_BYTES + _LOSS_BYTES * loss_count)

    def check(self, part: codec.SliceView) -> None:
        """Check a slice's group and count it in."""
        if part.group in self._groups:
            return
        try:
            check_group_name(part.group, "slice.group")
        except StateError as error:
            raise InvalidRequest(
                f"slice {part.sequence}: {error}; use shorter names", reason=Reason.BAD_PARAMETER, field="slice.group"
            ) from None
        count = len(self._groups)
        if count >= min(self._max_groups, self._fitting):
            limit = f"at most {self._max_groups} are taken"
            if self._fitting < self._max_groups:
                limit = f"a message of at most {self._max_message_bytes} bytes is sure to hold {self._fitting} of them"
            raise TooLarge(
                f"slice {part.sequence}: with group {part.group!r} there would be {count + 1} groups; {limit}; use fewer "
                "groups, or several streams",
                reason=Reason.TOO_MANY_GROUPS,
                field="slice.group",
            )
        self._groups.add(part.group)


def _bad_value(path: str, value: int, allowed: str) -> RequestError:
    return InvalidRequest(f"{path} is {value}; it must be {allowed}", reason=Reason.BAD_PARAMETER, field=path)
