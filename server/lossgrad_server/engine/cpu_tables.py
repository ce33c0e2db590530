"""A job's tables and memory as compiled code reads them: the records of cpu_layout.py, by address."""

from __future__ import annotations

from typing import Any

import numpy as np

from lossgrad_server.engine.cpu_intrinsics import array_at
from lossgrad_server.engine.cpu_layout import (
    FRAME,
    JOB,
    LANES,
    OUTPUT,
    SCRATCH_DIFFERENCE,
    SCRATCH_LANES,
    SCRATCH_LOST,
    SCRATCH_SINGLES,
    SPEC,
    SPEC_STATE_WORDS,
    STATE_SPECS,
)
from lossgrad_server.engine.cpu_native import inlined

_JOB_BYTES, _SPEC_BYTES, _OUTPUT_BYTES = JOB.itemsize, SPEC.itemsize, OUTPUT.itemsize


@inlined
def frame_at(address: Any) -> Any:
    """Return the FRAME record at an address."""
    return array_at(address, 1, FRAME)[0]


@inlined
def job_of(frame: Any) -> Any:
    """Return the frame's JOB record."""
    return array_at(frame.program, 1, JOB)[0]


@inlined
def spec_address(frame: Any, index: Any) -> Any:
    """Return the address of a SPEC record."""
    return frame.program + _JOB_BYTES + index * _SPEC_BYTES


@inlined
def spec_of(frame: Any, index: Any) -> Any:
    """Return a SPEC record."""
    return array_at(spec_address(frame, index), 1, SPEC)[0]


@inlined
def output_of(frame: Any, job: Any, index: Any) -> Any:
    """Return an OUTPUT record."""
    first = frame.program + _JOB_BYTES + job.spec_count * _SPEC_BYTES
    return array_at(first + index * _OUTPUT_BYTES, 1, OUTPUT)[0]


@inlined
def state_of(frame: Any, start: Any, count: Any) -> Any:
    """Return words of the job's state."""
    return array_at(frame.state + 8 * start, count, np.float64)


@inlined
def spec_state(frame: Any, index: Any) -> Any:
    """Return the words of the state that belong to one spec: SPEC_FACTOR and so on."""
    return state_of(frame, STATE_SPECS + index * SPEC_STATE_WORDS, SPEC_STATE_WORDS)


@inlined
def lanes_of(frame: Any, index: Any) -> Any:
    """Return the address of a spec's lanes."""
    return frame.scratch + SCRATCH_LANES + index * 8 * LANES


@inlined
def lost_of(frame: Any, index: Any) -> Any:
    """Return the address of what a spec's lanes lost."""
    return frame.scratch + SCRATCH_LOST + index * 8 * LANES


@inlined
def differences_of(frame: Any, spec: Any) -> Any:
    """Return the address of the differences that a spec's loop reads, in float32 or float64, where it reads no operands."""
    is_wide = job_of(frame).is_float64 or spec.is_full
    return frame.scratch + (SCRATCH_DIFFERENCE if is_wide else SCRATCH_SINGLES)
