# SPDX-License-Identifier: Apache-2.0
"""Sites → one HTML page, with its style and its charts in it.

Every text goes through ``tag``, which escapes it, so that no name from a model becomes
markup; and the page's own policy admits no script and no other file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .markup import Markup, tag, void
from .report_sites import floor_us, table
from .site import Pool, Site, micros, totals

_STYLE = Path(__file__).with_name("report_page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# The chart's coordinates, in CSS pixels.
_HEIGHT, _LEFT, _TOP, _BOTTOM, _WIDTH = 220, 52, 12, 26, 1080


def page(
    title: str,
    device: str,
    sites: Sequence[Site],
    pools: Sequence[Pool] = (),
    board: str = "",
) -> str:
    """The whole document. ``device`` is the kind of GPU, or ""; ``board`` whose numbers
    the floors go by."""
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        void("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"jax_bolt: {title}"),
        tag("style", Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    body = tag(
        "body",
        tag("h1", "jax_bolt report"),
        tag("p", title + (f" · {device}" if device else ""), class_="lead"),
        _times(sites),
        tag("h2", "Sites"),
        table(sites, board),
        _pools(pools),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


# --- Times


def _times(sites: Sequence[Site]) -> Markup:
    summed = totals(sites)
    if not summed.timed:
        return tag(
            "p",
            "Nothing was timed: on the GPU, jax_bolt.tune measures XLA and the kernels "
            "at every site.",
            class_="note",
        )
    rows = [("XLA", "xla", summed.xla_us), ("jax_bolt", "ours", summed.chosen_us)]
    if summed.floor_us:
        rows.append(("floor", "floor", summed.floor_us))
    longest = max(value for _, _, value in rows) or 1.0
    bars = [
        tag(
            "div",
            tag("span", label),
            tag(
                "span",
                tag("span", class_=f"bar {kind}", style=f"width:{value / longest:.2%}"),
                class_="track",
            ),
            tag("b", _time(value)),
            class_="total",
        )
        for label, kind, value in rows
    ]
    speedup = summed.xla_us / summed.chosen_us if summed.chosen_us else 1.0
    chained = (
        " Each site has the time of its own kernel, the sums what chains save."
        if any(site.chain is not None for site in sites)
        else ""
    )
    return tag(
        "section",
        tag("h2", f"Time before and after: {speedup:.2f} times as fast"),
        tag(
            "p",
            f"Sums over {summed.timed} of {len(sites)} sites, those that were timed. "
            "The rest of the program (pooling, softmax, ...) is not in them." + chained,
            class_="note",
        ),
        *bars,
        _chart(sites),
        tag(
            "p",
            "µs of each site by its number below: ",
            *(_legend(kind, label) for label, kind, _ in rows),
            class_="note",
        ),
    )


def _legend(kind: str, label: str) -> Markup:
    text = {"xla": "XLA, before", "ours": "what runs now", "floor": "floor"}[kind]
    return tag("span", tag("i", class_=f"key {kind}"), text, class_="legend")


def _chart(sites: Sequence[Site]) -> Markup:
    """Two columns for every site, and a line at its floor."""
    highest = max(
        max(site.xla_time_us or 0.0, site.chosen_us or 0.0, floor_us(site))
        for site in sites
    )
    step = _nice(highest / 5)
    top = step * max(1, math.ceil(highest / step))
    slot = max(16.0, min(90.0, (_WIDTH - _LEFT) / len(sites)))
    width = _LEFT + slot * len(sites) + 4
    scale = (_HEIGHT - _TOP - _BOTTOM) / top

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value * scale

    parts: list[Markup] = []
    for index in range(round(top / step) + 1):
        at = y(index * step)
        parts.append(void("line", class_="grid", x1=_LEFT, x2=width, y1=at, y2=at))
        label = f"{index * step:g}"
        parts.append(tag("text", label, x=_LEFT - 8, y=at + 4, class_="end"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * slot >= 24)
    for index, site in enumerate(sites):
        left = _LEFT + index * slot
        columns = _columns(site, left, slot, y)
        if (index + 1) % every == 0:
            label = tag(
                "text", f"{index + 1}", x=left + slot / 2, y=_HEIGHT - 8, class_="mid"
            )
            parts.append(label)
        tip = tag("title", f"{index + 1} {site.name}: {_comparison(site)}")
        parts.append(tag("a", tip, *columns, href=f"#site-{index + 1}"))
    picture = tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {_HEIGHT}",
        width=f"{width:.0f}",
        height=_HEIGHT,
        role="img",
        aria_label="Time of each site with XLA and with jax_bolt",
    )
    return tag("div", picture, class_="chart")


def _columns(
    site: Site, left: float, slot: float, y: Callable[[float], float]
) -> list[Markup]:
    bar = slot * 0.36
    found: list[Markup] = []
    for kind, value, at in (
        ("xla", site.xla_time_us, left + slot * 0.12),
        ("ours", site.chosen_us, left + slot * 0.12 + bar),
    ):
        if value is not None:
            found.append(
                void(
                    "rect",
                    class_=kind,
                    x=at,
                    width=bar,
                    y=y(value),
                    height=y(0) - y(value),
                )
            )
    if found and (least := floor_us(site)):
        x1, x2 = left + slot * 0.06, left + slot * 0.9
        found.append(
            void("line", class_="floor", x1=x1, x2=x2, y1=y(least), y2=y(least))
        )
    return found


def _nice(value: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next((m * power for m in (1, 2, 2.5, 5) if m * power >= value), 10 * power)


def _comparison(site: Site) -> str:
    if site.xla_time_us is None or site.chosen_us is None:
        return "not timed"
    return f"XLA {micros(site.xla_time_us)} µs, now {micros(site.chosen_us)} µs"


def _time(value: float) -> str:
    return f"{value / 1000:.3f} ms" if value >= 1000 else f"{micros(value)} µs"


def _pools(pools: Sequence[Pool]) -> Markup:
    if not pools:
        return Markup("")
    items: list[Markup] = []
    for pool in pools:
        runs = f"{pool.problem}: {pool.what_runs or 'no GPU to plan for'}"
        items += [tag("dt", pool.name), tag("dd", runs, tag("small", pool.line))]
    return tag("section", tag("h2", "Max-pooling"), tag("dl", *items))
