# SPDX-License-Identifier: Apache-2.0
"""What ``explain`` and ``tune`` return: every root, what runs it, and why."""

from __future__ import annotations

import dataclasses
import errno
import html
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .site import NOTHING, UNSEEN, Pool, Site, Totals, micros, totals

_WIDTH = 160
# Columns of a terminal that take configs, and problems, without being folded much.
_WITH_CONFIGS, _WITH_PROBLEMS = 140, 110


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """The sites of a function on one architecture.

    ``str(report)`` is a table, the same wherever it is printed; ``rich.print(report)``
    fits it to the terminal, with no configs and problems in a narrow one, and a
    notebook shows the page of ``to_html``.

    ``arch`` is "" where there was none to plan for, and ``device`` the kind of GPU, ""
    where only an architecture was named. ``board`` is whose published numbers the
    floors and the rank model go by: of a bare architecture its usual one.
    ``counters`` are of the whole process: kernels found, compiled and loaded, regions
    tuned, candidates timed in either stage, restarts of the process that times them.
    ``pools`` are those that may take two passes; they are no roots.
    """

    sites: tuple[Site, ...]
    arch: str
    counters: Mapping[str, int]
    device: str = ""
    pools: tuple[Pool, ...] = ()
    board: str = ""

    @property
    def coverage(self) -> float:
        """Fused roots over roots, 1.0 for a function without roots."""
        if not self.sites:
            return 1.0
        return sum(site.fused for site in self.sites) / len(self.sites)

    @property
    def totals(self) -> Totals:
        """Sums over the sites that were timed."""
        return totals(self.sites)

    def to_json(self) -> str:
        """The same as JSON text."""
        sites: list[dict[str, Any]] = []
        for site in self.sites:
            row = dataclasses.asdict(site)
            row["region"] = None if site.region is None else site.region.text
            sites.append(row)
        document: dict[str, Any] = {
            "arch": self.arch,
            "device": self.device,
            "board": self.board,
            "coverage": self.coverage,
            "counters": dict(self.counters),
            "totals": dataclasses.asdict(self.totals),
            "sites": sites,
            "pools": [dataclasses.asdict(pool) for pool in self.pools],
        }
        return json.dumps(document, indent=1)

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as one HTML file, which opens without a network.

        Raises OSError where ``path`` cannot be written.
        """
        folder = Path(path).absolute().parent
        if not folder.is_dir():
            missing = f"there is no directory {folder} to write a report to"
            raise FileNotFoundError(errno.ENOENT, missing, os.fspath(path))
        Path(path).write_text(self._page(), encoding="utf-8")

    def _repr_html_(self) -> str:
        """The page, where a notebook shows the report."""
        # In a frame of its own, which keeps its style from the notebook's.
        page = html.escape(self._page())
        style = "border:0;height:40em;width:100%"
        return f'<iframe sandbox srcdoc="{page}" style="{style}"></iframe>'

    def _page(self) -> str:
        from . import report_page

        return report_page.page(
            self._title(), self.device, self.sites, self.pools, self.board
        )

    def _title(self) -> str:
        if not self.sites:
            return NOTHING
        fused = sum(site.fused for site in self.sites)
        title = f"{fused} of {len(self.sites)} roots fused"
        if not self.arch:
            return f"{title}, no GPU to plan for"
        kernels = sum(_runs_on_kernel(site) for site in self.sites)
        board = f" ({self.board})" if self.board and not self.device else ""
        return f"{title}, {kernels} on kernels, planned for {self.arch}{board}"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        if not self.sites:
            yield f"{NOTHING}: {UNSEEN}"
        if self.sites or self.pools:
            yield self._table(options.max_width)

    def _table(self, width: int) -> Any:
        from rich.table import Table
        from rich.text import Text

        summed = self.totals
        table = Table(
            title=self._title(),
            title_justify="left",
            show_edge=False,
            show_footer=summed.timed > 0,
        )
        problems = ["problem"] if width >= _WITH_PROBLEMS else []
        for heading in ("site", "region", *problems, "kernel"):
            table.add_column(heading, overflow="fold")
        table.columns[-1].min_width = len("implicit_gemm_sm90")
        table.columns[0].footer = f"{summed.timed} timed sites"
        for heading, total in (
            ("µs", summed.chosen_us),
            ("XLA µs", summed.xla_us),
            ("floor µs", summed.floor_us),
        ):
            table.add_column(heading, micros(total), justify="right", no_wrap=True)
        for site in self.sites:
            row = (
                site.name,
                site.epilogue or site.root,
                *[site.problem for _ in problems],
                site.what_runs if width >= _WITH_CONFIGS else site.what_runs_in_short,
                micros(site.time_us),
                micros(site.xla_time_us),
                micros(site.floor.time_us if site.floor else None),
            )
            # Text, since rich would read the brackets of a problem as markup.
            table.add_row(*map(Text, map(printable, row)), style=_style(site))
        for pool in self.pools:
            label, _, _ = pool.problem.partition("[")
            row = (pool.name, label, *[pool.problem for _ in problems], pool.what_runs)
            table.add_row(*map(Text, map(printable, row)))
        return table

    def __str__(self) -> str:
        return plain(self)


def plain(rich_text: Any) -> str:
    """What rich would show, as text that is the same wherever it is printed."""
    from rich.console import Console

    text = io.StringIO()
    # Said explicitly, since rich would ask the environment (FORCE_COLOR, COLUMNS).
    console = Console(
        file=text,
        width=_WIDTH,
        no_color=True,
        force_terminal=False,
        force_jupyter=False,
    )
    console.print(rich_text)
    return text.getvalue()


def _runs_on_kernel(site: Site) -> bool:
    return site.chain is not None or site.kernel not in ("", "xla")


def _style(site: Site) -> str:
    """Dim where XLA keeps a site, yellow where the matcher refused it."""
    if site.kernel != "xla" or site.chain is not None:
        return ""
    return "dim" if site.fused else "yellow"


def printable(text: str) -> str:
    """``text`` for a terminal: a scope may be called anything, and could steer one."""
    return "".join(c if c.isprintable() else "?" for c in text)
