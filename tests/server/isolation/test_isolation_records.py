"""The records that cross to a device process: what is packed is what is unpacked, and blocks do not overlap."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lossgrad_server.isolation import channel, records
from lossgrad_server.isolation.memory import SharedMemory, sealed_file
from lossgrad_server.isolation.records import BatchDone, DeviceMemory, Facts, Kind, Run
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, SpecPlan, TensorPlan
from lossgrad_server.work import SPEC_RESULT, SPEC_TOTAL, LargeLimits

UINT32 = st.integers(0, 2**32 - 1)
INT64 = st.integers(0, 2**63 - 1)


@given(st.builds(Run, st.booleans(), st.integers(0, 2**16 - 1), UINT32, UINT32, UINT32))
def test_a_run_comes_back(run: Run) -> None:
    assert records.kind_of(run.pack()) == Kind.RUN
    assert Run.unpack(run.pack()) == run


BYTES = st.integers(0, 2**63 - 1)
MEMORY = st.none() | st.builds(DeviceMemory, BYTES, BYTES, BYTES)


@given(
    st.builds(BatchDone, st.booleans(), st.integers(0, 2**16 - 1), UINT32, INT64, INT64, INT64, UINT32, UINT32, MEMORY)
)
def test_a_batch_s_end_comes_back(done: BatchDone) -> None:
    assert records.kind_of(done.pack()) == Kind.DONE
    assert BatchDone.unpack(done.pack()) == done


@given(INT64, INT64, st.integers(1, 9))
def test_facts_come_back(work: int, byte_count: int, slots: int) -> None:
    large = LargeLimits(work, byte_count)
    facts = Facts("cuda:0", "lossgrad-cuda 2; NVIDIA H200", "GPU-1", "NVIDIA H200", slots, work, large)
    assert records.kind_of(facts.pack()) == Kind.FACTS
    assert Facts.unpack(facts.pack()) == facts


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**31 - 1), INT64)
def test_the_other_packets_come_back(status: int, process_id: int, byte_count: int) -> None:
    assert records.unpack_ended(records.pack_ended(process_id, status)) == (process_id, status)
    assert records.unpack_forked(records.pack_forked(process_id)) == process_id
    assert records.unpack_map(records.pack_map(3, byte_count)) == (3, byte_count)


@pytest.mark.parametrize("text", ["", "no such device", "ü" * 1000])
def test_a_text_comes_back_as_far_as_there_is_room(text: str) -> None:
    packet = records.pack_text(Kind.FAILED, text)
    assert records.kind_of(packet) == Kind.FAILED
    assert records.unpack_text(packet) == text[:252]
    assert len(packet) <= records.MAX_PACKET_BYTES


def test_a_kind_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="99"):
        records.kind_of(bytes([99]))


PLANS = st.builds(
    JobPlan,
    specs=st.lists(
        st.builds(
            SpecPlan,
            st.sampled_from(LossKind),
            st.just(0.5),
            st.sampled_from([Reduction.NONE, Reduction.SUM]),
            st.booleans(),
        ),
        min_size=1,
        max_size=16,
    ).map(tuple),
    input=st.sampled_from([TensorPlan(DataType.FLOAT32, (5, 3)), TensorPlan(DataType.FLOAT16, (1, 3))]),
    target=st.sampled_from([TensorPlan(DataType.FLOAT64, (5, 3)), TensorPlan(DataType.INT8, (5, 1))]),
    weight=st.sampled_from([None, TensorPlan(DataType.FLOAT32, (3,))]),
    mask=st.sampled_from([None, TensorPlan(DataType.BOOL, (5, 3))]),
    wants_totals=st.booleans(),
)


@given(PLANS)
def test_a_block_has_room_for_all_of_an_item_and_nothing_overlaps(plan: JobPlan) -> None:
    layout = records.layout_of(plan.header)
    assert [size for _, size in layout.operands] == [tensor.byte_count for tensor in plan.operands]
    assert [size for _, size in layout.outputs] == [output.tensor.byte_count for output in plan.outputs]
    assert layout.scalars[1] == SPEC_RESULT.size * len(plan.specs)
    assert layout.totals[1] == (SPEC_TOTAL.size * len(plan.specs) if plan.wants_totals else 0)
    spans = [*layout.operands, (layout.answer, records.ANSWER.size), layout.scalars, layout.totals, *layout.outputs]
    for (begin, size), (after, _) in zip(spans, [*spans[1:], (layout.byte_count, 0)], strict=True):
        assert begin + size <= after
    assert all(begin % records.CACHE_LINE == 0 for begin, _ in (*layout.operands, *layout.outputs))
    assert layout.byte_count % records.CACHE_LINE == 0
    first_output = min([begin for begin, _ in layout.outputs], default=layout.byte_count)
    assert first_output - layout.answer >= records.ANSWER.size + records.MAX_MESSAGE_BYTES


def test_memory_is_seen_by_both_sides_and_neither_can_cut_it_short() -> None:
    descriptor = sealed_file(1 << 20)
    memory, other = SharedMemory(descriptor, 1 << 20), SharedMemory(descriptor, 1 << 20)
    try:
        for size in (1, 1000, 100_000):
            data = bytes(range(256)) * (size // 256 + 1)
            memory.write(64, data[:size])
            copy = bytearray(size)
            other.read_into(64, copy)
            assert copy == data[:size]
        with pytest.raises(ValueError, match="fit"):
            memory.write((1 << 20) - 100, bytes(100_000))
        with open(descriptor, "r+b", closefd=False) as file, pytest.raises(PermissionError):
            file.truncate(10)
    finally:
        memory.close()
        other.close()
        os.close(descriptor)


def test_a_channel_carries_whole_packets_and_says_when_it_is_closed() -> None:
    one, other = channel.pair()
    with other:
        with one:
            assert not channel.is_readable(other, 0.0)
            with pytest.raises(BlockingIOError):
                channel.receive(other, is_waiting=False)
            channel.send(one, b"first")
            channel.send(one, b"second")
            assert channel.is_readable(other, 0.0)
            assert channel.receive(other, is_waiting=True) == (b"first", -1)
            assert channel.receive(other, is_waiting=False) == (b"second", -1)
        assert channel.receive(other, is_waiting=True) == (b"", -1)
