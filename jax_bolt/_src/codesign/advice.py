# SPDX-License-Identifier: Apache-2.0
"""What ``advise`` returns: the sites of a model, and what each would take otherwise."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..report import plain, printable
from ..site import NOTHING, UNSEEN, micros


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Time:
    """µs of a region, or of two in one kernel, as far as they are known.

    measured_us: on the GPU, of what would run, or of both in one kernel even where that
        would not; None where nothing was measured.
    estimate_us: what the rank model expects; None where no kernel takes the region.
    xla_us: measured, as XLA lowers it.
    runs: "kernel", or "xla" where XLA was timed faster or no kernel takes it; of two
        regions "apart" where one kernel was not timed faster.
    """

    measured_us: float | None = None
    estimate_us: float | None = None
    xla_us: float | None = None
    runs: str = ""

    @property
    def text(self) -> str:
        """For a reader: an estimate begins with "~", and "" is unknown."""
        if self.measured_us is not None:
            return micros(self.measured_us)
        return "" if self.estimate_us is None else f"~{micros(self.estimate_us)}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """A site with ``to`` instead of ``channels`` of its input, its output, or both.

    ``unit`` says what they are a multiple of then. ``idle`` is the share of such units
    that holds no channel now: of loads, or of the tensor cores' products.
    """

    operand: str
    channels: int
    to: int
    unit: str
    idle: float
    time: Time


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pointwise:
    """A 1x1 conv of as many ``channels`` as the site has, put after it.

    ``time`` is that of a region of its own, with a bias and the site's activation;
    ``chain`` that of the site and it in one kernel, None where there is no such kernel
    or it could not save much.
    ``chain_floor_us`` is the least that the GPU could take for both in one.
    """

    channels: int
    time: Time
    chain_floor_us: float
    chain: Time | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SiteAdvice:
    """A region of the model, which ``count`` sites have; ``name`` is of the first.

    ``activations`` has a time for each, in place of the site's own; it is empty where
    the site has none. ``pointwise`` is None for what is no spatial conv.
    """

    name: str
    line: str
    epilogue: str
    problem: str
    count: int
    now: Time
    activations: Mapping[str, Time]
    channels: tuple[Padding, ...]
    pointwise: Pointwise | None


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """What a model's sites take now, and with other activations, channels and layers.

    ``str(advice)`` is three tables; ``rich.print(advice)`` fits them to the terminal.

    ``arch`` is the architecture and ``device`` the kind of GPU that was measured on, ""
    where nothing was: then all times are the rank model's estimates. They and floors
    go by the published numbers of ``board``, an architecture's usual one if that alone
    is known. Sites are in order of the time they take in all; ``refused`` convs and
    products have no region, which ``explain`` gives the reasons of.
    """

    sites: tuple[SiteAdvice, ...]
    activations: tuple[str, ...]
    arch: str
    device: str = ""
    refused: int = 0
    board: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether all of its times are measured."""
        times = [time for site in self.sites for time in _times(site)]
        return all(time.measured_us is not None for time in times) and bool(times)

    def totals(self) -> dict[str, float]:
        """µs of all sites with an activation: ``"now"``, and by activation.

        Each counts as often as the model has it. A site's times are all measured or all
        estimated, so that they can be compared; sites that are not known are left out.
        """
        sums = dict.fromkeys(("now", *self.activations), 0.0)
        for site in self.sites:
            if not site.activations:
                continue
            for name, us in (_alike(site) or {}).items():
                sums[name] += site.count * us
        return sums

    def to_json(self) -> str:
        """The same as JSON text."""
        document: dict[str, Any] = {
            "arch": self.arch,
            "device": self.device,
            "board": self.board,
            "measured": self.is_measured,
            "activations": list(self.activations),
            "refused": self.refused,
            "totals_us": self.totals(),
            "sites": [dataclasses.asdict(site) for site in self.sites],
        }
        return json.dumps(document, indent=1)

    def __rich__(self) -> Any:
        from rich.console import Group

        parts = [self._activations(), self._channels(), self._pointwise()]
        made: list[Any] = [self._title()]
        for part in filter(None, parts):
            made += ["", part]
        if not (self.sites or self.refused):
            made.append(f"{NOTHING}: {UNSEEN}")
        return Group(*made)

    def __str__(self) -> str:
        return plain(self)

    def _title(self) -> str:
        if self.device:
            title = f"Measured on {self.device}."
            if not self.is_measured:
                title += " What has a ~ is an estimate of the rank model."
        else:
            board = f" ({self.board})" if self.board else ""
            title = f"Estimates (~) of the rank model for {self.arch}{board}: "
            title += "nothing was run."
        title += " Times are µs of one call."
        if self.refused:
            title += f" {self.refused} convs or products have no region: see explain."
        return title

    def _activations(self) -> Any:
        sites = [site for site in self.sites if site.activations]
        if not sites:
            return None
        headings = ("site", "region", "sites", "now", *self.activations)
        rows = [
            (
                *(site.name, site.epilogue, str(site.count), site.now.text),
                *(time.text for time in site.activations.values()),
            )
            for site in sites
        ]
        sums = self.totals()
        known = all(_is_measured(site) for site in sites)
        mark = "" if known else "~"
        total = [f"{mark}{micros(us)}" if us else "" for us in sums.values()]
        changes = [_change(sums["now"], sums[name]) for name in self.activations]
        rows += [("all of them", "", "", *total), ("change", "", "", "", *changes)]
        return _table("Other activations", headings, rows, left=2, end=len(sites))

    def _channels(self) -> Any:
        rows = [
            (
                *(site.name, site.epilogue, str(site.count)),
                *(f"{pad.operand} {pad.channels}", str(pad.to), pad.unit),
                *(f"{pad.idle:.0%}", site.now.text, pad.time.text),
                _change(*_pair(site.now, pad.time)),
            )
            for site in self.sites
            for pad in site.channels
        ]
        headings = (
            *("site", "region", "sites", "channels", "to", "a multiple of"),
            *("idle now", "now", "then", "change"),
        )
        return _table("Channels that fill no unit", headings, rows, left=2)

    def _pointwise(self) -> Any:
        rows = [
            (
                *(site.name, site.epilogue, str(site.count), str(one.channels)),
                *(site.now.text, one.time.text, _sum(site.now, one.time).text),
                micros(one.chain_floor_us),
                "" if one.chain is None else one.chain.text,
            )
            for site in self.sites
            if (one := site.pointwise) is not None
        ]
        headings = (
            *("site", "region", "sites", "channels", "now", "1x1 alone"),
            *("one after the other", "floor of both in one", "both in one kernel"),
        )
        return _table("A 1x1 conv after it", headings, rows, left=2)


