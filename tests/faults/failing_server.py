"""lossgrad-server whose device's process fails at requests of certain numbers of elements. Run as a program.

The failures are those of tests/server/isolation/failing_nursery.py: real ends of a real process.
"""

from __future__ import annotations

import sys
from functools import partial
from unittest import mock

from lossgrad_server import __main__, workers
from lossgrad_server.isolation.keeper import ProcessSettings
from tests.server.isolation.failing_nursery import PROGRAM


def main() -> int:
    with mock.patch.object(workers, "ProcessSettings", partial(ProcessSettings, program=PROGRAM)):
        return __main__.main()


if __name__ == "__main__":
    sys.exit(main())
