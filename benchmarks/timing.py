# SPDX-License-Identifier: Apache-2.0
"""One timer for every benchmark: wall time, and GPU kernel times from the profiler.

Wall times of small models move by tens of per cent with the host; the times in which
kernels run do not, so both are reported.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

Kind = Literal["kernel", "memcpy", "memset", "graph"]

_GPU_PLANE = re.compile(r"/device:GPU:\d+")
# CUPTI's stream lines hold each device activity once; the profiler derives other
# lines of the same plane ("XLA Modules", "XLA Ops", "Steps", ...) from them. XLA
# renames a stream's line to "CUPTI overhead" as soon as it holds one such event.
_STREAM_LINE = re.compile(r"Stream #\d+|CUPTI overhead$")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """Seconds of one call, the result waited for."""

    median: float
    lowest: float
    runs: int


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One event of a trace; times in ns, ``stats`` names what the profiler knows."""

    name: str
    start_ns: float
    duration_ns: float
    stats: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """All launches of one kernel: ``count`` and ``us`` per run."""

    name: str
    count: float
    us: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """What the device did in one run, the mean over ``runs``; times in µs.

    ``us`` adds up the kernels' durations and ``busy_us`` the time in which at least
    one kernel ran: less than ``us`` where kernels overlap. Copies and fills are
    apart. ``table`` is sorted by time.
    """

    runs: int
    us: float
    busy_us: float
    count: float
    memcpy_us: float
    memset_us: float
    table: tuple[Kernel, ...]


class NoKernels(RuntimeError):
    """The trace holds no GPU kernels; the message lists what it does hold."""


def wall(
    fun: Callable[..., Any],
    *args: Any,
    runs: int = 100,
    warmup: int = 5,
    budget_s: float = 10.0,
) -> Wall:
    """The wall time of ``fun(*args)``: ``runs`` calls, fewer once ``budget_s`` is up.

    At least three calls are timed whatever the budget.
    """
    _run(fun, args, warmup)
    times: list[float] = []
    deadline = time.perf_counter() + budget_s
    while len(times) < runs and (len(times) < 3 or time.perf_counter() < deadline):
        start = time.perf_counter()
        jax.block_until_ready(fun(*args))
        times.append(time.perf_counter() - start)
    return Wall(median=statistics.median(times), lowest=min(times), runs=len(times))


def back_to_back(
    fun: Callable[..., Any], *args: Any, runs: int = 20, rounds: int = 3
) -> float:
    """Seconds of a call when ``runs`` are queued at once; the best of ``rounds``.

    For calls that take long enough (over 0.2 ms) to hide the cost of a launch.
    """
    _run(fun, args, 3)
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        result = None
        for _ in range(runs):
            result = fun(*args)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / runs)
    return best


def kernels(
    fun: Callable[..., Any], *args: Any, runs: int = 20, warmup: int = 3
) -> Kernels:
    """What the GPU does in one ``fun(*args)``; ``NoKernels`` where there is no GPU."""
    _run(fun, args, warmup)
    options = jax.profiler.ProfileOptions()
    # Host tracing costs time in the traced calls and is not read.
    options.host_tracer_level = 0
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(prefix="jax_bolt_trace_") as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            _run(fun, args, runs)
        return summarize(read(folder), runs)


def read(folder: str | Path) -> Iterator[tuple[str, str, tuple[Event, ...]]]:
    """Every ``(plane name, line name, events)`` of the traces under ``folder``."""
    for path in sorted(Path(folder).rglob("*.xplane.pb")):
        yield from lines(jax.profiler.ProfileData.from_file(str(path)))


def lines(data: Any) -> Iterator[tuple[str, str, tuple[Event, ...]]]:
    """Every ``(plane name, line name, events)`` of a ``jax.profiler.ProfileData``."""
    for plane in data.planes:
        for line in plane.lines:
            yield plane.name, line.name, _events(line)


def summarize(traced: Iterable[tuple[str, str, Iterable[Event]]], runs: int) -> Kernels:
    """Adds up the device's events in ``(plane name, line name, events)`` triples.

    Raises NoKernels where there are none, or only whole CUDA graphs, whose kernels
    cannot be told apart.
    """
    found: dict[Kind, list[Event]] = collections.defaultdict(list)
    seen: list[str] = []
    for plane, line, events in traced:
        seen.append(f"{plane} / {line}")
        if not is_stream(plane, line):
            continue
        for event in events:
            if (kind := classify(event)) is not None:
                found[kind].append(event)
    if not found["kernel"]:
        graphs = f"; {len(found['graph'])} CUDA graphs traced whole"
        raise NoKernels(
            f"no GPU kernels in the trace{graphs if found['graph'] else ''}; "
            f"its lines: {', '.join(seen) or 'none'}"
        )
    by_name: dict[str, list[Event]] = collections.defaultdict(list)
    for event in found["kernel"]:
        by_name[event.name].append(event)
    table = (
        Kernel(name=name, count=len(events) / runs, us=_us(events) / runs)
        for name, events in by_name.items()
    )
    return Kernels(
        runs=runs,
        us=_us(found["kernel"]) / runs,
        busy_us=_union_ns(found["kernel"]) / 1e3 / runs,
        count=len(found["kernel"]) / runs,
        memcpy_us=_us(found["memcpy"]) / runs,
        memset_us=_us(found["memset"]) / runs,
        table=tuple(sorted(table, key=lambda k: (-k.us, k.name))),
    )


def is_stream(plane: str, line: str) -> bool:
    """Whether a line holds what a GPU ran, rather than something derived from it."""
    return bool(_GPU_PLANE.match(plane) and _STREAM_LINE.match(line))


def classify(event: Event) -> Kind | None:
    """What a stream's event is; None for bookkeeping (allocations, overhead)."""
    for stat, kind in _BY_STAT.items():
        if stat in event.stats:
            return kind
    name = event.name.lower()
    if name.startswith("memcpy"):
        return "memcpy"
    if name.startswith("memset"):
        return "memset"
    return None


# Stats XLA's CUPTI collector attaches to an event of each kind.
_BY_STAT: dict[str, Kind] = {
    "kernel_details": "kernel",
    "memcpy_details": "memcpy",
    "memset_details": "memset",
    "cuda_graph_exec_id": "graph",
}


def _events(line: Any) -> tuple[Event, ...]:
    with warnings.catch_warnings():
        # jaxlib's binding warns about its own type when first used, and crashes the
        # process where that warning is made an error.
        warnings.simplefilter("ignore", DeprecationWarning)
        return tuple(
            Event(e.name, e.start_ns, e.duration_ns, dict(e.stats)) for e in line.events
        )


def _us(events: Iterable[Event]) -> float:
    return sum(e.duration_ns for e in events) / 1e3


def _union_ns(events: Iterable[Event]) -> float:
    total, reached = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start_ns):
        end = event.start_ns + event.duration_ns
        total += max(0.0, end - max(reached, event.start_ns))
        reached = max(reached, end)
    return total


def _run(fun: Callable[..., Any], args: tuple[Any, ...], runs: int) -> None:
    result = None
    for _ in range(runs):
        result = fun(*args)
    jax.block_until_ready(result)
