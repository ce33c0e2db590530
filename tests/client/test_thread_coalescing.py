"""Small calls of a LossClient, of one thread or many, against the peer: they share a stream, and keep what is their own."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from lossgrad import (
    L1,
    Cancelled,
    DeadlineExceeded,
    Huber,
    InvalidRequest,
    LossClient,
    LossResult,
    Overloaded,
    Unauthenticated,
    Unavailable,
    call_window,
    thread_coalescer,
)
from lossgrad.exchange import Room
from lossgrad_api.v1 import loss_service_pb2 as pb
from tests.client.peer import Peer, PeerServer, Refused, status

Code = grpc.StatusCode
ZERO = np.zeros(1)
READER = "lossgrad-calls-reader"


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_coalescer, "MAX_IDLE_SECONDS", 60.0)  # calls share a stream, however slow the machine


@pytest.fixture
def warm(target: str, peer: Peer) -> Iterator[LossClient]:
    """Return a client that has made a call, so that the next ones share a stream."""
    with LossClient(target) as client:
        warmed(client, peer)
        yield client


def warmed(client: LossClient, peer: Peer) -> LossClient:
    call(client, 0)
    assert peer.streams == 0
    peer.reset()
    return client


def call(client: LossClient, number: float, **options: Any) -> LossResult:
    return client.l1(np.array([float(number)]), ZERO, **options)


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return what came of `work(0)`, `work(1)`... in a thread each: results and errors."""

    def outcome(number: int) -> Any:
        try:
            return work(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(outcome, range(count)))


def value_of(request: pb.ComputeLossRequest) -> float:
    return float(np.frombuffer(request.input.data, np.float64)[0])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def no_reader_runs() -> bool:
    return all(thread.name != READER for thread in threading.enumerate())


def test_calls_that_follow_one_another_share_a_stream_and_the_first_goes_by_itself(
    client: LossClient, peer: Peer
) -> None:
    assert [call(client, number).value for number in range(20)] == list(range(20))
    assert peer.streams == 1
    assert peer.messages == [1] * 19


def test_a_call_now_and_then_goes_by_itself(client: LossClient, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_coalescer, "MAX_IDLE_SECONDS", 0.0)
    assert [call(client, number).value for number in range(5)] == list(range(5))
    assert peer.streams == 0


