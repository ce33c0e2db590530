"""The CPU kernels' entry points, called with addresses.

`resolve` turns Python buffers into addresses and needs the GIL. `compute` needs nothing of Python; it is called with the
GIL where it is over before another thread could use it, and without it everywhere else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from numba import int32, int64, types

from lossgrad_server.engine import cpu_native
from lossgrad_server.engine.cpu_blocks import LOOPS
from lossgrad_server.engine.cpu_broadcast import sum_gradient
from lossgrad_server.engine.cpu_finish import divide_rows, finish, finish_rows, prepare
from lossgrad_server.engine.cpu_intrinsics import array_at
from lossgrad_server.engine.cpu_layout import FRAME, INPUT, MASK, SUM, TARGET, WEIGHT, Walk
from lossgrad_server.engine.cpu_native import address_of, inlined, native
from lossgrad_server.engine.cpu_passes import walk, weigh
from lossgrad_server.engine.cpu_tables import frame_at, job_of, sum_steps, unit_counts
from lossgrad_server.work import SPEC_RESULT

_RESULT_BYTES: Final = SPEC_RESULT.size
_WEIGH_ALL, _WEIGH_ROWS, _DIVIDE_ROWS, _PREPARE, _WALK_ALL, _WALK_ROWS, _FINISH_ROWS, _FINISH, _SUM_INPUT, _SUM_TARGET = (
    int(one) for one in Walk
)

_get_item = types.ExternalFunction("PyList_GetItem", int64(int64, int64))
_get_buffer = types.ExternalFunction("PyObject_GetBuffer", int32(int64, int64, int32))
_release_buffer = types.ExternalFunction("PyBuffer_Release", types.void(int64))
_clear_error = types.ExternalFunction("PyErr_Clear", types.void())


class Call(ctypes.Structure):
    """The argument of `compute`: a FRAME for the first job, then what to do.

    With `walk` -1 it does `job_count` jobs, one behind the other in all that the frame points to, from first to last.
    Otherwise it does units `begin` to `end` of that walk of one job.
    """

    _fields_ = [(name, ctypes.c_int64) for name in (*(FRAME.names or ()), "walk", "job_count", "begin", "end")]


@native("int64(int64, int64, int64, int64)", "do_walk")
def _do_walk(address: int, which: int, begin: int, end: int) -> int:
    if which == _WALK_ALL:
        walk(address, 0, begin, end)
    elif which == _WALK_ROWS:
        walk(address, 1, begin, end)
    elif which == _WEIGH_ALL:
        weigh(address, 0, begin, end)
    elif which == _WEIGH_ROWS:
        weigh(address, 1, begin, end)
    elif which == _DIVIDE_ROWS:
        divide_rows(address, begin, end)
    elif which == _PREPARE:
        prepare(address)
    elif which == _FINISH_ROWS:
        finish_rows(address, begin, end)
    elif which == _FINISH:
        finish(address)
    elif which == _SUM_INPUT:
        sum_gradient(address, INPUT, begin, end)
    elif which == _SUM_TARGET:
        sum_gradient(address, TARGET, begin, end)
    return 0


@inlined
def _unit_count(frame: Any, which: Any) -> Any:
    """Return how many units of a walk a job has, 0 where it needs none. The same as the stages of its Program."""
    job = job_of(frame)
    flat, rows = unit_counts(job)
    has_weights = job.types[WEIGHT] != 0 or job.types[MASK] != 0
    if which == _PREPARE or which == _FINISH:
        return 1
    if which == _WEIGH_ALL:
        return flat if has_weights else 0
    if which == _WEIGH_ROWS:
        return rows if job.divides_rows else 0
    if which == _DIVIDE_ROWS:
        return job.row_count if job.divides_rows else 0
    if which == _WALK_ALL:
        return flat if job.has_flat_specs else 0
    if which == _WALK_ROWS:
        return rows if job.has_row_specs else 0
    if which == _FINISH_ROWS:
        return job.row_count if job.has_row_specs else 0
    offset = job.sum_offsets[INPUT if which == _SUM_INPUT else TARGET]
    if offset == 0 or job.element_count == 0:
        return 0
    steps, _ = sum_steps(array_at(frame.program + offset, 1, SUM)[0])
    return steps


@native("int64(int64)")
def compute(call: int) -> int:
    """Do what a Call says."""
    words = array_at(call, len(_CALL_FIELDS), np.int64)
    which = words[_WALK]
    if which >= 0:
        return _do_walk(call, which, words[_BEGIN], words[_END])
    frame = frame_at(call)
    for _ in range(words[_JOB_COUNT]):
        job = job_of(frame)
        for one in range(_SUM_TARGET + 1):
            count = _unit_count(frame, one)
            if count > 0:
                _do_walk(call, one, 0, count)
        words[_PROGRAM] += job.program_bytes
        words[_OPERANDS] += 8 * job.operand_count
        words[_OUTPUTS] += job.output_bytes
        words[_RESULTS] += _RESULT_BYTES * job.spec_count
    return 0


_CALL_FIELDS: Final = tuple(name for name, *_ in Call._fields_)
_PROGRAM, _OPERANDS, _OUTPUTS, _RESULTS, _WALK, _JOB_COUNT, _BEGIN, _END = map(
    _CALL_FIELDS.index, ("program", "operands", "outputs", "results", "walk", "job_count", "begin", "end")
)


@native("int64(int64, int64, int64, int64, int64)")
def resolve(buffers: int, count: int, addresses: int, lengths: int, view: int) -> int:
    """Write the addresses and lengths in bytes of the buffers of a list. Returns how many it could; stops at the first.

    `view` is where a Py_buffer fits: 80 bytes. The buffers stay where they are for as long as somebody holds them.
    """
    own_addresses = array_at(addresses, count, np.int64)
    own_lengths = array_at(lengths, count, np.int64)
    # A Py_buffer begins with the memory's address, its owner and its length.
    fields = array_at(view, 3, np.int64)
    for index in range(count):
        if _get_buffer(_get_item(buffers, index), view, int32(0)) != 0:
            _clear_error()
            return index
        own_addresses[index] = fields[0]
        own_lengths[index] = fields[2]
        _release_buffer(view)
    return count


@dataclass(frozen=True, slots=True)
class Kernel:
    """The compiled entry points, as Python calls them, and the array of the loops' addresses."""

    compute_holding_gil: Callable[[Any], int]
    compute_without_gil: Callable[[Any], int]
    resolve: Callable[[list[Any], int, int, int, int], int]
    loops: Any


@cache
def load_kernel() -> Kernel:
    """Return the kernels, from the cache or compiled: seconds, so call it before the first request."""
    cpu_native.load()
    word = ctypes.c_int64
    return Kernel(
        compute_holding_gil=ctypes.PYFUNCTYPE(word, ctypes.c_void_p)(address_of(compute)),
        compute_without_gil=ctypes.CFUNCTYPE(word, ctypes.c_void_p)(address_of(compute)),
        resolve=ctypes.PYFUNCTYPE(word, ctypes.py_object, word, word, word, word)(address_of(resolve)),
        loops=np.array([address_of(loop) for loop in LOOPS], np.int64),
    )
