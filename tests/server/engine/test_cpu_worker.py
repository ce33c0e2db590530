"""The CPU worker around its kernels: failures, memory, pieces, and where compiled code is kept."""

from __future__ import annotations

import ast
import os
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numba.core import config
from numba.core.caching import IndexDataCacheFile

from lossgrad_server.engine import cpu_native, cpu_worker
from lossgrad_server.engine.cpu_kernel import load_kernel
from lossgrad_server.engine.cpu_layout import JOB, STREAMED_BYTES
from lossgrad_server.engine.cpu_memory import Arena
from lossgrad_server.engine.cpu_program import program_of
from lossgrad_server.engine.cpu_worker import CpuWorker, determinism
from lossgrad_server.jobs import DataType, JobPlan, LossKind, Reduction, TensorPlan
from lossgrad_server.work import Buffer, FailureKind, Retry, WorkFailure, WorkItem, WorkResult
from tests.server.engine.building import FLOATS, Job, job, result_bytes, run, spec


@pytest.fixture(scope="module")
def worker() -> Iterator[CpuWorker]:
    worker = CpuWorker(2)
    worker.warm_up()
    yield worker
    worker.close()


def large_jobs() -> list[Job]:
    """Return jobs that take every path, each of 600,000 elements and more."""
    random = np.random.default_rng(1)
    x, y = random.normal(size=(2, 6, 100_003)).astype(np.float32)
    everything = [spec(kind, 0.5, reduction) for kind in LossKind for reduction in Reduction][::3]
    jobs = [job(spec(), x, y), job(spec(reduction=Reduction.NONE), x, y)]
    for data_type in FLOATS:
        jobs.append(job(everything, x, y, data_type, weight=abs(x), mask=y > 0))
        jobs.append(job(everything, x, y[:1], data_type, target_type=DataType.FLOAT32))
        jobs.append(job(everything, x.reshape(-1, 3), y.reshape(-1, 3)[:, :1], data_type))
    return jobs


def test_only_the_answer_takes_memory(worker: CpuWorker) -> None:
    for one in large_jobs():
        run(worker, one)
        # What is kept between requests is as large as it has to be now. numpy tells tracemalloc what it takes.
        tracemalloc.start()
        try:
            result = run(worker, one)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        answer = sum(memoryview(output).nbytes for output in result.outputs)
        assert peak < answer + 64 * 1024


def test_memory_is_not_kept_from_many_requests(worker: CpuWorker) -> None:
    one = job([spec(kind, 0.5) for kind in LossKind], np.ones(700_000), np.zeros(700_000))
    for _ in range(3):
        run(worker, one)
    before = resident_bytes()
    for _ in range(30):
        run(worker, one)
    assert resident_bytes() - before < 12_000_000  # one answer has 11,200,000


def resident_bytes() -> int:
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc on this system")
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "item",
    [
        WorkItem(b"", ()),
        WorkItem(b"\x63" + bytes(600), (b"", b"")),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4,)),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4, b"\x00" * 4, b"\x00" * 4)),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4, b"\x00" * 5)),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4, memoryview(b"\x00" * 8)[::2])),
        WorkItem(job(spec(), [1.0], [2.0]).plan.header, (b"\x00" * 4, None)),  # type: ignore[arg-type]
    ],
    ids=["no header", "version", "operand missing", "operand too many", "too long", "not contiguous", "no buffer"],
)
@pytest.mark.parametrize("piece_work", [1, 1 << 20])
def test_a_garbled_item_fails_alone(item: WorkItem, piece_work: int) -> None:
    worker = CpuWorker(piece_work=piece_work)
    worker.warm_up()
    good = job(spec(), [3.0], [0.0])
    first, failed, last = worker.run([good.item, item, good.item]).outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.INTERNAL
    for outcome in (first, last):
        assert isinstance(outcome, WorkResult)
        assert result_bytes(outcome) == result_bytes(run(worker, good))


