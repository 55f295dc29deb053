# SPDX-License-Identifier: Apache-2.0
"""Writes which roots of the benchmarked models are regions into docs/coverage.md.

python benchmarks/coverage_table.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax_bolt
from benchmarks.models import models
from jax_bolt._src.report import Report

_PAGE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
_BEGIN, _END = "<!-- coverage -->\n\n", "\n<!-- /coverage -->"


HEAD = ("| model | roots | fused | left to XLA |", "| --- | --- | --- | --- |")


def row(name: str, report: Report) -> str:
    """A model's line of the table."""
    # After the last colon: what all such roots have in common.
    reasons = [s.reason.rpartition(": ")[2] for s in report.sites if not s.fused]
    left = ", ".join(f"{n} {reason}" for reason, n in Counter(reasons).items())
    roots = len(report.sites)
    title = models.MODELS[name].title
    return f"| {title} | {roots} | {roots - len(reasons)} | {left} |"


def explained(name: str) -> Report:
    """What the table says of a model."""
    return jax_bolt.explain(*models.shapes(name), arch="sm_90a")


def written() -> list[str]:
    """The lines of the table in the documentation."""
    return _parts()[1].splitlines()


def _parts() -> tuple[str, str, str]:
    before, rest = _PAGE.read_text().split(_BEGIN)
    table, after = rest.split(_END)
    return before, table, after


def main() -> None:
    before, _, after = _parts()
    rows = (row(name, explained(name)) for name in models.MODELS)
    table = "".join(f"{line}\n" for line in (*HEAD, *rows))
    _PAGE.write_text(f"{before}{_BEGIN}{table}{_END}{after}")


if __name__ == "__main__":
    main()
