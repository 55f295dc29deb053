# SPDX-License-Identifier: Apache-2.0
"""Which candidates go on: from base programs to kernels, from kernels to the choice.

Pure, and the same every time: times that differ by no more than noise count as equal,
and of equals the one that the rank model has first wins, or the one that was chosen
before.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from .. import plan
from ..plan import AnyCandidate, C
from . import db
from .isolate import Timing

# What two measurements of one kernel may differ by. XLA keeps a site unless a kernel
# is faster by more, and so does what was chosen before.
MARGIN = 0.98
_MAX_TIE = 0.05  # a spread above this says that the GPU is shared, not that all tie

_BY_TIME = 3
_UNTIMED = 3  # of those without a base program
# Fewer times than these say too little of a form: its kernels are built by rank.
_ENOUGH = 4
_FAR = 1.15  # of the best time: kinds that are slower than that are not tried


@dataclasses.dataclass(frozen=True, slots=True)
class Timed:
    """A candidate that ran, and its own time."""

    candidate: AnyCandidate
    digest: str
    timing: Timing


def finalists(
    found: Sequence[C],
    times: Mapping[C, float],
    before: db.Entry | None,
) -> list[C]:
    """The candidates to build with the region's own epilogue, in the order found.

    ``times`` are of those that a base program stood for. Of every form: the fastest, of
    different kinds where these are about as fast; the first by rank; the first of those
    without a time; and what was chosen ``before``.
    """
    groups: dict[str, list[C]] = {}
    for candidate in found:
        groups.setdefault(candidate.form.name, []).append(candidate)
    chosen: set[C] = set()
    for group in groups.values():
        timed = sorted((c for c in group if c in times), key=times.__getitem__)
        if len(timed) < _ENOUGH:
            chosen.update(plan.likeliest(group))
            continue
        first = plan.likeliest(group)
        chosen.update(_fastest(timed, times))
        chosen.add(first[0])
        chosen.update([c for c in first if c not in times][:_UNTIMED])
    return [c for c in found if c in chosen or is_of(before, c)]


def _fastest(timed: Sequence[C], times: Mapping[C, float]) -> list[C]:
    near = [c for c in timed if times[c] <= _FAR * times[timed[0]]]
    chosen: list[C] = []
    for candidate in near:
        if candidate.kind not in {c.kind for c in chosen}:
            chosen.append(candidate)
    chosen += [c for c in timed if c not in chosen]
    return chosen[:_BY_TIME]


def savings(groups: Sequence[Sequence[AnyCandidate]]) -> int:
    """Kernels that need not be built, at most, where all of these have times."""
    saved = 0
    for found in groups:
        forms = collections.Counter(c.form.name for c in plan.likeliest(found))
        saved += sum(max(0, n - _BY_TIME - 1) for n in forms.values())
    return saved


def in_order(timed: Sequence[Timed], before: db.Entry | None) -> list[Timed]:
    """The candidates of one form, given in order of rank, the choice first."""
    if not timed:
        return []
    fastest = min(timed, key=lambda t: t.timing.micros)
    tie = min(max(1 / MARGIN - 1, fastest.timing.spread), _MAX_TIE)
    limit = fastest.timing.micros * (1 + tie)

    def key(position: int) -> tuple[int, float]:
        one = timed[position]
        if is_of(before, one.candidate):
            keeps = one.timing.micros * MARGIN <= fastest.timing.micros
            if keeps:
                return 0, 0.0
        if one.timing.micros <= limit:
            return 1, position
        return 2, one.timing.micros

    return [timed[i] for i in sorted(range(len(timed)), key=key)]


def choice(time_us: float, xla_us: float, before: db.Entry | None) -> str:
    """ "kernel" or "xla": what was chosen before stays unless clearly beaten."""
    was_kernel = before is not None and before.choice == "kernel"
    bound = xla_us / MARGIN if was_kernel else xla_us * MARGIN
    return "kernel" if time_us < bound else "xla"


def is_of(entry: db.Entry | None, candidate: AnyCandidate) -> bool:
    """Whether the entry names the candidate; whatever it was built from."""
    return entry is not None and (entry.form, entry.template, entry.config) == (
        candidate.form.name,
        candidate.template.name,
        candidate.config.text,
    )
