"""LossMetric: evaluation for a loop of the caller's own, with torchmetrics' verbs. torchmetrics need not be installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final, Self

from lossgrad.accumulation import Accumulation
from lossgrad.calls import Losses, as_losses
from lossgrad.client import LossClient
from lossgrad.errors import LossgradError
from lossgrad.evaluating import DEFAULT_IN_FLIGHT_BYTES
from lossgrad.evaluation import Evaluation, EvaluationOptions
from lossgrad.losses import Loss, SmoothL1
from lossgrad.report import BatchResult, EvaluationReport, LossSummary
from lossgrad.thread_lanes import ThreadLanes

_SMOOTH_L1: Final = SmoothL1()


class LossMetric:
    """The losses of all that `update` was given, exactly, as `client.evaluate` computes them.

    `update` sends and does not wait; `compute` waits for what is under way. What a batch fails with is raised by the next
    call, and the batch is left out. Without a `client` it makes its own from the LOSSGRAD_ variables. It is used by one
    thread at a time. A copy has the state, and the client that was given; what is unpickled has the state alone.
    `lossgrad.torchmetrics.LossMetric` is one that is a torchmetrics.Metric, too.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(
        self, losses: Losses = _SMOOTH_L1, *, client: LossClient | None = None, allow_broadcast: bool = False
    ) -> None:
        self._losses, self._is_single = as_losses(losses)
        self._client = client
        self._owns_client = client is None
        self._allow_broadcast = allow_broadcast
        self._open: ExitStack | None = None
        self._lanes: ThreadLanes | None = None
        self._family = ""
        self._last: BatchResult | None = None
        self.reset()

    def update(self, input: Any, target: Any, *, weight: Any = None, mask: Any = None, group: Any = None) -> None:
        """Add a batch: it is sent, and counts once `compute` has waited for it. `group` may be one for each row."""
        self._raise_failure()
        options = {"weight": weight, "mask": mask, "group": group}
        given = {name: value for name, value in options.items() if value is not None}
        is_torch = "torch" in sys.modules and isinstance(input, sys.modules["torch"].Tensor)
        self._family = "torch" if is_torch else "numpy"
        try:
            lanes = self._connected()
            for request in self._evaluation.slices(self._next, (input, target, given)):
                lanes.send(request)
            lanes.poll()
        except LossgradError as error:
            self._fail(error)
        self._next += 1
        self._raise_failure()

    def compute(self) -> Any:
        """Return the mean or sum of each loss, as its reduction says: one number, or a tuple where several were asked for.

        In float64: a torch tensor where the batches were torch's, else a NumPy scalar.
        """
        return self._values(self.accumulation().totals())

    def __call__(self, input: Any, target: Any, **options: Any) -> Any:
        """Add a batch, wait for it, and return its own value, as torchmetrics' forward does."""
        self.update(input, target, **options)
        index = self._next - 1
        self._drain()
        if self._last is None or self._last.index != index:
            raise RuntimeError("the batch was not the last one to be answered; use one thread for each LossMetric")
        return self._values(self._last.results)

    forward = __call__

    def reset(self) -> None:
        """Forget everything, also what is under way."""
        self._disconnect()
        self._failure: LossgradError | None = None
        self._next = 0
        self._merged: list[Accumulation] = []
        self._evaluation = Evaluation(
            self._losses,
            EvaluationOptions(allow_broadcast=self._allow_broadcast, on_error="collect", on_batch=self._remember),
        )

    def merge_state(self, incoming: LossMetric | Accumulation | Iterable[LossMetric | Accumulation]) -> None:
        """Add what others hold, which this must not hold already. The bits do not depend on the order."""
        several = [incoming] if isinstance(incoming, (LossMetric, Accumulation)) else list(incoming)
        states = [each.accumulation() if isinstance(each, LossMetric) else each for each in several]
        Accumulation(self._losses).merge(*states)  # raises where the losses differ, before anything is added
        self._merged += states

    def accumulation(self) -> Accumulation:
        """Return the state of all batches so far: a value to save, to send elsewhere, or to merge."""
        self._drain()
        return self._evaluation.accumulation().merge(*self._merged)

    def report(self) -> EvaluationReport:
        """Return the report of all batches so far, with their groups."""
        return self.accumulation().report()

    def close(self) -> None:
        """End the connection, if it is this metric's own, and what is under way. The state stays."""
        self._disconnect()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        losses = repr(self._losses[0]) if self._is_single else repr(list(self._losses))
        return f"LossMetric({losses})"

    @property
    def losses(self) -> tuple[Loss, ...]:
        """What it computes."""
        return tuple(self._losses)

    def restore(self, states: Iterable[Accumulation]) -> None:
        """Forget everything, and hold what these states hold together."""
        self.reset()
        self.merge_state(states)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        client = None if self._owns_client else self._client
        losses = self._losses[0] if self._is_single else self._losses
        copied = type(self)(losses, client=client, allow_broadcast=self._allow_broadcast)
        copied._family = self._family
        copied._merged = [self.accumulation()]
        return copied

    def __copy__(self) -> Self:
        return self.__deepcopy__({})

    def __getstate__(self) -> dict[str, Any]:
        return {
            "losses": self._losses,
            "is_single": self._is_single,
            "allow_broadcast": self._allow_broadcast,
            "family": self._family,
            "accumulation": self.accumulation(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        losses = state["losses"]
        self.__init__(losses[0] if state["is_single"] else losses, allow_broadcast=state["allow_broadcast"])  # type: ignore[misc]
        self._family = state["family"]
        self._merged = [state["accumulation"]]

    def _connected(self) -> ThreadLanes:
        if self._lanes is None:
            stack = ExitStack()
            if self._client is None:
                self._client = stack.enter_context(LossClient())
                stack.callback(setattr, self, "_client", None)
            self._open = stack
            self._lanes = self._client._lanes(self._evaluation, None, DEFAULT_IN_FLIGHT_BYTES, None, None, True, stack)
        return self._lanes

    def _disconnect(self) -> None:
        stack, self._open, self._lanes = self._open, None, None
        if stack is not None:
            stack.close()

    def _drain(self) -> None:
        if self._lanes is not None:
            try:
                self._lanes.drain()
            except LossgradError as error:
                self._fail(error)
        self._raise_failure()

    def _fail(self, error: LossgradError) -> None:
        """Take note that batches were lost: what would be computed from here on would not be all."""
        self._failure = error
        self._disconnect()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        errors = self._evaluation.take_errors()
        if errors:
            raise errors[0].error

    def _remember(self, batch: BatchResult) -> None:
        self._last = batch

    def _values(self, summaries: Iterable[LossSummary]) -> Any:
        values = [summary.value for summary in summaries]
        if self._family == "torch":
            torch = sys.modules["torch"]
            scalars = [torch.tensor(value, dtype=torch.float64) for value in values]
        else:
            import numpy as np

            scalars = [np.float64(value) for value in values]
        return scalars[0] if self._is_single else tuple(scalars)
