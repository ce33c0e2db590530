"""The CPU kernels' entry points.

`gather` turns Python buffers into addresses and holds the GIL. `compute` needs nothing of Python; it is called with the
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
from lossgrad_server.engine.cpu_layout import FRAME, INPUT, JOB, TARGET, Walk
from lossgrad_server.engine.cpu_native import address_of, native
from lossgrad_server.engine.cpu_passes import walk, weigh
from lossgrad_server.engine.cpu_tables import frame_at, job_of

(
    _WEIGH_ALL,
    _WEIGH_ROWS,
    _DIVIDE_ROWS,
    _PREPARE,
    _WALK_ALL,
    _WALK_ROWS,
    _FINISH_ROWS,
    _FINISH,
    _SUM_INPUT,
    _SUM_TARGET,
) = (int(one) for one in Walk)
_WALK_COUNT: Final = len(Walk)

_get_item = types.ExternalFunction("PyList_GetItem", int64(int64, int64))
_get_buffer = types.ExternalFunction("PyObject_GetBuffer", int32(int64, int64, int32))
_release_buffer = types.ExternalFunction("PyBuffer_Release", types.void(int64))
_clear_error = types.ExternalFunction("PyErr_Clear", types.void())


class Call(ctypes.Structure):
    """The argument of `compute`: a FRAME for the first job, then what to do.

    With `walk` -1 it does `job_count` jobs, one behind the other in all that the frame points to, from first to last.
    Otherwise it does units `begin` to `end` of that walk of one job.
    """

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*(FRAME.names or ()), "walk", "job_count", "begin", "end")),
        # For `gather`: room for an address of each operand, and whether to compute at once.
        ("addresses", ctypes.c_int64),
        ("computes", ctypes.c_int64),
        ("py_buffer", ctypes.c_int64 * 10),  # where `gather` has room for one
    ]


_WORD_COUNT: Final = ctypes.sizeof(Call) // 8
_PROGRAM, _OPERANDS, _OUTPUTS, _RESULTS, _WALK, _JOB_COUNT, _BEGIN, _END, _ADDRESSES, _COMPUTES, _PY_BUFFER = (
    getattr(Call, name).offset // 8
    for name in (
        *("program", "operands", "outputs", "results", "walk", "job_count", "begin", "end"),
        *("addresses", "computes", "py_buffer"),
    )
)


@native("int64(int64, int64, int64, int64)")
def do_walk(address: int, which: int, begin: int, end: int) -> int:
    """Do units of a walk of one job."""
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


@native("int64(int64)")
def compute(call: int) -> int:
    """Do what a Call says."""
    words = array_at(call, _WORD_COUNT, np.int64)
    which = words[_WALK]
    if which >= 0:
        return do_walk(call, which, words[_BEGIN], words[_END])
    frame = frame_at(call)
    program, operands, outputs, results = words[_PROGRAM], words[_OPERANDS], words[_OUTPUTS], words[_RESULTS]
    for _ in range(words[_JOB_COUNT]):
        job = job_of(frame)
        for one in range(_WALK_COUNT):
            count = job.units[one]
            if count > 0:
                do_walk(call, one, 0, count)
        words[_PROGRAM] += job.program_bytes
        words[_OPERANDS] += 8 * job.operand_count
        words[_OUTPUTS] += job.output_bytes
        words[_RESULTS] += job.result_bytes
    words[_PROGRAM], words[_OPERANDS], words[_OUTPUTS], words[_RESULTS] = program, operands, outputs, results
    return 0


@native("int64(int64, int64, int64)")
def gather(call: int, code: int, buffers: int) -> int:
    """Fill in a Call for its `job_count` jobs, whose programs are at `code`, and compute them if it `computes`.

    `buffers` is a list of the jobs' operands and, behind them, the memory for their outputs. Returns 0, or the number of
    the first job, from 1, whose operands are not as its program says: that is found before anything is computed. The
    buffers stay where they are for as long as somebody holds them.
    """
    words = array_at(call, _WORD_COUNT, np.int64)
    job_count = words[_JOB_COUNT]
    addresses = words[_ADDRESSES]
    view = call + 8 * _PY_BUFFER
    # A Py_buffer begins with the memory's address, its owner and its length in bytes.
    fields = array_at(view, 3, np.int64)
    program = code
    place = 0
    for index in range(job_count):
        job = array_at(program, 1, JOB)[0]
        for operand in range(job.operand_count):
            if _get_buffer(_get_item(buffers, place), view, int32(0)) != 0:
                _clear_error()
                return index + 1
            array_at(addresses + 8 * place, 1, np.int64)[0] = fields[0]
            length = fields[2]
            _release_buffer(view)
            if length != job.operand_bytes[operand]:
                return index + 1
            place += 1
        program += job.program_bytes
    if _get_buffer(_get_item(buffers, place), view, int32(0)) != 0:
        _clear_error()
        return job_count
    words[_OUTPUTS] = fields[0]
    _release_buffer(view)
    words[_PROGRAM] = code
    words[_OPERANDS] = addresses
    return compute(call) if words[_COMPUTES] else 0


@dataclass(frozen=True, slots=True)
class Kernel:
    """The compiled entry points, as Python calls them, and the array of the loops' addresses."""

    compute_without_gil: Callable[[Any], int]
    gather: Callable[[Any, bytes, list[Any]], int]
    loops: Any


@cache
def load_kernel() -> Kernel:
    """Return the kernels, from the cache or compiled: seconds, so call it before the first request."""
    cpu_native.load()
    word, pointer = ctypes.c_int64, ctypes.c_void_p
    return Kernel(
        compute_without_gil=ctypes.CFUNCTYPE(word, pointer)(address_of(compute)),
        gather=ctypes.PYFUNCTYPE(word, pointer, ctypes.c_char_p, ctypes.py_object)(address_of(gather)),
        loops=np.array([address_of(loop) for loop in LOOPS], np.int64),
    )
