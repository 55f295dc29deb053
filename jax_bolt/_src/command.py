# SPDX-License-Identifier: Apache-2.0
"""What the commands of ``python -m jax_bolt`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from . import arch
from .errors import UnsupportedError


class UsageError(Exception):
    """The command cannot be run as it was given."""


class UserCodeError(Exception):
    """The code that a command was given raised an error; the message tells it."""


def add_parser(
    commands: Any, name: str, text: str, examples: str, run: Callable | None = None
) -> argparse.ArgumentParser:
    """A parser for ``name`` with a line of ``text`` and ``examples`` below its help.

    ``run`` is called with the parsed arguments, of which ``parser`` is this one; its
    result, if any, is the exit status.
    """
    parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if run is not None:
        parser.set_defaults(run=run, parser=parser)
    return parser


def architecture(name: str | None) -> arch.GpuArch | None:
    """What ``--arch`` names, if it was given; UsageError where it is unknown."""
    try:
        return None if name is None else arch.from_name(name)
    except UnsupportedError as error:
        raise UsageError(error) from error


def printable(text: str) -> str:
    """``text`` without what would steer a terminal: names may come from files."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
