"""The `lossgrad` command. `main` is its entry point; arguments.py has its command line, and each command has its module."""

from lossgrad.cli.command import main

__all__ = ["main"]
