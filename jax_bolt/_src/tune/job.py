# SPDX-License-Identifier: Apache-2.0
"""A region or a chain that is being tuned, and where the time of tuning goes."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

from ..chain import AnySite
from ..plan import AnyCandidate
from . import db
from .rival import Rival

# What tuning took in this process, in seconds: for the benchmark.
spent: dict[str, float] = {}


@contextlib.contextmanager
def spending_on(what: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        spent[what] = spent.get(what, 0.0) + time.monotonic() - start


class Untunable(Exception):
    """Why a region could not be tuned; it runs on XLA in this process."""


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """A region that is being tuned.

    ``before`` is an earlier result for it. ``problems`` are for the log, ``notes`` for
    the entry: candidates that crashed or did not end. ``parts`` are candidates for a
    part of the region, which are tried where XLA is faster than ``found``. ``rival`` is
    a chain's.
    """

    site: AnySite
    found: list[AnyCandidate]
    before: db.Entry | None
    sets: int
    rival: Rival | None
    parts: list[AnyCandidate]
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def sources(self) -> list[str]:
        return [c.source for c in self.found]


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
