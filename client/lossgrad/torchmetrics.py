"""LossMetric as a torchmetrics.Metric: in a MetricCollection, in Lightning, synchronised over torch.distributed. Exact.

Without torchmetrics there is `lossgrad.LossMetric`, which this is made of, with the same verbs.
"""

from __future__ import annotations

from typing import Any, Final

import torch
import torchmetrics

from lossgrad import metric
from lossgrad.accumulation import Accumulation
from lossgrad.calls import Losses
from lossgrad.client import LossClient
from lossgrad.losses import SmoothL1
from lossgrad.report import EvaluationReport

_SMOOTH_L1: Final = SmoothL1()


class LossMetric(torchmetrics.Metric):
    """The losses of all that `update` was given, exactly, in float64: mean or sum, or a tuple where several are asked for.

    `update` sends and does not wait. `forward` gives the batch's own value, and waits for it. Without a `client` it makes
    its own from the LOSSGRAD_ variables; a copy keeps the client, a pickle does not. `options` are torchmetrics.Metric's.
    Its one state, `exact`, is a list of uint8 tensors, each an exact state in bytes: gathered from all ranks, they add up to
    the same bits on each of them, whatever the ranks were.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    def __init__(
        self,
        losses: Losses = _SMOOTH_L1,
        *,
        client: LossClient | None = None,
        allow_broadcast: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._metric = metric.LossMetric(losses, client=client, allow_broadcast=allow_broadcast)
        self.add_state("exact", default=[], dist_reduce_fx=None)

    @property
    def exact(self) -> list[torch.Tensor]:
        """The state of all batches so far, as bytes; waits for what is under way."""
        # One tensor even where there is nothing: all ranks must have as many to gather.
        data = bytearray(self._metric.accumulation().to_bytes())
        return [torch.frombuffer(data, dtype=torch.uint8).to(self.device)]

    @exact.setter
    def exact(self, states: list[torch.Tensor]) -> None:
        losses = self._metric.losses
        parts = [Accumulation.from_bytes(losses, bytes(each.to("cpu", torch.uint8).tolist())) for each in states]
        self._metric.restore(parts)

    def update(self, input: Any, target: Any, *, weight: Any = None, mask: Any = None, group: Any = None) -> None:
        """Add a batch. Raises what `lossgrad.LossMetric.update` raises."""
        self._metric.update(input, target, weight=weight, mask=mask, group=group)

    def compute(self) -> Any:
        """Return each loss's mean or sum as a float64 tensor."""
        return _tensors(self._metric.compute())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and return its own value."""
        if self.dist_sync_on_step or self._is_synced:
            return super().forward(*args, **kwargs)
        # As torchmetrics has it, but for what it does to have a batch's value: to copy the state and to add it again.
        self._computed = None
        self._update_count += 1
        self._forward_cache = _tensors(self._metric(*args, **kwargs))
        return self._forward_cache

    def reset(self) -> None:
        """Forget everything, also what is under way."""
        self._metric.reset()
        super().reset()

    def accumulation(self) -> Accumulation:
        """Return this process's state: a value to save, to send elsewhere, or to merge."""
        return self._metric.accumulation()

    def report(self) -> EvaluationReport:
        """Return the report of this process's batches, with their groups."""
        return self._metric.report()

    def close(self) -> None:
        """End the connection, if it is this metric's own. The state stays."""
        self._metric.close()

    def __hash__(self) -> int:
        """Return the same always: torchmetrics' own is made of the state, which is made anew whenever it is looked at."""
        return id(self)


def _tensors(values: Any) -> Any:
    if isinstance(values, tuple):
        return tuple(map(_tensors, values))
    return torch.as_tensor(values, dtype=torch.float64)
