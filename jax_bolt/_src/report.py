# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` and ``tune`` return: every root, what runs it, and why."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any

from . import ir


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One root of the program.

    name: the module path or source line; line: the user's source line.
    root: ``"conv_general_dilated"`` or ``"dot_general"``.
    problem: sizes and dtypes, "" where the root was refused.
    epilogue: short, as "conv3x3+bn+relu"; ``region`` has all of it.
    fused: whether the root and its epilogue are one region.
    prologue: elementwise work on its input that XLA does ahead of it, as "mul, add,
        relu": what no other region's epilogue can do, after a concatenation, say.
    reason: why it is not fused, or why XLA runs it; "" otherwise.
    kernel: the template and its config, or "xla"; "" without an architecture.
    provenance: "shipped", "user", "heuristic" or "xla".
    estimate: what the rank model expects of the kernel, and from what.
    time_us, xla_time_us: µs of the region, None where not measured.
    notes: candidates that crashed or did not end when it was tuned; and whether the
        result was made by other versions, and is to be checked before it is used.
    """

    name: str
    line: str
    root: str
    problem: str = ""
    epilogue: str = ""
    region: ir.Region | None = None
    fused: bool = False
    prologue: str = ""
    reason: str = ""
    kernel: str = ""
    provenance: str = ""
    estimate: str = ""
    time_us: float | None = None
    xla_time_us: float | None = None
    error: float | None = None
    xla_error: float | None = None
    notes: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The sites of a function on one architecture; ``str(report)`` is a table.

    ``arch`` is "" where there was none to plan for.
    ``counters`` are of the whole process: kernels found, compiled and loaded, regions
    tuned, candidates timed in either stage, restarts of the process that times them.
    """

    sites: tuple[Site, ...]
    arch: str
    counters: Mapping[str, int]

    @property
    def coverage(self) -> float:
        """Fused roots over roots, 1.0 for a function without roots."""
        if not self.sites:
            return 1.0
        return sum(site.fused for site in self.sites) / len(self.sites)

    def to_json(self) -> str:
        """The same as JSON text."""
        sites = []
        for site in self.sites:
            row = dataclasses.asdict(site)
            row["region"] = None if site.region is None else site.region.text
            sites.append(row)
        document: dict[str, Any] = {
            "arch": self.arch,
            "coverage": self.coverage,
            "counters": dict(self.counters),
            "sites": sites,
        }
        return json.dumps(document, indent=1)

    def _title(self) -> str:
        fused = sum(site.fused for site in self.sites)
        title = f"{fused} of {len(self.sites)} roots fused"
        if not self.arch:
            return f"{title}, no GPU to plan for"
        kernels = sum(site.kernel not in ("", "xla") for site in self.sites)
        return f"{title}, {kernels} on kernels, planned for {self.arch}"

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        title = self._title()
        table = Table(title=title, title_justify="left", show_edge=False)
        for heading in ("site", "region", "problem", "kernel"):
            table.add_column(heading, overflow="fold")
        for heading in ("µs", "XLA µs"):
            table.add_column(heading, justify="right", no_wrap=True)
        for site in self.sites:
            row = (
                site.name,
                site.epilogue or site.root,
                site.problem,
                _what_runs(site),
                _micros(site.time_us),
                _micros(site.xla_time_us),
            )
            # Text, since rich would read the brackets of a problem as markup.
            table.add_row(*map(Text, row))
        text = io.StringIO()
        Console(file=text, width=160, no_color=True).print(table)
        return text.getvalue()


def _what_runs(site: Site) -> str:
    if site.reason:
        return f"xla: {site.reason}"
    provenance = f" [{site.provenance}]" if site.provenance else ""
    return f"{site.kernel}{provenance}"


def _micros(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
