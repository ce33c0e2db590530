"""`python -m lossgrad.cli`: the command, where its script is not on the path."""

import sys

from lossgrad.cli.command import main

sys.exit(main())