def test_memory_that_is_not_there_is_said_with_both_numbers(worker: CpuWorker) -> None:
    # 2^46 losses of 2 bytes: more than the addresses that a process has.
    side = 1 << 23
    plan = JobPlan(
        (spec(reduction=Reduction.NONE, gradient=False),),
        TensorPlan(DataType.FLOAT16, (side, 1)),
        TensorPlan(DataType.UINT8, (1, side)),
    )
    good = job(spec(), [3.0], [0.0])
    failed, outcome = worker.run([WorkItem(plan.header, (bytes(2 * side), bytes(side))), good.item]).outcomes
    assert isinstance(failed, WorkFailure)
    assert failed.kind == FailureKind.OUT_OF_MEMORY
    assert int(failed.message.split("about ")[1].split()[0]) >= 1 << 47
    assert int(failed.message.split("where ")[1].split()[0]) > 0
    assert isinstance(outcome, WorkResult)


def test_a_batch_whose_answers_find_no_memory_is_computed_one_by_one(
    worker: CpuWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def scarce(byte_count: int) -> memoryview:
        sizes.append(byte_count)
        if byte_count > 1000:
            raise MemoryError
        return memoryview(bytearray(byte_count))

    monkeypatch.setattr(cpu_worker, "output_memory", scarce)
    small, large = job(spec(), [3.0], [0.0]), job(spec(), [3.0] * 300, [0.0] * 300)
    result = worker.run([small.item, large.item, small.item])
    outcomes = result.outcomes
    assert result.retries == (Retry.OUT_OF_MEMORY,)
    assert worker.run([small.item]).retries == ()
    del sizes[-1]
    assert [isinstance(outcome, WorkResult) for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1], WorkFailure)
    assert outcomes[1].kind == FailureKind.OUT_OF_MEMORY
    assert len(sizes) == 4


def test_a_piece_is_a_small_part_of_a_large_request(worker: CpuWorker) -> None:
    count = 1 << 24
    one = job(spec(), [0.0], [0.0])
    plan = JobPlan(one.plan.specs, TensorPlan(DataType.FLOAT32, (count,)), TensorPlan(DataType.FLOAT32, (count,)))
    zeros = bytes(4 * count)
    pieces = worker.begin(WorkItem(plan.header, (zeros, zeros)))
    advanced = 0
    while not pieces.advance():
        advanced += 1
    # 2^20 elements for each of two threads, and what stands before and after.
    assert advanced == 8 + 2
    assert result_bytes(pieces.result()) == result_bytes(run(CpuWorkerOfOneThread.get(), Job(plan, (zeros, zeros))))


class CpuWorkerOfOneThread:
    """A worker that is made when it is first asked for."""

    _worker: CpuWorker | None = None

    @classmethod
    def get(cls) -> CpuWorker:
        if cls._worker is None:
            cls._worker = CpuWorker()
            cls._worker.warm_up()
        return cls._worker


@pytest.mark.parametrize(
    ("data_type", "spec_count"), [(DataType.FLOAT32, 1), (DataType.FLOAT32, 2), (DataType.FLOAT64, 1)]
)
def test_a_gradient_written_past_the_caches_is_the_same(data_type: DataType, spec_count: int) -> None:
    count = STREAMED_BYTES // data_type.itemsize + 4101
    dtype = np.float32 if data_type == DataType.FLOAT32 else np.float64
    random = np.random.default_rng(8)
    x, y = random.normal(size=(2, count)).astype(dtype)
    x[[5, count - 1]] = np.nan
    one = job([spec()] * spec_count, [0.0], [0.0])
    plan = JobPlan(one.plan.specs, TensorPlan(data_type, (count,)), TensorPlan(data_type, (count,)))
    program, arena = program_of(plan.header), Arena(load_kernel(), 1)
    assert np.frombuffer(program.code, JOB, 1)["streams"][0]
    answers: list[tuple[bytes, bytes]] = []
    # Streaming needs memory that lies on a multiple of 32; elsewhere the same loop writes through the caches.
    for offset in (0, 8, 32, 33):
        memory = np.full(program.output_bytes + 128, 0xA5, np.uint8)
        first = -memory.ctypes.data % 64 + offset
        outputs = memoryview(memory)[first : first + program.output_bytes]  # type: ignore[arg-type]
        scalars = arena.compute([program], [x.tobytes(), y.tobytes(), outputs], holding_gil=False)
        begin, end = program.output_spans[-1]
        answers.append((scalars, outputs[begin:end].tobytes()))
        assert set(memory[:first]) | set(memory[first + end :]) == {0xA5}
    assert answers[1:] == answers[:1] * 3
    gradient = np.frombuffer(answers[0][1], dtype)
    expected = (np.clip((x - y).astype(np.float64), -1.0, 1.0) / count).astype(dtype)
    assert np.array_equal(np.isnan(gradient), np.isnan(x - y))
    assert float(np.nanmax(np.abs(gradient - expected))) <= 2.0**-52 / count


