# SPDX-License-Identifier: Apache-2.0
"""One root of a program: what runs it and why, its chains; sums over several; pools."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from . import ir
from .floor import Floor

NOTHING = "no conv or product here"  # of a function without sites
UNSEEN = (
    "what is in a callback (jax.pure_callback), an exported program or another "
    "library's kernel is not seen; docs/troubleshooting.md has more, at "
    '"The report has no sites"'
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A chain that a site could be part of, with the site or sites called ``other``.

    position: "first", "second" or "third", the site's.
    stored: whether what its last product reads is stored as well: others read it.
    chosen: whether all run in one kernel; reason: why not, "" otherwise.
    kernel, provenance: as a site's; "" where no kernel was timed.
    estimate: the bytes that it saves; "" as ``kernel``.
    time_us, apart_time_us, xla_time_us: µs of the regions in one kernel, each in its
        own one after the other (or on XLA, where that was chosen for one), and as XLA
        lowers them; None where not measured. kernel_time_us: of the kernel alone.
    error, xla_error, candidates, tuned, notes: as a site's.
    """

    other: str
    position: str
    stored: bool
    chosen: bool = False
    reason: str = ""
    kernel: str = ""
    provenance: str = ""
    estimate: str = ""
    time_us: float | None = None
    apart_time_us: float | None = None
    xla_time_us: float | None = None
    kernel_time_us: float | None = None
    error: float | None = None
    xla_error: float | None = None
    candidates: int = 0
    tuned: str = ""
    notes: str = ""

    @property
    def saved_us(self) -> float:
        """What it was measured to save, of what runs."""
        others = [t for t in (self.apart_time_us, self.xla_time_us) if t is not None]
        if not self.chosen or self.time_us is None or not others:
            return 0.0
        return min(others) - self.time_us


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One root of the program.

    name: the module path or source line, and "#2" and so on where it is another's, too;
        line: the user's source line.
    root: ``"conv_general_dilated"`` or ``"dot_general"``.
    problem: sizes and dtypes, "" where the root was refused.
    epilogue: short, as "conv3x3+bn+relu"; ``region`` has all of it.
    fused: whether the root and its epilogue are one region.
    prologue: elementwise work on its input that XLA does ahead of it, as "mul, add,
        relu": what no other region's epilogue can do, after a concatenation, say.
    left_to_xla: what of the epilogue XLA computes after the kernel, as "the mean"; ""
        where the kernel does all of it.
    reason: why it is not fused, or why XLA runs it; "" otherwise.
    kernel: the template and its config, or "xla"; "" without an architecture.
    provenance: "shipped", "user", "heuristic" or "xla".
    estimate: what the rank model expects of the kernel, and from what.
    floor: the least time the GPU could take; None without an architecture or region.
    time_us, xla_time_us: µs of the region with the best kernel found, and as XLA
        lowers it; None where not measured. kernel_time_us: of that kernel alone.
    error, xla_error: relative (2-norm) errors of both, measured when it was tuned.
    candidates: how many kernels were timed when it was tuned; 0 where it was not.
    tuned: when that was, and with which versions; "" where it was not.
    notes: candidates that crashed or did not end when it was tuned; and whether the
        result was made by other versions, and is to be checked before it is used.
    chains: those that it could be part of. Everything above is of the site alone.
    """

    name: str
    line: str
    root: str
    problem: str = ""
    epilogue: str = ""
    region: ir.Region | None = None
    fused: bool = False
    prologue: str = ""
    left_to_xla: str = ""
    reason: str = ""
    kernel: str = ""
    provenance: str = ""
    estimate: str = ""
    floor: Floor | None = None
    time_us: float | None = None
    xla_time_us: float | None = None
    kernel_time_us: float | None = None
    error: float | None = None
    xla_error: float | None = None
    candidates: int = 0
    tuned: str = ""
    notes: str = ""
    chains: tuple[Link, ...] = ()

    @property
    def chain(self) -> Link | None:
        """The one in which it runs."""
        return next((link for link in self.chains if link.chosen), None)

    @property
    def chosen_us(self) -> float | None:
        """The measured time of its kernel, or of XLA's lowering, as was chosen."""
        return self.xla_time_us if self.kernel == "xla" else self.time_us

    @property
    def what_runs(self) -> str:
        """The kernel and where it comes from, or "xla" and why."""
        if self.chain is not None:
            kernel = f"{self.chain.kernel} [{self.chain.provenance}]"
            return f"{kernel}, in one kernel with {self.chain.other}"
        if self.reason:
            return f"xla: {self.reason}"
        kernel = (
            f"{self.kernel} [{self.provenance}]" if self.provenance else self.kernel
        )
        return f"{kernel}{self._then_xla}"

    @property
    def what_runs_in_short(self) -> str:
        """The kernel's template alone, or "xla" and why."""
        if self.chain is not None:
            return f"{self.chain.kernel.partition(' ')[0]}, with {self.chain.other}"
        if self.reason:
            return self.what_runs
        return f"{self.kernel.partition(' ')[0]}{self._then_xla}"

    @property
    def _then_xla(self) -> str:
        return f", XLA computes {self.left_to_xla}" if self.left_to_xla else ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Max-pooling (or min) that XLA can run in two passes, of one axis each.

    name, line: as of a site. problem: as "max3x3/2[bfloat16 32x112x112x64]", the window
    over its stride. passes: 1 or 2; None without an architecture.
    """

    name: str
    line: str
    problem: str
    passes: int | None = None

    @property
    def what_runs(self) -> str:
        """As of a site."""
        texts = {None: "", 1: "xla", 2: "xla, one axis after the other"}
        return texts[self.passes]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over the ``timed`` sites, those with a time for XLA and for what runs.

    Times in µs; each site counts once, however often a loop runs it. ``chosen_us`` is
    of what runs: without what chains save.
    """

    timed: int
    xla_us: float
    chosen_us: float
    floor_us: float


def totals(sites: Iterable[Site]) -> Totals:
    """Sums over those of ``sites`` that were timed."""
    sites = list(sites)
    timed = [
        (site.xla_time_us, site.chosen_us, site.floor.time_us if site.floor else 0.0)
        for site in sites
        if site.xla_time_us is not None and site.chosen_us is not None
    ]
    runs = [site.chain for site in sites]
    saved = sum(c.saved_us for c in runs if c is not None and c.position == "first")
    return Totals(
        timed=len(timed),
        xla_us=sum(xla for xla, _, _ in timed),
        chosen_us=sum(chosen for _, chosen, _ in timed) - saved,
        floor_us=sum(floor for _, _, floor in timed),
    )


def micros(value: float | None) -> str:
    """A time in µs for a reader, "" where there is none."""
    if value is None:
        return ""
    return f"{value:.1f}" if value >= 1 else f"{value:.2g}"
