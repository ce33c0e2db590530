"""The command `lossgrad-server`, also `python -m lossgrad_server`."""

from __future__ import annotations

import asyncio
import os
import sys

from lossgrad_api.allocator import keep_large_blocks
from lossgrad_server import logs
from lossgrad_server.config import ConfigError, from_command_line


def main() -> int:
    """Serve until told to stop. Returns 0 after a drain, 2 where a setting cannot be used, 3 after the device was lost.

    With several processes, where one of them cannot be started, what that one returned.
    """
    try:
        config = from_command_line(sys.argv[1:])
        logs.configure(config.log_level, config.log_format)
        keep_large_blocks()  # before torch and gRPC start threads, each of which would get an arena of its own
        from lossgrad_server.security import security

        security(config)  # files that cannot be read are told at once, too
        if config.processes > 1:
            from lossgrad_server.processes import parent

            return asyncio.run(parent.run(config))
        # Only now, so that --help and a bad setting do not wait seconds for what computes.
        from lossgrad_server.app import DeviceLost, run
        from lossgrad_server.engine import cpu_target

        cpu_target.choose(os.environ)

        try:
            asyncio.run(run(config))
        except DeviceLost as error:
            print(f"lossgrad-server: {error}", file=sys.stderr)  # noqa: T201
            return 3
    except ConfigError as error:
        print(f"lossgrad-server: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
