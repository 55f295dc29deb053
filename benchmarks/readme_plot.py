# SPDX-License-Identifier: Apache-2.0
"""The README's plot of measured speed-ups, as SVG; ``readme_table.py`` writes it.

A browser shows it in its own font and, with the colours of its theme, on any
background. The same results make the same bytes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from typing import Any

_WIDTH = 760
_LEFT, _RIGHT = 200, 170  # for the names, and for the times
_TOP, _ROW, _BAR, _GAP = 64, 40, 18, 3
_LINE = 17  # of the text below

# Without a theme, greys that can be read on white and on black.
_STYLE = """\
text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
  fill: #6e7781 }
.title { font-size: 16px; font-weight: 600 }
.name, .value { font-weight: 600 }
.small { font-size: 12px }
.end { text-anchor: end }
.middle { text-anchor: middle }
.grid { stroke: #8c959f; stroke-opacity: .35 }
.one { stroke: #8c959f; stroke-width: 1.5 }
.best { fill: #2da44e }
.jit { fill: #2da44e; fill-opacity: .4 }
.frozen.best { fill: #0969da }
.frozen.jit { fill: #0969da; fill-opacity: .4 }
@media (prefers-color-scheme: light) { text { fill: #424a53 } }
@media (prefers-color-scheme: dark) {
  text { fill: #c9d1d9 }
  .best, .jit { fill: #3fb950 }
  .frozen.best, .frozen.jit { fill: #58a6ff }
}"""
# What a bar is of, its key in "ratios" and in "variants", and its class.
_SERIES = (
    ("jax_bolt", "bolt", "jax_bolt", ""),
    ("jax_bolt, parameters frozen", "frozen", "jax_bolt+freeze", "frozen "),
)


def svg(document: dict[str, Any]) -> str:
    """The plot of ``bench_models.py``'s results: a row per model, a bar per variant.

    A bar ends at the speed-up over the faster of plain ``jax.jit`` and XLA's conv
    fusion; its pale end, where there is one, at that over ``jax.jit``.
    """
    models = list(document["models"].values())
    series = [each for each in _SERIES if any(_ratio(m, each[1]) for m in models)]
    rows = [(model, [s for s in series if _ratio(model, s[1])]) for model in models]
    highest = max(_ratio(m, s[1], "jit") for m, found in rows for s in found)
    scale = _Scale(max(1.5, math.ceil(2 * highest) / 2))
    heights = [_ROW + (len(found) - 1) * (_BAR + _GAP) for _, found in rows]
    bottom = _TOP + sum(heights)
    notes = _notes(document, len(series) > 1)
    height = bottom + 26 + _LINE * len(notes) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'viewBox="0 0 {_WIDTH} {height}" role="img" aria-labelledby="t d">',
        f'<title id="t">{_TITLE}</title>',
        f'<desc id="d">{html.escape(_description(rows))}</desc>',
        f"<style>\n{_STYLE}\n</style>",
        _text(_TITLE, 16, 28, "title"),
        *_axis(scale, bottom),
    ]
    top = _TOP
    for (model, found), row_height in zip(rows, heights, strict=True):
        parts += _row(model, found, scale, top, row_height)
        top += row_height
    for index, note in enumerate(notes):
        parts.append(_text(note, 16, bottom + 40 + _LINE * index, "small"))
    return "\n".join([*parts, "</svg>\n"])


_TITLE = "Whole models: how many times as fast as XLA"


class _Scale:
    """Speed-ups, from 0 to ``highest``, as pixels."""

    def __init__(self, highest: float):
        self.highest = highest

    def x(self, ratio: float) -> float:
        width = _WIDTH - _LEFT - _RIGHT
        return round(_LEFT + width * ratio / self.highest, 1)


def _axis(scale: _Scale, bottom: float) -> Iterator[str]:
    for half in range(int(2 * scale.highest) + 1):
        x, kind = scale.x(half / 2), "one" if half == 2 else "grid"
        yield (
            f'<line class="{kind}" x1="{x}" y1="{_TOP - 6}" x2="{x}" y2="{bottom}"/>'
        )
        yield _text(f"{half / 2:g}", x, _TOP - 12, "small middle")


def _row(
    model: dict[str, Any], found: list[Any], scale: _Scale, top: float, height: float
) -> Iterator[str]:
    bars = len(found) * (_BAR + _GAP) - _GAP
    y = top + (height - bars) / 2
    yield _text(model["title"], _LEFT - 12, y + bars / 2 + 4.5, "name end")
    jitted = model["variants"]["jit"]["queued_ms"]
    for _, key, variant, kind in found:
        best, jit = _ratio(model, key), _ratio(model, key, "jit")
        ends = [("jit", jit)] if jit > best else []
        for name, ratio in [*ends, ("best", best)]:
            yield (
                f'<rect class="{kind}{name}" x="{_LEFT}" y="{y:g}" '
                f'width="{scale.x(ratio) - _LEFT:.1f}" height="{_BAR}" rx="2"/>'
            )
        base = y + _BAR - 4.5
        yield _text(f"{best:.2f}x", scale.x(max(best, jit)) + 6, base, "value")
        ours = model["variants"][variant]["queued_ms"]
        times = f"{jitted:.2f} → {ours:.2f} ms"
        yield _text(times, _WIDTH - 16, base, "small end")
        y += _BAR + _GAP


def _ratio(model: dict[str, Any], key: str, over: str = "best_xla") -> float:
    """0 where the model was not measured so."""
    return model["ratios"].get(f"{over}_over_{key}_queued_ms", 0.0)


def _notes(document: dict[str, Any], has_frozen: bool) -> list[str]:
    where, settings = document["environment"], document["settings"]
    versions = where["versions"]
    size = f"{settings['image']}x{settings['image']}"
    lines = [
        "Bars: over the faster of jax.jit and XLA's conv fusion; pale: over jax.jit, "
        "whose times are on the right.",
        f"GPU time of a batch of {settings['batch']}, {size}, {settings['dtype']}. "
        f"{where['device']}, driver {where['driver']}, CUDA {where['cuda']},",
        f"jax {versions['jax']}, jax_bolt {versions['jax_bolt']}, measured "
        f"{where['date'][:10]}.",
    ]
    colors = "Green: as the model is; blue: with its parameters frozen."
    return [colors, *lines] if has_frozen else lines


def _description(rows: list[tuple[dict[str, Any], list[Any]]]) -> str:
    """The same for those who do not see it."""
    told = (
        f"{model['title']}: {_ratio(model, key):.2f} ({label})"
        for model, found in rows
        for label, key, _, _ in found
    )
    return "; ".join(told)


def _text(text: str, x: float, y: float, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{html.escape(text)}</text>'
