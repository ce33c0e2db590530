"""The tables that the CPU kernels read, and where their memory lies. Who fills them in: cpu_program.py. No numba here.

A plan becomes one program: a JOB record, its SPEC records, its OUTPUT records and, where an operand is broadcast, a LAYOUT
record and SUM records. Programs stand one behind the other in a batch.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

import numpy as np

from lossgrad_server.jobs import MAX_RANK, MAX_SPECS

# Every reduction is cut into chunks of this many elements; each becomes one float64 partial sum.
CHUNK: Final = 4096
# Element i of a chunk is added to lane i % LANES; at the chunk's end the lanes are folded in half until one is left.
LANES: Final = 32
# Samples of at most this many elements are computed several at a time.
SHORT_ROW: Final = 64
# The elements that are brought at a time, so that what is between the steps stays in the nearest cache.
BLOCK: Final = 512


class Loop(IntEnum):
    """The loops of cpu_blocks.py. Those of a `pair` subtract two float32 operands themselves."""

    PAIR = 0
    PAIR_GRADIENT = 1
    PAIR_LOSS = 2
    PAIR_LOSS_GRADIENT = 3
    PLAIN = 4
    PLAIN_GRADIENT = 5
    PLAIN_WIDE_GRADIENT = 6
    FULL = 7
    FLOAT64_PLAIN = 8
    FLOAT64_GRADIENT = 9
    FLOAT64_FULL = 10
    PAIR_STREAMED_GRADIENT = 11
    PLAIN_STREAMED_GRADIENT = 12
    FLOAT64_STREAMED_GRADIENT = 13


class Walk(IntEnum):
    """What there is to do for a job, in the order in which it must be done."""

    WEIGH_ALL = 0
    WEIGH_ROWS = 1
    DIVIDE_ROWS = 2
    PREPARE = 3
    WALK_ALL = 4
    WALK_ROWS = 5
    FINISH_ROWS = 6
    FINISH = 7
    SUM_INPUT = 8
    SUM_TARGET = 9


STREAMED_LOOPS: Final = (Loop.PAIR_STREAMED_GRADIENT, Loop.PLAIN_STREAMED_GRADIENT, Loop.FLOAT64_STREAMED_GRADIENT)

# A job's operands, by their place in the tables.
INPUT, TARGET, WEIGHT, MASK = range(4)

_word = np.int64
_WALK_COUNT: Final = len(Walk)
JOB: Final = np.dtype(
    [
        ("program_bytes", _word),
        ("element_count", _word),
        ("is_float64", _word),  # what is computed in: float64, or float32 for everything else
        ("is_weighted", _word),  # whether blocks need weights
        ("is_pair", _word),  # whether its loop is one for a pair
        ("streams", _word),  # whether that loop writes past the caches
        ("pair_type", _word),  # the type of both input and target where they are of one type and shape, otherwise 0
        ("spec_count", _word),
        ("operand_count", _word),
        ("output_count", _word),
        ("output_bytes", _word),
        ("result_bytes", _word),  # its SPEC_RESULT records, and SPEC_TOTAL records behind them
        ("layout_offset", _word),  # from the program's start, 0 where nothing is broadcast
        ("types", _word, (4,)),  # of the operands, 0 where there is none
        ("is_broadcast", _word, (4,)),
        ("operand_bytes", _word, (4,)),  # in the order in which they come
        ("row_count", _word),  # the samples of per-sample reductions, and their length; 0 without such reductions
        ("row_length", _word),
        ("divides_rows", _word),  # whether a mean over each sample divides by that sample's weights
        # The SUM records of input and target, from the program's start; 0 where no gradient is summed.
        ("sum_offsets", _word, (2,)),
        # The units of each Walk, 0 where there is nothing to do; and of the walks over all elements and over the samples.
        ("units", _word, (_WALK_COUNT,)),
        ("flat_units", _word),
        ("row_units", _word),
        # Where in the job's state, in words, the partial sums are: planes of one word for each unit. First the weights;
        # in a walk over all elements the counts of what is not masked; then for each spec its losses and how many of
        # them are not finite. Then the samples' divisors, and the running sums of broadcast gradients.
        ("flat_planes", _word),
        ("row_planes", _word),
        ("row_divisors", _word),
        ("running_sums", _word),
        # For jobs that want totals, otherwise 0: for each spec the least loss of each unit, and the greatest.
        ("extreme_planes", _word),
        ("state_words", _word),
    ]
)
SPEC: Final = np.dtype(
    [
        ("kind", _word),
        ("parameter", np.float64),
        ("reduction", _word),
        ("denominator", np.float64),  # NaN where there is none
        ("gradient_scale", np.float64),
        # cpu_formulas.Factors
        ("limit", np.float64),
        ("divisor", np.float64),
        ("inverse_divisor", np.float64),
        ("slope", np.float64),
        ("edge", np.float64),
        ("half", np.float64),
        ("scale", np.float64),
        ("second_scale", np.float64),
        ("is_per_sample", _word),
        ("divides_rows", _word),  # whether each sample is divided by its own weights
        ("loop", _word),
        ("sum_loop", _word),  # the loop for the gradients of broadcast operands
        ("stores", _word),  # whether anything is left in scratch memory that must be stored
        ("is_full", _word),  # whether the loop is a `full` one: gradient and loss are left in scratch memory
        # Which of the job's outputs each tensor is, -1 where it is not sent. A gradient is `direct` where a plain loop
        # writes it at once, `summed` where the operand was broadcast.
        ("loss_output", _word),
        ("direct_gradient_output", _word),
        ("input_gradient_output", _word),
        ("target_gradient_output", _word),
        ("summed_input_gradient_output", _word),
        ("summed_target_gradient_output", _word),
    ]
)
OUTPUT: Final = np.dtype([("data_type", _word), ("byte_count", _word), ("offset", _word)])
# The result's shape, outermost dimension first, with dimensions made one wherever that changes no operand's order, and
# by how many elements each operand moves along each of them: 0 where it is broadcast.
LAYOUT: Final = np.dtype([("rank", _word), ("shape", _word, (MAX_RANK,)), ("strides", _word, (4, MAX_RANK))])
# How the gradient of a broadcast operand is summed back to its shape (cpu_sums.py). Along the result's innermost
# dimensions as the operand sees them, `kept` elements are told apart and `reduced` are summed, `kept` being the inner of
# the two or the outer; what remains are the outer dimensions, kept ones and reduced ones, outermost first.
SUM: Final = np.dtype(
    [
        ("kept_is_inner", _word),
        ("kept", _word),
        ("reduced", _word),
        # How many of each make up one step: about a chunk of elements. Where `kept` is the inner, `rows` of the other are
        # added side by side.
        ("kept_per_step", _word),
        ("reduced_per_step", _word),
        ("rows", _word),
        ("kept_rank", _word),
        ("kept_shape", _word, (MAX_RANK,)),
        ("kept_strides", _word, (MAX_RANK,)),
        ("reduced_rank", _word),
        ("reduced_shape", _word, (MAX_RANK,)),
        ("reduced_strides", _word, (MAX_RANK,)),
        ("outer_kept", _word),
        ("outer_reduced", _word),
        # Steps that fill the same elements make a group: they must be done in order.
        ("group", _word),
        ("group_count", _word),
    ]
)
# Where a job's memory lies: addresses. `operands` is the address of an array of addresses.
FRAME: Final = np.dtype(
    [(name, _word) for name in ("program", "operands", "outputs", "results", "state", "scratch", "loops")]
)

# Gradients of this size are written past the caches: they do not stay there in any case, and a cache would first read
# what is to be overwritten. Measured: 10 million float32 elements take 0.33 ns each, and 0.45 through the caches.
STREAMED_BYTES: Final = 1 << 23

# Outputs start on cache lines.
OUTPUT_ALIGNMENT: Final = 64

# Scratch memory, one for each thread: offsets in bytes. First blocks of float64. Written ones start elsewhere within
# 512 bytes, a row of lanes, than those read at the same time: a load from where a store 4 KiB away is still under way
# waits for it (measured: a block takes up to 4 times as long).
_BLOCK_BYTES: Final = 8 * BLOCK
SCRATCH_DIFFERENCE: Final = 0
SCRATCH_WEIGHT: Final = _BLOCK_BYTES + 64
SCRATCH_SCALE: Final = 2 * _BLOCK_BYTES + 128
SCRATCH_GRADIENT: Final = 3 * _BLOCK_BYTES + 320
SCRATCH_LOSS: Final = 4 * _BLOCK_BYTES + 384
SCRATCH_INPUT: Final = 5 * _BLOCK_BYTES + 512 + 192
SCRATCH_TARGET: Final = 6 * _BLOCK_BYTES + 512 + 256
# A block's mask, a byte for each element, 0 or 1.
SCRATCH_MASK: Final = 7 * _BLOCK_BYTES + 1024
# Where the elements of a broadcast operand lie, and the elements themselves as they came.
SCRATCH_OFFSETS: Final = SCRATCH_MASK + BLOCK
SCRATCH_GATHERED: Final = SCRATCH_OFFSETS + _BLOCK_BYTES
SCRATCH_INDICES: Final = SCRATCH_GATHERED + _BLOCK_BYTES
# Sums of short runs (cpu_sums.fold_runs), and what they lost.
SCRATCH_RUNS: Final = SCRATCH_INDICES + 8 * MAX_RANK
SCRATCH_RUNS_LOST: Final = SCRATCH_RUNS + _BLOCK_BYTES
# The sums' lanes, and what they lost, for each spec.
SCRATCH_LANES: Final = SCRATCH_RUNS_LOST + _BLOCK_BYTES
SCRATCH_LOST: Final = SCRATCH_LANES + MAX_SPECS * 8 * LANES
# Three numbers that recompute_block returns.
SCRATCH_SPECIAL: Final = SCRATCH_LOST + MAX_SPECS * 8 * LANES
# Lanes, and what they lost, of a sum that only tells whether all is finite.
SCRATCH_SPARE: Final = SCRATCH_SPECIAL + 64
# Each spec's lanes of the least and of the greatest losses.
SCRATCH_EXTREMES: Final = SCRATCH_SPARE + 2 * 8 * LANES
SCRATCH_BYTES: Final = SCRATCH_EXTREMES + MAX_SPECS * 2 * 8 * LANES

# A job's state: words of 8 bytes, float64 all of them. First the two totals, then for each spec what it needs for the
# gradient, then the partial sums (`state_words`).
STATE_COUNT, STATE_WEIGHT_SUM = range(2)
STATE_SPECS: Final = 2
SPEC_FACTOR, SPEC_EDGE, SPEC_DIVISOR, SPEC_STATE_WORDS = range(4)
# The running sums of a spec's broadcast gradient, what they lost, and the same of the step that is being added.
RUNNING_WORDS: Final = 4 * BLOCK