def test_what_a_batch_is_computed_by_outlives_the_gil() -> None:
    jobs = [job(spec(kind, 0.5), [1.0, 2.0, 5.0], [3.0, 2.5, 1.0]) for kind in LossKind]
    programs = [program_of(one.plan.header) for one in jobs]
    code_bytes = sum(len(program.code) for program in programs)
    kernel = load_kernel()
    taken: list[bytes] = []

    def compute(call: int) -> int:
        # What another thread does meanwhile: it takes the memory that is free.
        taken.extend(bytes([0x7F]) * code_bytes for _ in range(1000))
        return kernel.compute_without_gil(call)

    results: list[tuple[bytes, bytes]] = []
    for arena in Arena(kernel, 1), Arena(replace(kernel, compute_without_gil=compute), 1):
        outputs = memoryview(bytearray(sum(program.output_bytes for program in programs)))
        buffers: list[Buffer] = [*(operand for one in jobs for operand in one.operands), outputs]
        results.append((arena.compute(programs, buffers, holding_gil=not results), bytes(outputs)))
    assert results[0] == results[1]


def test_what_is_wrong_with_an_item_is_raised_when_it_begins(worker: CpuWorker) -> None:
    plan = job(spec(), [1.0], [2.0]).plan
    with pytest.raises(ValueError, match="operands"):
        worker.begin(WorkItem(plan.header, (b"\x00" * 4, b"\x00" * 5)))
    with pytest.raises(ValueError, match="operands"):
        worker.begin(WorkItem(plan.header, (b"\x00" * 4,)))


def test_a_result_outlives_what_it_was_computed_from(worker: CpuWorker) -> None:
    def compute() -> WorkResult:
        values = np.arange(50_000.0)
        return run(worker, job(spec(LossKind.L1, reduction=Reduction.NONE), values, -values, DataType.FLOAT64))

    result = compute()
    junk = [bytes([index]) * 400_000 for index in range(8)]
    for _ in range(3):
        run(worker, job(spec(), np.ones(50_000), np.zeros(50_000)))
    np.testing.assert_array_equal(np.frombuffer(result.outputs[0], np.float64), 2 * np.arange(50_000.0))
    assert len(junk) == 8


def test_operands_are_not_written_to(worker: CpuWorker) -> None:
    for one in large_jobs():
        before = [bytes(bytearray(operand)) for operand in one.operands]
        run(worker, one)
        assert list(one.operands) == before


def test_the_times_add_up_to_the_call(worker: CpuWorker) -> None:
    items = [job(spec(), np.ones(10_000), np.zeros(10_000)).item] * 3 + [large_jobs()[0].item]
    started = time.perf_counter_ns()
    result = worker.run(items)
    elapsed = time.perf_counter_ns() - started
    assert min(result.pack_ns, result.compute_ns, result.unpack_ns) > 0
    assert result.pack_ns + result.compute_ns + result.unpack_ns <= elapsed


def test_an_empty_batch_is_no_error(worker: CpuWorker) -> None:
    assert worker.run([]).outcomes == []


def test_a_worker_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        CpuWorker(0)


