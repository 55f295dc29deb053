# SPDX-License-Identifier: Apache-2.0
"""Sites → the table of a report's page. A row opens for all of its site."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence

from . import ir
from .markup import Markup, tag, void
from .site import NOTHING, UNSEEN, Link, Site, micros

# Columns of the table of sites, and their widths in CSS pixels.
_TEXTS = {
    "#": "38px",
    "site": "minmax(230px, 1.4fr)",
    "region": "minmax(190px, 1fr)",
    "runs on": "minmax(190px, 1fr)",
}
_NUMBERS = {"XLA": 54, "now": 54, "speed-up": 66, "floor": 48, "of floor": 60}


def table(sites: Sequence[Site], board: str) -> Markup:
    if not sites:
        return tag("p", f"{NOTHING}: {UNSEEN}.", class_="note")
    numbers = [_numbers(site) for site in sites]
    # A column that no site has anything in says nothing.
    shown = [name for name in _NUMBERS if any(row[name] for row in numbers)]
    heading = tag(
        "div",
        *(tag("span", text) for text in _TEXTS),
        *(tag("span", name, class_="number") for name in shown),
        class_="row heading",
    )
    rows = (
        _row(index, site, [found[name] for name in shown])
        for index, (site, found) in enumerate(zip(sites, numbers, strict=True), 1)
    )
    widths = [*_TEXTS.values(), *(f"{_NUMBERS[name]}px" for name in shown)]
    note = tag("p", _reading(shown, sites, board), class_="note")
    style = f"--columns: {' '.join(widths)}"
    return tag("div", note, heading, *rows, class_="sites", style=style)


def _numbers(site: Site) -> dict[str, str]:
    """By column; "" where there is none."""
    chosen, xla, least = site.chosen_us, site.xla_time_us, floor_us(site)
    return {
        "XLA": micros(xla),
        "now": micros(chosen),
        "speed-up": f"{xla / chosen:.2f}" if xla and chosen else "",
        "floor": micros(least or None),
        "of floor": f"{least / chosen:.0%}" if least and chosen else "",
    }


def _reading(shown: Sequence[str], sites: Sequence[Site], board: str) -> str:
    """How to read the columns that there are."""
    texts: list[str] = []
    if "now" in shown or "XLA" in shown:
        texts.append("Times in µs, with XLA and now.")
    if "floor" in shown:
        texts.append(f"Floor: the least µs by {_least(sites, board)}.")
    if "of floor" in shown:
        texts.append("Of floor: how much of the time now that is.")
    return " ".join([*texts, "A row opens for more."])


def _least(sites: Sequence[Site], board: str) -> str:
    """What floors are made of."""
    of = f" of the {board}" if board else ""
    if any(site.floor and site.floor.compute_us is None for site in sites):
        return f"the published bandwidth{of}, without its peak, which is not published"
    return f"the published peak and bandwidth{of}"


def _row(number: int, site: Site, numbers: Sequence[str]) -> Markup:
    kind = "kernel" if site.kernel not in ("", "xla") else "xla"
    runs = "XLA" if kind == "xla" else site.kernel.partition(" ")[0]
    if not site.kernel:
        kind, runs = "unknown", "no GPU to plan for"
    note = site.reason
    if site.left_to_xla:
        note = f"XLA computes {site.left_to_xla}"
    if site.chain is not None:
        kind, runs = "kernel", site.chain.kernel.partition(" ")[0]
        note = f"in one kernel with {site.chain.other}"
    problem = "" if site.region is None else _sizes(site.region.problem)
    # Without a module's path a site is called by its line.
    is_line = site.line and site.name.startswith(site.line)
    name = _last_folders(site.name) if is_line else site.name
    summary = tag(
        "summary",
        tag("span", str(number)),
        tag("span", name, tag("small", _last_folders(site.line))),
        tag("span", *_steps(site.epilogue or site.root), tag("small", problem)),
        tag("span", tag("em", runs, class_=kind), tag("small", note)),
        *(tag("span", text, class_="number") for text in numbers),
        class_="row",
    )
    return tag("details", summary, _details(site), id=f"site-{number}")


def _last_folders(line: str) -> str:
    """A source line without what its path begins with; a row opens for all of it."""
    return re.sub(r"^[^(]*/(?=[^/(]+/[^/(]+(?: \(|$))", "…/", line)


def _steps(label: str) -> Iterable[str]:
    """A region's label, which a line may break at, but in none of its steps."""
    first, *others = label.split("+")
    yield first
    for step in others:
        yield void("wbr")
        yield f"+{step}"


def _details(site: Site) -> Markup:
    facts = [
        ("source", site.line),
        ("root", site.root),
        ("region", site.epilogue),
        ("problem", site.problem),
        ("kernel", "" if site.kernel == "xla" else site.kernel),
        ("reason", site.reason),
        ("XLA before", site.prologue),
        ("XLA after", site.left_to_xla),
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
    items: list[Markup] = []
    for name, text in facts:
        if text:
            items += [tag("dt", name), tag("dd", text)]
    if site.region is not None:
        items += [
            tag("dt", "epilogue"),
            tag("dd", tag("pre", _program(site.region))),
        ]
    return tag("dl", *items)


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
    lines = [f"%{i} = {_operation(op)}" for i, op in enumerate(region.epilogue.ops)]
    stored = [f"{output.dtype} %{output.value}" for output in region.epilogue.outputs]
    return "\n".join([*lines, *stored])


def _operation(op: ir.Op) -> str:
    if op.name != "const" or op.attr is None:
        return op.text
    return f"const[{_decimal(float(op.attr))}]()"


def _decimal(value: float) -> str:
    """The shortest that is the same float32."""
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    same = (text for text in texts if _float32(float(text)) == _float32(value))
    return next(same, str(value))


def _float32(value: float) -> bytes:
    return struct.pack("f", value)


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


def floor_us(site: Site) -> float:
    return site.floor.time_us if site.floor else 0.0
