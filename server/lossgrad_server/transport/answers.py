"""Makes a ComputeLossResponse of a computed job."""

from __future__ import annotations

from collections.abc import Sequence

from lossgrad_api.codec import Buffer, ResultView, StatsView, WireTensor, encode_compute_response
from lossgrad_api.v1 import loss_service_pb2 as pb
from lossgrad_server.batching.job import Computed, Job
from lossgrad_server.jobs import Role
from lossgrad_server.work import SPEC_RESULT, unpack_totals


def results(job: Job, computed: Computed) -> list[ResultView]:
    """Return the job's results, in the order of its specs."""
    plan = job.plan
    tensors: dict[tuple[int, Role], WireTensor] = {}
    for output, data in zip(plan.outputs, computed.result.outputs, strict=True):
        tensors[output.spec_index, output.role] = WireTensor(output.tensor.data_type, output.tensor.shape, data)
    totals = _totals(computed) if plan.wants_totals else ()
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
            total=totals[index] if plan.specs[index].include_total else None,
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


def _totals(computed: Computed) -> list[bytes]:
    """Return the serialised LossState of each spec."""
    result = computed.result
    return [
        pb.LossState(
            partial_sums=total.partials,
            element_count=element_count,
            weight_sum=weight_sum,
            min=total.minimum + 0.0,  # never -0.0
            max=total.maximum + 0.0,
            nonfinite_count=nonfinite_count,
            weight_partial_sums=total.weight_partials,
        ).SerializeToString()
        for total, (_, element_count, weight_sum, nonfinite_count) in zip(
            unpack_totals(result.totals), SPEC_RESULT.iter_unpack(result.scalars), strict=True
        )
    ]