def _table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    left: int,
    end: int | None = None,
) -> Any:
    """None without rows. The first ``left`` columns are text; a line is at ``end``."""
    from rich.table import Table
    from rich.text import Text

    listed = list(rows)
    if not listed:
        return None
    table = Table(title=title, title_justify="left", show_edge=False)
    for index, heading in enumerate(headings):
        side = "left" if index < left else "right"
        table.add_column(heading, justify=side, overflow="fold")
    for index, row in enumerate(listed):
        cells = (Text(printable(cell)) for cell in row)
        table.add_row(*cells, end_section=end is not None and index == end - 1)
    return table


def _times(site: SiteAdvice) -> list[Time]:
    """All that is known of a site."""
    found = [site.now, *site.activations.values()]
    found += [pad.time for pad in site.channels]
    if site.pointwise is not None:
        found += filter(None, (site.pointwise.time, site.pointwise.chain))
    return found


def _is_measured(site: SiteAdvice) -> bool:
    compared = (site.now, *site.activations.values())
    return all(time.measured_us is not None for time in compared)


def _alike(site: SiteAdvice) -> dict[str, float] | None:
    """The times with each activation, and now, all of one kind; None where unknown."""
    times = {"now": site.now, **site.activations}
    for kind in ("measured_us", "estimate_us"):
        found = {name: getattr(time, kind) for name, time in times.items()}
        if None not in found.values():
            return found
    return None


def _pair(now: Time, then: Time) -> tuple[float | None, float | None]:
    """Two times of one kind, or two unknown ones."""
    if now.measured_us is not None and then.measured_us is not None:
        return now.measured_us, then.measured_us
    return now.estimate_us, then.estimate_us


def _sum(first: Time, second: Time) -> Time:
    def add(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + b

    return Time(
        measured_us=add(first.measured_us, second.measured_us),
        estimate_us=add(first.estimate_us, second.estimate_us),
    )


def _change(now: float | None, then: float | None) -> str:
    return f"{then / now - 1:+.0%}" if now and then else ""
