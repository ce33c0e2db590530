"""Makes a ComputeLossResponse of a computed job."""

from __future__ import annotations

from collections.abc import Sequence

from lossgrad_api.codec import EMPTY, Buffer, ResultView, StatsView, WireTensor, encode_compute_response
from lossgrad_server.batching.job import Computed, Job
from lossgrad_server.jobs import Role
from lossgrad_server.work import SPEC_RESULT


def results(job: Job, computed: Computed) -> list[ResultView]:
    """Return the job's results, in the order of its specs. Tensors that went to shared memory have no data."""
    plan = job.plan
    tensors: dict[tuple[int, Role], WireTensor] = {}
    is_placed = bool(job.item.destinations)
    for output, data in zip(plan.outputs, computed.result.outputs, strict=True):
        tensors[output.spec_index, output.role] = WireTensor(
            output.tensor.data_type, output.tensor.shape, EMPTY if is_placed else data
        )
    find = tensors.get
    return [
        ResultView(
            scalar=scalar if plan.specs[index].reduction.is_scalar else None,
            tensor=find((index, Role.LOSS)),
            element_count=element_count,
            weight_sum=weight_sum,
            nonfinite_count=nonfinite_count,
            target_gradient=find((index, Role.TARGET_GRADIENT)),
            input_gradient=find((index, Role.INPUT_GRADIENT)),
        )
        for index, (scalar, element_count, weight_sum, nonfinite_count) in enumerate(
            SPEC_RESULT.iter_unpack(computed.result.scalars)
        )
    ]


def response_parts(
    computed: Computed, results: Sequence[ResultView], device: str, idempotency_key: str
) -> list[Buffer]:
    """Return the response as parts to join."""
    stats = StatsView(
        queue_ns=computed.queue_ns,
        pack_ns=computed.pack_ns,
        compute_ns=computed.compute_ns,
        unpack_ns=computed.unpack_ns,
        batch_request_count=computed.batch_request_count,
        batch_element_count=computed.batch_element_count,
        device=device,
    )
    return encode_compute_response(stats, results, idempotency_key)
