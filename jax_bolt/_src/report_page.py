# SPDX-License-Identifier: Apache-2.0
"""Sites → one HTML page, with its style and its charts in it.

Every text goes through ``_tag``, which escapes it, so that no name from a model becomes
markup; and the page's own policy admits no script and no other file.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from . import ir
from .site import Link, Pool, Site, micros, totals

_STYLE = Path(__file__).with_name("report_page.css")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# The chart's coordinates, in CSS pixels.
_HEIGHT, _LEFT, _TOP, _BOTTOM, _WIDTH = 220, 52, 12, 26, 1080


class _Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def page(
    title: str,
    device: str,
    sites: Sequence[Site],
    pools: Sequence[Pool] = (),
    board: str = "",
) -> str:
    """The whole document. ``device`` is the kind of GPU, or ""; ``board`` whose numbers
    the floors go by."""
    head = _tag(
        "head",
        _Markup('<meta charset="utf-8">'),
        _void("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        _void("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _tag("title", f"jax_bolt: {title}"),
        _tag("style", _Markup(_STYLE.read_text(encoding="utf-8"))),
    )
    body = _tag(
        "body",
        _tag("h1", "jax_bolt report"),
        _tag("p", title + (f" · {device}" if device else ""), class_="lead"),
        _times(sites),
        _tag("h2", "Sites"),
        _table(sites, board),
        _pools(pools),
    )
    return f"<!doctype html>\n{_tag('html', head, body, lang='en')}\n"


# --- Times


def _times(sites: Sequence[Site]) -> _Markup:
    summed = totals(sites)
    if not summed.timed:
        return _tag(
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
        _tag(
            "div",
            _tag("span", label),
            _tag(
                "span",
                _tag(
                    "span", class_=f"bar {kind}", style=f"width:{value / longest:.2%}"
                ),
                class_="track",
            ),
            _tag("b", _time(value)),
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
    return _tag(
        "section",
        _tag("h2", f"Time before and after: {speedup:.2f} times as fast"),
        _tag(
            "p",
            f"Sums over {summed.timed} of {len(sites)} sites, those that were timed. "
            "The rest of the program (pooling, softmax, ...) is not in them." + chained,
            class_="note",
        ),
        *bars,
        _chart(sites),
        _tag(
            "p",
            "µs of each site by its number below: ",
            *(_legend(kind, label) for label, kind, _ in rows),
            class_="note",
        ),
    )


def _legend(kind: str, label: str) -> _Markup:
    text = {"xla": "XLA, before", "ours": "what runs now", "floor": "floor"}[kind]
    return _tag("span", _tag("i", class_=f"key {kind}"), text, class_="legend")


def _chart(sites: Sequence[Site]) -> _Markup:
    """Two columns for every site, and a line at its floor."""
    highest = max(
        max(site.xla_time_us or 0.0, site.chosen_us or 0.0, _floor_us(site))
        for site in sites
    )
    step = _nice(highest / 5)
    top = step * max(1, math.ceil(highest / step))
    slot = max(16.0, min(90.0, (_WIDTH - _LEFT) / len(sites)))
    width = _LEFT + slot * len(sites) + 4
    scale = (_HEIGHT - _TOP - _BOTTOM) / top

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - value * scale

    parts: list[_Markup] = []
    for index in range(round(top / step) + 1):
        at = y(index * step)
        parts.append(_void("line", class_="grid", x1=_LEFT, x2=width, y1=at, y2=at))
        label = f"{index * step:g}"
        parts.append(_tag("text", label, x=_LEFT - 8, y=at + 4, class_="end"))
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100) if n * slot >= 24)
    for index, site in enumerate(sites):
        left = _LEFT + index * slot
        columns = _columns(site, left, slot, y)
        if (index + 1) % every == 0:
            label = _tag(
                "text", f"{index + 1}", x=left + slot / 2, y=_HEIGHT - 8, class_="mid"
            )
            parts.append(label)
        tip = _tag("title", f"{index + 1} {site.name}: {_comparison(site)}")
        parts.append(_tag("a", tip, *columns, href=f"#site-{index + 1}"))
    picture = _tag(
        "svg",
        *parts,
        viewBox=f"0 0 {width:.0f} {_HEIGHT}",
        width=f"{width:.0f}",
        height=_HEIGHT,
        role="img",
        aria_label="Time of each site with XLA and with jax_bolt",
    )
    return _tag("div", picture, class_="chart")


def _columns(
    site: Site, left: float, slot: float, y: Callable[[float], float]
) -> list[_Markup]:
    bar = slot * 0.36
    found: list[_Markup] = []
    for kind, value, at in (
        ("xla", site.xla_time_us, left + slot * 0.12),
        ("ours", site.chosen_us, left + slot * 0.12 + bar),
    ):
        if value is not None:
            found.append(
                _void(
                    "rect",
                    class_=kind,
                    x=at,
                    width=bar,
                    y=y(value),
                    height=y(0) - y(value),
                )
            )
    if found and (least := _floor_us(site)):
        x1, x2 = left + slot * 0.06, left + slot * 0.9
        found.append(
            _void("line", class_="floor", x1=x1, x2=x2, y1=y(least), y2=y(least))
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


# --- Sites


def _table(sites: Sequence[Site], board: str) -> _Markup:
    if not sites:
        return _tag("p", "There is no convolution and no product.", class_="note")
    note = _tag(
        "p",
        "Times in µs, with XLA and now; x: how many times as fast. Floor: the least by "
        f"{_numbers(sites, board)}; %: its part of the time now. A row opens for more.",
        class_="note",
    )
    texts = ("#", "site", "region", "runs on")
    numbers = ("XLA", "now", "x", "floor", "%")
    heading = _tag(
        "div",
        *(_tag("span", text) for text in texts),
        *(_tag("span", text, class_="number") for text in numbers),
        class_="row heading",
    )
    rows = (_row(number, site) for number, site in enumerate(sites, 1))
    return _tag("div", note, heading, *rows, class_="sites")


def _numbers(sites: Sequence[Site], board: str) -> str:
    """What floors are made of."""
    of = f" of the {board}" if board else ""
    if any(site.floor and site.floor.compute_us is None for site in sites):
        return f"the published bandwidth{of}, without its peak, which is not published"
    return f"the published peak and bandwidth{of}"


def _row(number: int, site: Site) -> _Markup:
    kind = "kernel" if site.kernel not in ("", "xla") else "xla"
    runs = "XLA" if kind == "xla" else site.kernel.partition(" ")[0]
    if not site.kernel:
        kind, runs = "unknown", "no GPU to plan for"
    note = site.reason
    if site.chain is not None:
        kind, runs = "kernel", site.chain.kernel.partition(" ")[0]
        note = f"in one kernel with {site.chain.other}"
    problem = "" if site.region is None else _sizes(site.region.problem)
    chosen, xla, least = site.chosen_us, site.xla_time_us, _floor_us(site)
    ratio = f"{xla / chosen:.2f}" if xla and chosen else ""
    share = f"{least / chosen:.0%}" if least and chosen else ""
    numbers = (micros(xla), micros(chosen), ratio, micros(least or None), share)
    summary = _tag(
        "summary",
        _tag("span", str(number)),
        _tag("span", site.name, _tag("small", site.line)),
        _tag("span", site.epilogue or site.root, _tag("small", problem)),
        _tag("span", _tag("em", runs, class_=kind), _tag("small", note)),
        *(_tag("span", text, class_="number") for text in numbers),
        class_="row",
    )
    return _tag("details", summary, _details(site), id=f"site-{number}")


def _details(site: Site) -> _Markup:
    facts = [
        ("source", site.line),
        ("root", site.root),
        ("problem", site.problem),
        ("kernel", "" if site.kernel == "xla" else site.kernel),
        ("reason", site.reason),
        ("XLA before", site.prologue),
        ("provenance", site.provenance),
        ("times", _measured(site)),
        ("candidates", f"{site.candidates} timed" if site.candidates else ""),
        ("floor", _floor(site)),
        ("rank model", site.estimate),
        ("errors", _errors(site)),
        ("tuned", site.tuned),
        ("notes", site.notes),
        *(("chain", _chain(link)) for link in site.chains),
    ]
    items: list[_Markup] = []
    for name, text in facts:
        if text:
            items += [_tag("dt", name), _tag("dd", text)]
    if site.region is not None:
        items += [
            _tag("dt", "epilogue"),
            _tag("dd", _tag("pre", _program(site.region))),
        ]
    return _tag("dl", *items)


def _measured(site: Site) -> str:
    return _times_text(
        ("XLA", site.xla_time_us),
        ("best kernel, with what it needs around it", site.time_us),
        ("that kernel alone", site.kernel_time_us),
    )


def _chain(link: Link) -> str:
    """What there is to say of it, and all times."""
    joint = "in one kernel with" if link.chosen else "not in one kernel with"
    kernel = f"{link.kernel} [{link.provenance}]" if link.kernel else ""
    times = _times_text(
        ("one kernel", link.time_us),
        ("each in its own", link.apart_time_us),
        ("XLA", link.xla_time_us),
        ("the kernel alone", link.kernel_time_us),
    )
    facts = (f"{joint} {link.other}", link.reason, kernel, link.estimate, times)
    return "; ".join(filter(None, (*facts, _errors(link), link.notes)))


def _times_text(*parts: tuple[str, float | None]) -> str:
    return "; ".join(f"{n} {micros(t)} µs" for n, t in parts if t is not None)


def _floor(site: Site) -> str:
    if site.floor is None:
        return ""
    least = site.floor
    compute = (
        "no peak is known"
        if least.compute_us is None
        else f"{micros(least.compute_us)} µs"
    )
    return (
        f"{micros(least.time_us)} µs: {least.flops / 1e9:.3g} GFLOP at the tensor "
        f"cores' peak ({compute}), {least.bytes_moved / 1e6:.3g} MB at device memory's "
        f"bandwidth ({micros(least.memory_us)} µs)"
    )


def _errors(site: Site | Link) -> str:
    if site.error is None or site.xla_error is None:
        return ""
    return f"{site.error:.2e}, XLA's {site.xla_error:.2e}, relative to float32"


def _program(region: ir.Region) -> str:
    lines = [f"%{i} = {op.text}" for i, op in enumerate(region.epilogue.ops)]
    stored = [f"{output.dtype} %{output.value}" for output in region.epilogue.outputs]
    return "\n".join([*lines, *stored])


def _sizes(problem: ir.Problem) -> str:
    """The problem in a reader's words, without what is as usual."""
    if isinstance(problem, ir.GemmProblem):
        batch = f"{problem.batch} x " if problem.batch > 1 else ""
        sizes = f"{problem.m}x{problem.k} by {problem.k}x{problem.n}"
        return f"{problem.dtype} {batch}{sizes}"
    image = f"{problem.n}x{problem.h}x{problem.w}x{problem.c} → {problem.k}"
    window = f"{problem.r}x{problem.s}"
    for name, (high, wide) in (("/", problem.stride), (" dilated ", problem.dilation)):
        if (high, wide) != (1, 1):
            window += f"{name}{high}" if high == wide else f"{name}{high}x{wide}"
    groups = f", {problem.groups} groups" if problem.groups > 1 else ""
    return f"{problem.dtype} {image}, {window}{groups}"


