"""What a ResponseForm writes is byte for byte what encode_compute_response writes, whatever it wrote before."""

from __future__ import annotations

import math
import struct

from hypothesis import given
from hypothesis import strategies as st

from lossgrad_api import codec
from lossgrad_api.response_form import RECORD_BYTES
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.server.wire_messages import DOUBLE, INT64, KEY

STATS = codec.StatsView(1, 2, 3, 4, 5, 6, "cpu")
RECORD = struct.Struct("<dqdq")
BYTE_COUNTS = st.sampled_from([0, 1, 100, 127, 128, 8191, 8192, 20_000])
FLOAT32 = 3


@st.composite
def forms(draw: st.DrawFn) -> tuple[codec.ResultForm, ...]:
    """Return one to three results, with the tensors that a server sends."""
    results = []
    for _ in range(draw(st.integers(1, 3))):
        has_scalar = draw(st.booleans())
        fields = [2] * (not has_scalar) + draw(st.sampled_from([[], [7], [6, 7]]))
        tensors = tuple(
            codec.TensorForm(field, FLOAT32, (size,), size) for field in fields for size in [draw(BYTE_COUNTS)]
        )
        results.append(codec.ResultForm(has_scalar, tensors))
    return tuple(results)


def encoded(form: tuple[codec.ResultForm, ...], records: bytes, data: list[bytes], key: str) -> bytes:
    """Return what encode_compute_response makes of the same."""
    left = iter(data)
    results = []
    for result, (scalar, count, weight_sum, nonfinite) in zip(form, RECORD.iter_unpack(records), strict=True):
        tensors = {at.field: codec.WireTensor(at.data_type, at.shape, next(left)) for at in result.tensors}
        results.append(
            codec.ResultView(
                scalar if result.has_scalar else None,
                tensors.get(2),
                count,
                weight_sum,
                nonfinite,
                tensors.get(6),
                tensors.get(7),
            )
        )
    return b"".join(codec.encode_compute_response(STATS, results, key))


@given(forms(), st.data())
def test_a_form_writes_what_the_codec_writes(form: tuple[codec.ResultForm, ...], data: st.DataObject) -> None:
    writer = codec.ResponseForm(form)
    stats = codec.encode_stats(STATS)
    for _ in range(3):  # with the same counts, and with others
        records = b"".join(
            RECORD.pack(*data.draw(st.tuples(DOUBLE, INT64, DOUBLE, INT64) | st.just((0.5, 7, 7.0, 0)))) for _ in form
        )
        tensors = [bytes([index + 1]) * at.byte_count for index, result in enumerate(form) for at in result.tensors]
        key = data.draw(KEY)
        parts = writer.parts(stats, records, tensors, key)
        assert b"".join(parts) == encoded(form, records, tensors, key)


def test_a_small_answer_is_one_part_and_a_large_one_is_not_copied() -> None:
    small = codec.ResponseForm([codec.ResultForm(True, (codec.TensorForm(7, FLOAT32, (4,), 16),))])
    records = RECORD.pack(1.0, 4, 4.0, 0)
    (part,) = small.parts(b"", records, [bytes(16)])
    assert pb.ComputeLossResponse.FromString(bytes(part)).results[0].scalar == 1.0
    large = codec.ResponseForm([codec.ResultForm(True, (codec.TensorForm(7, FLOAT32, (25_000,), 100_000),))])
    data = memoryview(bytearray(100_000))
    assert any(part is data for part in large.parts(b"", records, [data]))


def test_more_combinations_of_counts_than_are_kept_are_written_all_the_same() -> None:
    form = (codec.ResultForm(True, ()),)
    writer = codec.ResponseForm(form)
    for count in [*range(100), *range(100)]:
        records = RECORD.pack(math.nan, count, -0.0, count % 3)
        assert len(records) == RECORD_BYTES
        assert b"".join(writer.parts(codec.encode_stats(STATS), records, [])) == encoded(form, records, [], "")
