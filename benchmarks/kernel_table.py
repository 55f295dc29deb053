# SPDX-License-Identifier: Apache-2.0
"""What ``bench_kernels.py`` prints: one line per problem, then one per class.

A ratio is another time over ours: above 1, jax_bolt is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from . import kernel_problems

# ratio -> the two times it is made of
RATIOS = {
    "library": ("library_us", "ours_us"),
    "region": ("region_us", "ours_us"),
    "region_in_program": ("region_us", "in_program_us"),
}
_HEADS = {"library": "lib/ours", "region": "XLA/ours", "region_in_program": "in prog"}
# Two columns for the problem and its epilogue, then times, then ratios.
_PROBLEM, _EPILOGUE, _TIME, _RATIO = 34, 22, 11, 10


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Those of ``RATIOS`` whose two times are there, and ``floor``: ours over it."""
    out = {
        name: result[other] / result[ours]
        for name, (other, ours) in RATIOS.items()
        if result.get(other) and result.get(ours)
    }
    if result.get("ours_us") and result.get("floor_us"):
        out["floor"] = result["ours_us"] / result["floor_us"]
    return out


def header(templates: Sequence[str]) -> str:
    times = ("floor", *templates, "copy", "library", "XLA region", "in prog")
    cells = [f"{name:>{_TIME}}" for name in times]
    cells += [f"{name:>{_RATIO}}" for name in _HEADS.values()]
    line = f"{'problem':{_PROBLEM}}{'epilogue':{_EPILOGUE}}{''.join(cells)}"
    return f"{line}\n{'-' * len(line)}"


def row(result: dict[str, Any], templates: Sequence[str]) -> str:
    """Times in µs; ``*``: with the rearrangement of the input that the kernel needs."""
    found = result["templates"]
    times = [_cell(result.get("floor_us"), _TIME)]
    for name in templates:
        entry = found.get(name)
        mark = "*" if entry and entry["moves_input"] else " "
        times.append(_cell(entry and entry["us"], _TIME - 1) + mark)
    for key in ("copy_us", "library_us", "region_us", "in_program_us"):
        times.append(_cell(result.get(key), _TIME))
    ratio = result["ratios"]
    times += [_cell(ratio.get(name), _RATIO, 2) for name in RATIOS]
    return (
        f"{result['short'][: _PROBLEM - 1]:{_PROBLEM}}"
        f"{result['epilogue'][: _EPILOGUE - 1]:{_EPILOGUE}}{''.join(times)}"
    )


def table(results: Iterable[dict[str, Any]], templates: Sequence[str]) -> str:
    return "\n".join([header(templates), *(row(r, templates) for r in results)])


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per class, then per batch and class where there are several batches.

    Each ratio's geometric mean, and the lowest with its problem.
    """
    batches = list(dict.fromkeys(r["batch"] for r in results))
    out = _by_class(results, "all")
    if len(batches) > 1:
        for batch in batches:
            chosen = [r for r in results if r["batch"] == batch]
            out += _by_class(chosen, "-" if batch is None else str(batch))
    return out


def summary_text(rows: Iterable[dict[str, Any]]) -> str:
    """One line per class, batch and ratio."""
    head = (
        f"{'class':26}{'batch':>6}{'ratio':>20}{'count':>7}{'geomean':>9}{'lowest':>8}"
        "  lowest at"
    )
    lines = [head, "-" * len(head)]
    for entry in rows:
        for name in RATIOS:
            if (found := entry.get(name)) is not None:
                lines.append(
                    f"{entry['class']:26}{entry['batch']:>6}{name:>20}"
                    f"{found['count']:7}{found['geometric_mean']:9.3f}"
                    f"{found['lowest']:8.3f}  {found['lowest_at']}"
                )
    return "\n".join(lines)


def _by_class(results: Sequence[dict[str, Any]], batch: str) -> list[dict[str, Any]]:
    out = []
    for name in kernel_problems.CLASSES:
        chosen = [r for r in results if r["class"] == name]
        found = {ratio: _statistics(chosen, ratio) for ratio in RATIOS}
        if chosen:
            out.append({"class": name, "batch": batch, **found})
    return out


def _statistics(results: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    having = [r for r in results if name in r["ratios"]]
    if not having:
        return None
    lowest = min(having, key=lambda r: r["ratios"][name])
    return {
        "count": len(having),
        "geometric_mean": statistics.geometric_mean(r["ratios"][name] for r in having),
        "lowest": lowest["ratios"][name],
        "lowest_at": f"{lowest['short']} {lowest['epilogue']}",
    }


def _cell(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"