def _floor_us(site: Site) -> float:
    return site.floor.time_us if site.floor else 0.0


def _time(value: float) -> str:
    return f"{value / 1000:.3f} ms" if value >= 1000 else f"{micros(value)} µs"


def _pools(pools: Sequence[Pool]) -> _Markup:
    if not pools:
        return _Markup("")
    items: list[_Markup] = []
    for pool in pools:
        runs = f"{pool.problem}: {pool.what_runs or 'no GPU to plan for'}"
        items += [_tag("dt", pool.name), _tag("dd", runs, _tag("small", pool.line))]
    return _tag("section", _tag("h2", "Max-pooling"), _tag("dl", *items))


# --- Markup


def _tag(name: str, /, *children: str, **attributes: object) -> _Markup:
    inner = "".join(
        c if isinstance(c, _Markup) else html.escape(c) for c in _shown(children)
    )
    return _Markup(f"<{name}{_attributes(attributes)}>{inner}</{name}>")


def _void(name: str, /, **attributes: object) -> _Markup:
    return _Markup(f"<{name}{_attributes(attributes)}/>")


def _attributes(given: dict[str, object]) -> str:
    found: list[str] = []
    for key, value in given.items():
        text = f"{value:.1f}" if isinstance(value, float) else str(value)
        if text:
            name = key.rstrip("_").replace("_", "-")
            found.append(f' {name}="{html.escape(text)}"')
    return "".join(found)


def _shown(texts: Iterable[str]) -> Iterable[str]:
    """Without characters that HTML forbids; what turns text round is shown as such."""
    for text in texts:
        if isinstance(text, _Markup) or text.isprintable():
            yield text
        else:
            yield "".join(c if c.isprintable() or c == "\n" else "�" for c in text)