def test_determinism_names_what_the_bits_depend_on() -> None:
    for part in ("lossgrad-cpu 2", "4096", "32 lanes"):
        assert part in determinism()


def test_neither_torch_nor_grpc_is_imported() -> None:
    sources = list(Path(cpu_worker.__file__).parent.glob("cpu_*.py"))
    assert len(sources) > 10
    for source in sources:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            assert not [name for name in names if name.split(".")[0] in ("torch", "grpc", "google")], source


class TestCache:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        cpu_native._cache_directory.cache_clear()
        cpu_native._warn_about_cache.cache_clear()
        yield
        cpu_native._cache_directory.cache_clear()

    def test_is_where_numba_cache_dir_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
        assert cpu_native._cache_directory() == tmp_path / "lossgrad"

    def test_is_read_where_it_cannot_be_written(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
        (tmp_path / "lossgrad").mkdir()
        (tmp_path / "lossgrad" / "cpu_x-1.py311.nbi").touch()
        monkeypatch.setattr(cpu_native, "is_writable", lambda _: False)
        assert cpu_native._cache_directory() == tmp_path / "lossgrad"

    def test_may_be_nowhere(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "nothing"))
        monkeypatch.setattr(cpu_native, "__file__", str(tmp_path / "cpu_native.py"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nobody"))
        monkeypatch.setattr(cpu_native, "is_writable", lambda _: False)
        entry = cpu_native._compile("lossgrad_double", "int64(int64)", _double)
        assert entry.ctypes(21) == 42
        assert "NUMBA_CACHE_DIR" in caplog.text

    def test_is_not_written_where_it_cannot_be(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        directory = tmp_path / "lossgrad"
        directory.mkdir()
        (directory / "cpu_x-1.py311.nbi").touch()
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", f"{cpu_native.__name__}.CacheDirectory")
        monkeypatch.setattr(cpu_native, "is_writable", lambda _: False)
        entry = cpu_native._compile("lossgrad_double", "int64(int64)", _double)
        assert entry.ctypes(21) == 42
        assert [path.name for path in directory.iterdir()] == ["cpu_x-1.py311.nbi"]
        assert "NUMBA_CACHE_DIR" in caplog.text

    def test_forgets_what_was_compiled_from_other_sources(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", f"{cpu_native.__name__}.CacheDirectory")
        hits: list[Any] = []
        for digest in ("one", "one", "another"):
            monkeypatch.setattr(cpu_native, "source_digest", lambda digest=digest: digest)
            hits.append(cpu_native._compile("lossgrad_double", "int64(int64)", _double).cache_hits)
        assert hits == [0, 1, 0]

    @pytest.mark.parametrize("of_a_kind", ["one function of other sources", "two functions of one name"])
    def test_never_takes_code_for_another_s_where_a_process_ended_between_index_and_code(
        self, of_a_kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
        monkeypatch.setattr(config, "CACHE_LOCATOR_CLASSES", f"{cpu_native.__name__}.CacheDirectory")
        symbols = ("lossgrad_made", "lossgrad_made" if "sources" in of_a_kind else "lossgrad_made_too")
        compiled = cpu_native._compile(symbols[0], "int64(int64)", _times(2))
        assert compiled.ctypes(21) == 42
        if "sources" in of_a_kind:
            monkeypatch.setattr(cpu_native, "source_digest", lambda: "another")
        else:
            (index,) = (tmp_path / "lossgrad").glob("*.nbi")
            index.unlink()  # as a process saw it that looked before the first wrote it
        with monkeypatch.context() as killed:
            killed.setattr(IndexDataCacheFile, "_save_data", lambda *_: None)
            cpu_native._compile(symbols[1], "int64(int64)", _times(3))
        entry = cpu_native._compile(symbols[1], "int64(int64)", _times(3))
        assert entry.ctypes(21) == 63


def _times(factor: int) -> Callable[[int], int]:
    def times(value: int) -> int:
        return factor * value

    return times


def _double(value: int) -> int:
    return 2 * value
