"""The exact state of an evaluation as a value: saved, loaded, sent elsewhere, and merged in any order with the same bits."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from lossgrad.errors import InvalidRequest
from lossgrad.losses import Loss, loss_from_dict
from lossgrad.report import EvaluationReport, LossSummary
from lossgrad.state_file import bad_file, read_state, write_state
from lossgrad_api import accumulation as api
from lossgrad_api.accumulation import LossFunction, LossTotal, StateError

if TYPE_CHECKING:
    from typing import Self

_KIND: Final = "lossgrad.accumulation"


class Accumulation:
    """The totals of some losses over any number of batches, by group. A value: nothing changes it.

    Equal accumulations are equal to the bit, whatever the order and the grouping in which their parts were merged.
    `len` is the number of groups.
    """

    __slots__ = ("_state", "losses")

    def __init__(self, losses: Sequence[Loss], state: api.Accumulation | None = None) -> None:
        self.losses = tuple(dataclasses.replace(loss, gradient=False, gradient_scale=None) for loss in losses)
        self._state = api.Accumulation([function_of(loss) for loss in losses]) if state is None else state

    @classmethod
    def of_groups(
        cls, losses: Sequence[Loss], groups: Mapping[str, Iterable[LossTotal]], *, element_count: int
    ) -> Self:
        """Return the accumulation of these totals. `element_count` is of all elements, masked ones included."""
        totals = [api.GroupTotals(name, tuple(each)) for name, each in groups.items()]
        return cls(losses, api.Accumulation(list(map(function_of, losses)), totals, element_count=element_count))

    @property
    def group_names(self) -> tuple[str, ...]:
        """The groups' names, sorted; what had no group is under ""."""
        return tuple(sorted(self._state.groups))

    @property
    def element_count(self) -> int:
        """How many elements were evaluated, masked ones included."""
        return self._state.element_count

    def totals(self, group: str | None = None) -> tuple[LossSummary, ...]:
        """Return each loss over one group, or over all of them together. Raises KeyError where there is no such group."""
        exact = self._state.overall if group is None else self._state.groups[group].totals
        return tuple(summary_of(loss, total) for loss, total in zip(self.losses, exact, strict=True))

    def exact(self, group: str) -> tuple[LossTotal, ...]:
        """Return each loss's exact total over one group."""
        return self._state.groups[group].totals

    def report(self) -> EvaluationReport:
        """Return the report of this state."""
        return EvaluationReport(self)

    def merge(self, *others: Accumulation) -> Accumulation:
        """Return the accumulation of all batches that this and the others hold; none may be held by two.

        `Accumulation.merge(*parts)` merges a list. Raises InvalidRequest where the losses differ.
        """
        for other in others:
            if not isinstance(other, Accumulation):
                raise TypeError(f"merge got a {type(other).__name__}; give Accumulations, such as report.accumulation")
            if other.losses != self.losses:
                raise InvalidRequest(
                    f"one accumulation is of {list(self.losses)}, another of {list(other.losses)}; merge those of "
                    "the same "
                    "losses in the same order",
                    reason="BAD_STATE",
                    field="losses",
                )
        return Accumulation(self.losses, api.Accumulation.merge([self._state, *(other._state for other in others)]))

    def save(self, path: str | Path) -> None:
        """Write it to a small file, which is replaced as a whole if it is there."""
        write_state(Path(path), _KIND, self.to_content())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return what `save` wrote. Raises OSError, or InvalidRequest where the file is not one, or damaged."""
        path = Path(path)
        content = read_state(path, _KIND)
        try:
            return cls.from_content(content)
        except (StateError, KeyError, TypeError, ValueError) as error:
            raise bad_file(path, f"cannot be used: {error}") from error

    def to_content(self) -> dict[str, Any]:
        """Return it as plain values that JSON can hold."""
        return {
            "losses": [loss.to_dict() for loss in self.losses],
            "state": base64.b64encode(self._state.to_bytes()).decode(),
        }

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> Self:
        """Return what `to_content` gave. Raises ValueError, TypeError or KeyError for anything else."""
        losses = [loss_from_dict(description) for description in content["losses"]]
        state = api.Accumulation.from_bytes(base64.b64decode(content["state"], validate=True))
        if state.losses != tuple(map(function_of, losses)):
            raise ValueError("its losses are not those of its state")
        return cls(losses, state)

    def to_bytes(self) -> bytes:
        """Return its totals as bytes, which are equal where the totals are. How the losses are reduced is not in them."""
        return self._state.to_bytes()

    @classmethod
    def from_bytes(cls, losses: Sequence[Loss], data: bytes) -> Self:
        """Return what `to_bytes` gave. Raises InvalidRequest where it is damaged, or of other losses."""
        try:
            state = api.Accumulation.from_bytes(data)
        except StateError as error:
            raise InvalidRequest(f"the state cannot be read: {error}", reason="BAD_STATE", field="state") from error
        if state.losses != tuple(map(function_of, losses)):
            raise InvalidRequest(
                f"the state is of {', '.join(map(str, state.losses))}, not of {list(losses)}; give the same losses in the "
                "same order",
                reason="BAD_STATE",
                field="losses",
            )
        return cls(losses, state)

    def __len__(self) -> int:
        return len(self._state.groups)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Accumulation) and self.losses == other.losses and self._state == other._state

    def __hash__(self) -> int:
        return hash((self.losses, self._state.to_bytes()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (self.to_content(),)

    def __repr__(self) -> str:
        shown = ", ".join(f"{loss!r}: {total.value!r}" for loss, total in zip(self.losses, self.totals(), strict=True))
        return f"Accumulation({shown}; {len(self)} groups, {self.element_count} elements)"


def _unpickle(content: dict[str, Any]) -> Accumulation:
    return Accumulation.from_content(content)


def function_of(loss: Loss) -> LossFunction:
    """Return which function a loss is, whatever its reduction."""
    return LossFunction(loss.name, getattr(loss, loss.parameter) if loss.parameter else 0.0)


def summary_of(loss: Loss, total: LossTotal) -> LossSummary:
    """Return an exact total as numbers."""
    return LossSummary(
        loss=loss,
        mean=total.mean if loss.denominator is None else total.mean_over(loss.denominator),
        sum=total.sum,
        element_count=total.element_count,
        weight_sum=total.weight_sum,
        min=total.min,
        max=total.max,
        nonfinite_count=total.nonfinite_count,
    )