@pytest.mark.parametrize("seed", range(3))
def test_every_caller_gets_its_own_answer_in_whatever_order_they_come(warm: LossClient, peer: Peer, seed: int) -> None:
    chance = random.Random(seed)

    def shuffled(answers: list[pb.TaggedResponse]) -> list[list[pb.TaggedResponse]]:
        chance.shuffle(answers)
        cut = chance.randrange(len(answers) + 1)
        return [group for group in (answers[:cut], answers[cut:]) if group]

    peer.group = shuffled
    generator = torch.Generator().manual_seed(seed)
    # One in twenty is beyond what is coalesced.
    sizes = [chance.randrange(1, 2000) if chance.random() < 0.95 else 100_000 for _ in range(120)]
    pairs = [(torch.randn(size, generator=generator), torch.randn(size, generator=generator)) for size in sizes]

    def work(number: int) -> None:
        for input, target in pairs[number::12]:
            result = warm.smooth_l1(input, target, beta=0.5, gradient=True, reduction="sum")
            leaf = input.clone().requires_grad_()
            expected = torch.nn.functional.smooth_l1_loss(leaf, target, beta=0.5, reduction="sum")
            expected.backward()  # type: ignore[no-untyped-call]
            torch.testing.assert_close(result.loss, expected.detach(), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(result.gradient, leaf.grad)

    assert at_once(12, work) == [None] * 12
    assert sum(peer.messages) == sum(size < 100_000 for size in sizes)
    assert peer.streams == 1


def test_what_waits_travels_in_one_message(warm: LossClient, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    coalescer: Any = warm._connection.coalescer  # type: ignore[union-attr]
    call(warm, 0)
    until(lambda: coalescer._current.is_asleep)
    with ThreadPoolExecutor(40) as pool:
        with monkeypatch.context() as patched:
            patched.setattr(coalescer, "_proceed", lambda: None)  # the writer is not woken
            futures = [pool.submit(call, warm, number) for number in range(40)]
            until(lambda: len(coalescer._window._waiting) == 40)
        with coalescer._lock:
            coalescer._proceed()
        assert [future.result().value for future in futures] == list(range(40))
    assert peer.messages == [1, 40]


def test_several_losses_and_options_travel_with_their_call(warm: LossClient, peer: Peer) -> None:
    ones = np.ones(3, np.float32)
    several = warm.compute(ones, ones * 3, [L1(gradient=True), Huber(2.0)])
    masked = warm.l1(ones, ones * 4, mask=np.array([True, False, True]), reduction="sum")
    named = warm.mse(ones, ones, idempotency_key="a name", timeout=math.inf)
    assert [result.value for result in several] == [2.0, 2.0]
    np.testing.assert_array_equal(several[0].gradient, np.full(3, -1 / 3, np.float32))
    several[0].gradient[:] = 0  # its own memory, and writable
    assert (masked.value, masked.element_count) == (6.0, 2)
    assert named.idempotency_key == "a name"
    out = np.empty(3, np.float32)
    assert warm.l1(ones, ones * 3, gradient=True, gradient_out=out).gradient is out
    np.testing.assert_array_equal(out, np.full(3, -1 / 3, np.float32))
    assert peer.messages == [1] * 4


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_it_can_be_turned_off(target: str, peer: Peer, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "environment":
        monkeypatch.setenv("LOSSGRAD_COALESCE", "0")
    with LossClient(target, coalesce=False if how == "argument" else None) as client:
        assert [call(client, number).value for number in range(5)] == list(range(5))
    assert peer.streams == 0


def test_a_channel_of_the_callers_own_makes_a_call_for_each(target: str, peer: Peer) -> None:
    with LossClient.from_channel(grpc.insecure_channel(target)) as client:  # it may have interceptors for calls
        assert [call(client, number).value for number in range(5)] == list(range(5))
    assert peer.streams == 0


def test_errors_stay_with_their_call(warm: LossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if value_of(request) % 3 == 0:
            raise Refused(status(Code.INVALID_ARGUMENT, "three", reason="BAD_PARAMETER", field="input"))

    peer.fail = fail
    for number, outcome in enumerate(at_once(30, lambda number: call(warm, number))):
        if number % 3 == 0:
            assert isinstance(outcome, InvalidRequest)
            assert (outcome.field, str(outcome)) == ("input", "three")
        else:
            assert outcome.value == number
    assert peer.streams == 1


def test_a_timeout_ends_its_own_call_only(warm: LossClient, peer: Peer) -> None:
    peer.hold.clear()
    with ThreadPoolExecutor(5) as pool:
        long = [pool.submit(call, warm, number) for number in range(5)]
        assert peer.arrived.wait(10)
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s") as raised:
            call(warm, 99, timeout=0.05)
        assert isinstance(raised.value, TimeoutError)
        peer.hold.set()
        assert [each.result().value for each in long] == list(range(5))
    assert peer.streams == 1


def test_a_timeout_counts_while_a_call_waits_for_the_window(warm: LossClient, peer: Peer) -> None:
    coalescer: Any = warm._connection.coalescer  # type: ignore[union-attr]
    coalescer._window._room = Room(2, 1000, 2, 1000)
    peer.hold.clear()
    with ThreadPoolExecutor(2) as pool:
        long = [pool.submit(call, warm, number) for number in (1, 2)]
        until(lambda: coalescer._window._room.requests == 2)
        with pytest.raises(DeadlineExceeded):
            call(warm, -1, timeout=0.05)
        peer.hold.set()
        assert [each.result().value for each in long] == [1, 2]
    assert -1.0 not in [value_of(request) for request in peer.requests]


def test_the_server_is_told_when_nobody_waits_any_more(warm: LossClient, peer: Peer) -> None:
    peer.hold.clear()
    with pytest.raises(DeadlineExceeded):
        call(warm, 5, timeout=0.05)
    assert peer.ended.wait(10)
    peer.hold.set()
    assert call(warm, 1).value == 1.0
    assert peer.streams == 2


@pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals are handled in the main thread"
)
def test_what_interrupts_a_call_ends_it(warm: LossClient, peer: Peer) -> None:
    class Interrupt(Exception):
        pass

    def interrupt(number: int, frame: Any) -> None:
        raise Interrupt

    def kill() -> None:
        peer.arrived.wait(10)
        signal.pthread_kill(main, signal.SIGUSR2)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR2, interrupt)
    peer.hold.clear()
    killer = threading.Thread(target=kill)
    try:
        killer.start()
        with pytest.raises(Interrupt):
            call(warm, 5)
    finally:
        killer.join()
        signal.signal(signal.SIGUSR2, before)
    assert peer.ended.wait(10)  # nobody else waits, so the server is told
    peer.hold.set()
    assert call(warm, 1).value == 1.0


def test_what_the_server_cannot_take_now_is_sent_again(target: str, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        times = sum(value_of(seen) == value_of(request) for seen in peer.requests)
        if times <= value_of(request) % 4:  # refused 0 to 3 times
            raise Refused(status(Code.UNAVAILABLE, "full", reason="QUEUE_FULL", retry_after=0.001))

    with LossClient(target, retries=2) as client:
        warmed(client, peer)
        peer.fail = fail
        outcomes = at_once(20, lambda number: call(client, number))
    for number, outcome in enumerate(outcomes):
        assert isinstance(outcome, Overloaded if number % 4 == 3 else LossResult)


def test_a_stream_that_breaks_is_replaced_and_nothing_is_lost(warm: LossClient, peer: Peer) -> None:
    contexts: list[Any] = []
    peer.fail_call = lambda _number, context: contexts.append(context)

    def break_once(request: pb.ComputeLossRequest) -> None:
        if value_of(request) == 15.0 and len(contexts) == 1:
            contexts[0].abort(Code.UNAVAILABLE, "restarting")

    peer.fail = break_once
    outcomes = at_once(20, lambda number: [call(warm, number + 20 * turn).value for turn in range(3)])
    assert outcomes == [[number, number + 20, number + 40] for number in range(20)]
    assert peer.streams == 2


def test_streams_that_go_on_breaking_fail_the_calls_after_their_retries(target: str, peer: Peer) -> None:
    with LossClient(target, retries=1) as client:
        warmed(client, peer)
        peer.fail_call = lambda _number, context: context.abort(Code.UNAVAILABLE, "gone")
        outcomes = at_once(3, lambda number: call(client, number))
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 3
        assert len(set(map(id, outcomes))) == 3
        peer.fail_call = lambda _number, _context: None
        assert call(client, 1).value == 1.0


def test_a_stream_that_ends_for_another_reason_fails_at_once(warm: LossClient, peer: Peer) -> None:
    peer.fail_call = lambda _number, context: context.abort(Code.UNAUTHENTICATED, "who are you")
    with pytest.raises(Unauthenticated, match="who are you"):
        call(warm, 1)
    assert peer.streams == 1


def test_what_knows_no_streams_gets_calls(target: str, peer: Peer) -> None:
    with LossClient(target) as client:
        warmed(client, peer)

        def no_streams(number: int, context: Any) -> None:
            if peer.streams:
                peer.streams = 0
                context.abort(Code.UNIMPLEMENTED, "no such method")

        peer.fail_call = no_streams
        assert [call(client, number).value for number in range(3)] == [0, 1, 2]
        assert [value_of(request) for request in peer.requests] == [0, 1, 2]
        assert peer.messages == []


def test_a_server_that_is_restarted_is_found_again() -> None:
    server = PeerServer()
    port = server.port
    with LossClient(server.target, retries=4) as client:
        warmed(client, server.peer)
        server.peer.hold.clear()
        with ThreadPoolExecutor(20) as pool:
            futures = [pool.submit(call, client, number) for number in range(20)]
            assert server.peer.arrived.wait(10)
            server.stop()
            server = PeerServer(f"127.0.0.1:{port}")
            assert [future.result().value for future in futures] == list(range(20))
    server.stop()


def test_a_server_that_drains_is_left_for_another_stream(warm: LossClient, peer: Peer) -> None:
    def fail(request: pb.ComputeLossRequest) -> None:
        if peer.streams == 1 and value_of(request) >= 5:
            raise Refused(status(Code.UNAVAILABLE, "drains", reason="DRAINING", retry_after=0.001))

    peer.fail = fail
    assert [call(warm, number).value for number in range(10)] == list(range(10))
    assert peer.streams == 2


def test_streams_do_not_get_old(warm: LossClient, peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thread_coalescer, "MAX_AGE_SECONDS", 0.02)
    rounds = 0
    deadline = time.monotonic() + 20
    while peer.streams < 4:
        assert time.monotonic() < deadline
        assert [each.value for each in at_once(8, lambda number: call(warm, number))] == list(range(8))
        rounds += 1
    assert len(peer.requests) == 8 * rounds  # none was sent twice


def test_a_stream_that_is_not_used_is_ended_and_nothing_is_left_running(
    target: str, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_coalescer, "MAX_IDLE_SECONDS", 1.0)
    with LossClient(target) as client:
        while not peer.streams:
            call(client, 1)
        peer.ended.clear()
        assert peer.ended.wait(10)
        until(no_reader_runs)
        assert peer.streams == 1


def test_closing_ends_the_calls(target: str, peer: Peer) -> None:
    client = warmed(LossClient(target), peer)
    peer.hold.clear()
    with ThreadPoolExecutor(9) as pool:
        futures = [pool.submit(call, client, number) for number in range(9)]
        coalescer: Any = client._connection.coalescer  # type: ignore[union-attr]
        until(lambda: coalescer._window._room.requests == 9)
        client.close()
        errors = [future.exception() for future in futures]
    assert [type(error) for error in errors] == [Cancelled] * 9
    assert len(set(map(id, errors))) == 9
    assert peer.ended.wait(10)
    until(no_reader_runs)
    with pytest.raises(RuntimeError, match="this client is closed"):
        call(client, 1)


def test_a_fault_of_ours_reaches_the_callers_and_the_next_calls_work(
    warm: LossClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def receive(*_: Any) -> None:
        raise LookupError("a fault")

    with monkeypatch.context() as patched:
        patched.setattr(call_window.CallWindow, "receive", receive)
        assert [str(error) for error in at_once(3, lambda number: call(warm, number))] == ["a fault"] * 3
    assert call(warm, 2).value == 2.0


def test_a_program_that_ends_without_closing_ends_at_once_and_quietly(target: str) -> None:
    program = """
import sys
import numpy as np
import lossgrad

client = lossgrad.LossClient(sys.argv[1])
print([client.l1(np.ones(2), np.zeros(2)).value for _ in range(5)])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, target], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "[1.0, 1.0, 1.0, 1.0, 1.0]\n"), done.stderr
    assert "Traceback" not in done.stderr
