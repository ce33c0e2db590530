"""The device's worker in a process of its own, which may die, hang or be killed without the server (docs/architecture.md).

`worker.py` is what the batcher sees, `keeper.py` keeps a process there, `link.py` talks to it, `nursery.py` is the program
that the processes are forked from, `device_process.py` what runs in them, `records.py` and `memory.py` what crosses.
"""
