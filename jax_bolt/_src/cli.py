# SPDX-License-Identifier: Apache-2.0
"""The command line: ``python -m jax_bolt``.

Results go to stdout, and what went wrong, with what to do about it, to stderr. The exit
status is 0 when done, 1 when not, and 2 when the command was not understood.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from . import cache_command, options, warm_command
from .errors import CacheError, CompileError, UnsupportedError

PROGRAM = "python -m jax_bolt"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Only a fault of ours ends in a traceback."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Builds and looks after what jax_bolt keeps on disk."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    cache_command.add_to(commands)
    warm_command.add_to(commands)
    args = parser.parse_args(arguments)  # exits itself, with 0 or 2
    try:
        options.current()
    except ValueError as error:  # of a variable in the environment
        return _fail(error, 2)
    try:
        args.run(args)
        sys.stdout.flush()
    except cache_command.UsageError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # `... | head`
        # Else Python itself would fail, and say so, when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except (CacheError, CompileError, UnsupportedError) as error:
        return _fail(error, 1)
    except OSError as error:
        place = f": {error.filename}" if error.filename is not None else ""
        return _fail(f"{error.strerror or error}{place}", 1)
    return 0


def _fail(what: object, status: int) -> int:
    print(f"{PROGRAM}: error: {what}", file=sys.stderr)
    return status
