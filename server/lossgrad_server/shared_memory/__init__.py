"""Memory that callers on this machine share with the server, so that tensors need not travel. docs/shared-memory.md.

There are two kinds. `segments.py`: memory that the server makes, seals and hands out over a socket (`handover.py`); it is
computed in where it lies. `system.py`: POSIX shared memory that Open Inference clients make and name; it is never mapped,
because whoever made it may cut it short under a mapping, which kills a process that touches it, but read and written by
calls that then fail. And, only where it is asked for, `cuda.py`: GPU memory, copied by a process that may die of it. All of
it belongs to the event loop's thread, except for the copying.
"""
