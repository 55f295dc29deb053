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

from . import cache_command, doctor_command, explain_command, options, warm_command
from .command import UsageError, UserCodeError
from .errors import CacheError, CompileError, UnsupportedError
from .tune import db

PROGRAM = "python -m jax_bolt"
_EXAMPLES = """\
examples:
  python -m jax_bolt doctor                      is all here that kernels need?
  python -m jax_bolt explain model.py:predict    what runs, and why
  python -m jax_bolt tune model.py:predict       ahead of time, on the GPU
  python -m jax_bolt advise model.py:predict     other activations, channels, layers
  python -m jax_bolt cache export tuned.zip      take the results elsewhere

`COMMAND --help` has more. The exit status is 0 when done, 1 when not, and 2 when the
command was not understood.
"""


def make_parser() -> argparse.ArgumentParser:
    """Of the whole command line; ``run`` of what it parses runs the command."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Convs and matrix products of JAX programs on fused kernels: "
        "what runs and why, tuning, and what is kept on disk.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=db.versions())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (doctor_command, explain_command, warm_command, cache_command):
        command.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status. Only a fault of ours ends in a traceback."""
    args, unknown = make_parser().parse_known_args(arguments)  # may exit, with 0 or 2
    if unknown:  # which parse_args would say with the usage of all commands
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    try:
        if args.run is not doctor_command.run:  # which says more of it
            for text in options.unknown(os.environ).values():
                print(f"{PROGRAM}: note: {text}", file=sys.stderr)
            options.current()
    except ValueError as error:  # of a variable in the environment
        return _fail(error, 2)
    try:
        status = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        return _fail(error, 2)
    except BrokenPipeError:  # `... | head`
        # Else Python itself would fail, and say so, when it flushes at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except (CacheError, CompileError, UnsupportedError, UserCodeError) as error:
        return _fail(error, 1)
    except OSError as error:
        place = f": {error.filename}" if error.filename is not None else ""
        return _fail(f"{error.strerror or error}{place}", 1)
    return status or 0


def _fail(what: object, status: int) -> int:
    print(f"{PROGRAM}: error: {what}", file=sys.stderr)
    return status
