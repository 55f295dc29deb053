# SPDX-License-Identifier: Apache-2.0
"""Writes committed benchmark results into the README: its table, and its plot.

python benchmarks/readme_table.py benchmarks/results/models-....json

The README names the files that were used, so that a test can compare.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import readme_plot

_ROOT = Path(__file__).resolve().parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
README, PLOT = _ROOT / "README.md", _ROOT / "docs" / "speedups.svg"
_BEGIN, _END = re.compile(r"<!-- results:([^>]*) -->"), "<!-- /results -->"
_COLUMNS = (
    *("model", "`jax.jit`", "best of XLA", "jax_bolt", "frozen"),
    *("best of XLA / jax_bolt", "best of XLA / frozen", "floor", "error ratio"),
)


def rows(document: dict[str, Any]) -> list[list[str]]:
    """One row per model: milliseconds, ratios, the error beside plain ``jax.jit``'s.

    What was not measured is a dash.
    """
    table = []
    for result in document["models"].values():
        variants, ratios = result["variants"], result["ratios"]
        times = {name: v.get("queued_ms") for name, v in variants.items()}
        xla = [t for name, t in times.items() if t and name.startswith("jit")]
        table.append(
            [
                result["title"],
                f"{times['jit']:.3f}",
                f"{min(xla):.3f}",
                f"**{times['jax_bolt']:.3f}**",
                _number(times.get("jax_bolt+freeze"), 3),
                f"{ratios['best_xla_over_bolt_queued_ms']:.2f}",
                _number(ratios.get("best_xla_over_frozen_queued_ms"), 2),
                f"{result['floor_ms']:.3f}",
                f"{ratios['error']:.2f}",
            ]
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """All models of documents measured alike; raises ValueError where they were not."""
    first = documents[0]
    models: dict[str, Any] = {}
    for document in documents:
        if _where(document) != _where(first):
            raise ValueError(f"not measured alike: {_where(document)}, {_where(first)}")
        models |= document["models"]
    return first | {"models": models}


def _where(document: dict[str, Any]) -> tuple[Any, ...]:
    where, settings = document["environment"], document["settings"]
    return (
        *(where["device"], where["versions"], where["date"][:10]),
        *(settings["batch"], settings["image"], settings["dtype"]),
    )


def text(document: dict[str, Any]) -> str:
    """The table, and a line that says where it was measured."""
    where = document["environment"]
    settings = document["settings"]
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows(document)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{body}\n\n{where['device']}, jax {where['versions']['jax']}, "
        f"{where['date'][:10]}; ms of GPU time per batch of "
        f"{settings['batch']}, {settings['image']}x{settings['image']}, "
        f"{settings['dtype']}."
    )


def written(readme: str, names: Sequence[str], document: dict[str, Any]) -> str:
    """``readme`` with the table of ``document``, made of the files ``names``.

    Raises ValueError where it has no place for it.
    """
    found = _BEGIN.search(readme)
    if found is None or _END not in readme[found.end() :]:
        raise ValueError("the README has no <!-- results: ... --> and its end")
    _, _, after = readme[found.end() :].partition(_END)
    begin = f"<!-- results: {' '.join(names)} -->"
    before = readme[: found.start()]
    return f"{before}{begin}\n\n{text(document)}\n\n{_END}{after}"


def names_in(readme: str) -> list[str]:
    """The results files that the README's table says it is made of."""
    found = _BEGIN.search(readme)
    return [] if found is None else found[1].split()


def read(names: Sequence[str]) -> dict[str, Any]:
    """The committed results of these names, as one; raises as ``merged`` does."""
    return merged([json.loads((_RESULTS / name).read_text()) for name in names])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of benchmarks/results"
    )
    names = [path.name for path in parser.parse_args(argv).results]
    document = read(names)
    README.write_text(written(README.read_text(), names, document))
    PLOT.write_text(readme_plot.svg(document))


if __name__ == "__main__":
    main()
