"""The state of an accumulation, as values: totals of losses that add up to the same bytes in any order.

Server and client use these alike: the server adds slices, the client merges the states of several streams, processes or
checkpoints. On the wire they are lossgrad_api.v1.Accumulation. Nothing that is read here is trusted: what cannot be a
state is refused with a StateError, and what can be one is brought into the one form that its value has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from google.protobuf.message import DecodeError

from lossgrad_api.loss_totals import MAX_COUNT, LossFunction, LossTotal, StateError, refuse
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_api.wire import CodecError, read_length, read_tag, scalar_field, skip, varint

__all__ = [
    "MAX_GROUP_BYTES",
    "MAX_GROUP_NAME_BYTES",
    "MAX_LOSSES",
    "Accumulation",
    "AccumulationReader",
    "GroupTotals",
    "LossFunction",
    "LossTotal",
    "StateError",
    "TooManyGroups",
    "check_group_name",
]

MAX_LOSSES: Final = 16
MAX_GROUP_NAME_BYTES: Final = 128

# The most that a group may take on the wire. 16 losses, each sum in the most numbers that one can need, take 15.2 KiB.
MAX_GROUP_BYTES: Final = 16 * 1024

# All of a state beside its groups: the losses and two numbers.
_MAX_HEAD_BYTES: Final = 64 * 1024

_GROUP: Final = 2 << 3 | 2
_SPEC_TAG: Final = b"\x1a"


class TooManyGroups(StateError):
    """A state with more groups than are taken."""


class GroupTotals:
    """The totals of one group, one for each loss. Immutable; its bytes are made once."""

    __slots__ = ("_encoded", "group", "totals")

    def __init__(self, group: str, totals: tuple[LossTotal, ...]) -> None:
        self.group = group
        self.totals = totals
        self._encoded = b""

    def plus(self, totals: Sequence[LossTotal]) -> GroupTotals:
        """Return the group with more totals added, one for each loss."""
        return GroupTotals(self.group, tuple(own + more for own, more in zip(self.totals, totals, strict=True)))

    def encoded(self) -> bytes:
        """Return it as the field `groups` of an Accumulation, its tag and length included."""
        if not self._encoded:
            message = pb.GroupState(group=self.group, states=[total.to_message() for total in self.totals])
            body = message.SerializeToString(deterministic=True)
            self._encoded = bytes((_GROUP,)) + varint(len(body)) + body
        return self._encoded


class Accumulation:
    """The totals of some losses over slices, by group. `add` changes it; all that it holds is immutable.

    `last_sequence` is the number of the last slice of the stream that it belongs to, 0 where there is none and in a
    merged state. `element_count` counts the elements of all slices, masked ones included.
    """

    def __init__(
        self,
        losses: Sequence[LossFunction],
        groups: Iterable[GroupTotals] = (),
        *,
        last_sequence: int = 0,
        element_count: int = 0,
    ) -> None:
        self.losses = tuple(losses)
        self.last_sequence = last_sequence
        self.element_count = element_count
        self._groups = {totals.group: totals for totals in groups}

    @property
    def groups(self) -> Mapping[str, GroupTotals]:
        """The totals of each group, by its name."""
        return MappingProxyType(self._groups)

    @property
    def overall(self) -> tuple[LossTotal, ...]:
        """The totals over all groups, one for each loss."""
        overall = GroupTotals("", (LossTotal(),) * len(self.losses))
        for group in self._groups.values():
            overall = overall.plus(group.totals)
        return overall.totals

    def add(self, sequence: int, group: str, element_count: int, totals: Sequence[LossTotal]) -> None:
        """Count a slice in: its number, its elements (masked ones included), its total of each loss.

        Raises StateError where the number is not above `last_sequence`.
        """
        if sequence <= self.last_sequence:
            raise StateError(
                f"slice {sequence} comes after slice {self.last_sequence}; number slices ascending, from 1",
                "sequence",
            )
        known = self._groups.get(group)
        self._groups[group] = GroupTotals(group, tuple(totals)) if known is None else known.plus(totals)
        self.last_sequence = sequence
        self.element_count += element_count

    def copy(self) -> Accumulation:
        """Return a state that does not change when this one does."""
        copy = Accumulation(self.losses, last_sequence=self.last_sequence, element_count=self.element_count)
        copy._groups = dict(self._groups)
        return copy

    @classmethod
    def merge(cls, states: Iterable[Accumulation]) -> Accumulation:
        """Return the state of all slices that any of `states` holds, of which none may be held by two.

        Any order and any grouping gives the same bytes. Its `last_sequence` is 0: a stream that goes on from it numbers its
        slices anew. Raises StateError where the losses differ, or where there is no state.
        """
        merged: Accumulation | None = None
        for state in states:
            if merged is None:
                merged = cls(state.losses)
            elif state.losses != merged.losses:
                raise StateError(
                    f"one state is of {_names(merged.losses)}, another of {_names(state.losses)}; merge states of the "
                    "same losses in the same order",
                    "specs",
                )
            merged.element_count += state.element_count
            if merged.element_count > MAX_COUNT:
                refuse("element_count", merged.element_count, f"0 to {MAX_COUNT}")
            for name, totals in state.groups.items():
                known = merged._groups.get(name)
                merged._groups[name] = totals if known is None else known.plus(totals.totals)
        if merged is None:
            raise StateError("there is no state to merge; give at least one")
        return merged

    def __eq__(self, other: object) -> bool:
        """Return whether both are the same to the bit."""
        return isinstance(other, Accumulation) and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return (
            f"Accumulation({_names(self.losses)}: {len(self._groups)} groups, {self.element_count} elements, "
            f"last_sequence {self.last_sequence})"
        )

    def encoded_parts(self) -> Iterator[bytes]:
        """Give the parts of its message one by one, a group at a time: their join is `to_bytes()`."""
        yield scalar_field(1, self.last_sequence)
        for name in sorted(self._groups):
            yield self._groups[name].encoded()
        for loss in self.losses:
            spec = loss.to_message().SerializeToString(deterministic=True)
            yield _SPEC_TAG + varint(len(spec)) + spec
        yield scalar_field(4, self.element_count)

    def to_bytes(self) -> bytes:
        """Return it as a serialised lossgrad_api.v1.Accumulation. Equal states give equal bytes."""
        return b"".join(self.encoded_parts())

    @classmethod
    def from_bytes(cls, data: bytes, *, max_groups: int | None = None) -> Accumulation:
        """Return the state that a serialised lossgrad_api.v1.Accumulation holds. Raises StateError."""
        reader = AccumulationReader(data, max_groups=max_groups)
        for _ in reader.read():
            pass
        return reader.state()

    def to_message(self) -> pb.Accumulation:
        """Return it as a message."""
        return pb.Accumulation.FromString(self.to_bytes())

    @classmethod
    def from_message(cls, message: pb.Accumulation) -> Accumulation:
        """Return the state that a message holds. Raises StateError."""
        return cls.from_bytes(message.SerializeToString())


class AccumulationReader:
    """Reads a serialised Accumulation group by group, so that a large one can be read in turns.

    Make one, exhaust `read()`, then call `state()`. Both raise StateError. What is parsed at once is bounded: a group by
    MAX_GROUP_BYTES, all else by 64 KiB.
    """

    def __init__(self, data: bytes, start: int = 0, end: int | None = None, *, max_groups: int | None = None) -> None:
        self._data = data
        self._start = start
        self._end = len(data) if end is None else end
        self._max_groups = max_groups
        self._groups: dict[str, GroupTotals] = {}
        self._element_count = 0
        self._head = b""

    def read(self) -> Iterator[None]:
        """Read one group after the other; after each, others may have a turn."""
        data, position, end = self._data, self._start, self._end
        try:
            while position < end:
                begin = position
                tag, position = read_tag(data, position, end)
                if tag == _GROUP:
                    start, position = read_length(data, position, end)
                    self._read_group(start, position)
                    yield
                else:
                    position = skip(data, tag, position, end)
                    if len(self._head) + position - begin > _MAX_HEAD_BYTES:
                        raise StateError(f"the state has more than {_MAX_HEAD_BYTES} bytes beside its groups")
                    self._head += data[begin:position]
        except CodecError as error:
            raise StateError(f"the bytes are not a lossgrad_api.v1.Accumulation: {error}") from None

    def _read_group(self, start: int, end: int) -> None:
        index = len(self._groups)
        path = f"groups[{index}]"
        if index == self._max_groups:
            raise TooManyGroups(f"the state has more than {index} groups, the most that are taken", "groups")
        if end - start > MAX_GROUP_BYTES:
            raise StateError(f"{path} has {end - start} bytes; no group needs more than {MAX_GROUP_BYTES}", path)
        try:
            message = pb.GroupState.FromString(self._data[start:end])
        except DecodeError:
            raise StateError(f"{path} is not a lossgrad_api.v1.GroupState", path) from None
        if message.group in self._groups:
            raise StateError(f"{path}.group is {message.group!r}, which comes twice; give each group once", path)
        check_group_name(message.group, f"{path}.group")
        totals = [LossTotal.from_message(state, f"{path}.states[{i}]") for i, state in enumerate(message.states)]
        self._groups[message.group] = GroupTotals(message.group, tuple(totals))
        self._element_count += max((total.element_count for total in totals), default=0)

    def state(self) -> Accumulation:
        """Return what was read."""
        try:
            message = pb.Accumulation.FromString(self._head)
        except DecodeError:
            raise StateError("the bytes are not a lossgrad_api.v1.Accumulation") from None
        losses = _read_losses(message)
        for index, group in enumerate(self._groups.values()):
            if len(group.totals) != len(losses):
                path = f"groups[{index}].states"
                raise StateError(f"{path} has {len(group.totals)} states, but there are {len(losses)} losses", path)
        if message.last_sequence < 0:
            refuse("last_sequence", message.last_sequence, "at least 0")
        if not self._element_count <= message.element_count <= MAX_COUNT:
            allowed = f"what its groups hold, {self._element_count}, to {MAX_COUNT}"
            refuse("element_count", message.element_count, allowed)
        return Accumulation(
            losses,
            self._groups.values(),
            last_sequence=message.last_sequence,
            element_count=message.element_count,
        )


def check_group_name(name: str, path: str = "group") -> None:
    """Raise StateError for a group's name that is too long."""
    if (length := len(name.encode())) > MAX_GROUP_NAME_BYTES:
        raise StateError(f"{path} has {length} bytes; at most {MAX_GROUP_NAME_BYTES} are taken", path)


def _read_losses(message: pb.Accumulation) -> tuple[LossFunction, ...]:
    if not 1 <= len(message.specs) <= MAX_LOSSES:
        raise StateError(f"the state is of {len(message.specs)} losses; it must be 1 to {MAX_LOSSES}", "specs")
    return tuple(LossFunction.from_message(spec, f"specs[{index}]") for index, spec in enumerate(message.specs))


def _names(losses: Iterable[LossFunction]) -> str:
    return ", ".join(map(str, losses))
