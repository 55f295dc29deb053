# SPDX-License-Identifier: Apache-2.0
"""The errors jax_bolt raises on purpose; each message says what to do next."""

from __future__ import annotations

import re


class CompileError(RuntimeError):
    """No kernel could be built: no usable compiler, or the compiler refused.

    ``log`` is everything the compiler printed (empty when it never ran). The text of
    the error repeats the lines of it that matter, so that a traceback is enough to act
    on; ``message`` is the text without them.
    """

    message: str
    log: str

    def __init__(self, message: str, log: str = "") -> None:
        self.message = message
        self.log = log
        super().__init__("\n".join([message, *_telling_lines(log)]))

    def __reduce__(self) -> tuple[type[CompileError], tuple[str, str]]:
        # Exceptions pickle by args, which here hold the joined text.
        return type(self), (self.message, self.log)


def _telling_lines(log: str) -> list[str]:
    """The first errors of a log, or its end where none is marked as one."""
    # One error inside CUTLASS brings pages of "instantiation of ..." with it.
    lines = [line[:300] for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\b(error|fatal)\b|C7510", line)]
    return errors[:10] or lines[-20:]


class UnsupportedError(ValueError):
    """A value jax_bolt has no kernel for; the message names the value."""


class CacheError(RuntimeError):
    """The kernel store or tuning files cannot be used; the message has the fix."""
