# SPDX-License-Identifier: Apache-2.0
"""Measures one problem on the GPU: every candidate, the library, XLA's region, a copy.

Kernels are timed alone, in the tuner's worker process: with rotated operands ("rot":
the L2 cache does not hold them) and with one set ("hot"). What XLA runs is timed by the
device's stopwatch over as many rotated sets, as tuning does it. The best kernel of each
template is timed that way as well ("in program"), its operands rearranged at every
call.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_bolt._src import compat, ir, options, resolve
from jax_bolt._src.chain import AnySite
from jax_bolt._src.errors import CompileError, UnsupportedError
from jax_bolt._src.plan import AnyCandidate, Candidate
from jax_bolt._src.primitive import SiteInfo, reference_fun
from jax_bolt._src.tune import builder, isolate, measure, verdict
from jax_bolt._src.tune.job import first_line
from jax_bolt._src.tune.target import Target, executable

from . import environment, floor, kernel_problems, kernel_table
from .kernel_problems import Problem

# Compiling may take this share of the budget: kernels that nobody times are no use.
_COMPILING = 0.6
_MAX_SETS = 32
_REPEATS = 7
_CALLS = re.compile(r'custom_call_target="([^"]+)"|"kind":"(__[^"]+)"')


def target_or_none(script: str, listed: str) -> Target | None:
    """What to measure on; None, after saying why, where nothing can be measured."""
    device = compat.cuda_device()
    if device is None or not environment.has_gpu():
        print(
            f"{script} measures on an NVIDIA GPU, and JAX sees none; --plan lists the "
            f"{listed} and their candidates without one",
            file=sys.stderr,
        )
        return None
    try:
        target = resolve.target_for(device, options.current())
        _ = target.toolchain
    except (CompileError, UnsupportedError) as error:
        print(f"nothing can be measured: {error}", file=sys.stderr)
        return None
    return target


class Clock:
    """Raises Stopped once ``budget_s`` is spent, or a share of it."""

    def __init__(self, budget_s: float | None):
        self._began = time.monotonic()
        self._budget_s = math.inf if budget_s is None else budget_s

    def check(self, share: float = 1.0) -> None:
        if time.monotonic() - self._began > share * self._budget_s:
            spent = f"{share:.0%} of the budget of {self._budget_s:.0f} s spent"
            raise builder.Stopped(spent)


def build(
    candidates: Sequence[AnyCandidate], target: Target, clock: Clock
) -> builder.Built:
    """Compiles all of them together; what the budget does not reach is an error."""
    count = len({c.source for c in candidates})
    done = itertools.count(1)

    def step(_: str) -> None:
        built = next(done)
        if built % 20 == 0 or built == count:
            print(f"  {built} of {count} kernels built", flush=True)
        clock.check(_COMPILING)

    return builder.build(candidates, target, step)


def measure_problem(
    problem: Problem,
    candidates: Sequence[Candidate],
    built: builder.Built,
    target: Target,
    ceilings: floor.Ceilings,
    clock: Clock,
    worker: isolate.Worker,
    libraries: dict[str, Any],
) -> dict[str, Any]:
    """Everything measured of one problem, as JSON data; ``failures`` says what failed.

    ``libraries`` keeps the library's times: regions with another epilogue share them.
    Raises Stopped when the budget is spent before its kernels are timed.
    """
    region = problem.region
    root = kernel_problems.root(region)
    result: dict[str, Any] = {
        "problem": region.problem.text,
        "short": kernel_problems.short(region.problem),
        "epilogue": problem.label,
        "region": region.text,
        "batch": problem.batch,
        "where": problem.where,
        "class": kernel_problems.classify(region, ceilings),
        "memory_bound": kernel_problems.is_memory_bound(root, ceilings),
        "flops": root.flops,
        "bytes": root.bytes,
        "floor_us": root.seconds(ceilings) * 1e6,
        "candidates": [],
        "templates": {},
        "failures": [],
    }
    failures = result["failures"]
    with _noting(failures, "operands"):
        operands = rotating_operands(problem.site, target.arch.l2_bytes)
        result["sets"] = len(operands.sets)
        with _noting(failures, "XLA's region"):
            xla = reference_fun(problem.site.reference)
            run = measure.time_region(xla, operands, target.ordinal)
            result["region_us"] = run.micros
            result["region_runs"] = what_runs(xla, operands.sets[0])
            with _noting(failures, "kernels"):
                _kernels(
                    result,
                    run.outputs,
                    operands,
                    candidates,
                    built,
                    target,
                    clock,
                    worker,
                )
        with _noting(failures, "library"):
            key = f"{region.problem.text} {result['sets']}"
            if key not in libraries:
                libraries[key] = _library(problem.site, operands, target.ordinal)
            result["library"] = libraries[key]
            result["library_us"] = min(v["us"] for v in result["library"].values())
        if result["memory_bound"]:
            with _noting(failures, "copy"):
                count = len(operands.sets)
                result["copy_us"] = _copy(problem.site, root, count, target.ordinal)
    result["ratios"] = kernel_table.ratios(result)
    return result


def rotating_operands(site: AnySite, l2_bytes: int) -> measure.Operands:
    """As tuning's, but more sets where eight still fit into the L2 cache."""
    sets = list(measure.make_operands(site, l2_bytes).sets)
    wanted = min(_MAX_SETS, math.ceil(2 * l2_bytes / site.region.bytes_moved))
    seed = 0
    while len(sets) < wanted:
        seed += 1
        more = measure.make_operands(site, l2_bytes, seed).sets
        sets += more[: wanted - len(sets)]
    return measure.Operands(site, tuple(sets))


def library_functions(site: SiteInfo) -> dict[str, tuple[Callable, Callable]]:
    """The root alone, as users would call the library: name -> (function, operands).

    ``operands`` makes the function's from the root's, outside the time: filters come
    as O H W I, so that no transpose is in it. A 1x1 conv is tried as a product, too.
    """
    problem = site.region.problem
    if isinstance(problem, ir.GemmProblem):
        return {"dot": (_dot(problem), lambda lhs, rhs: (lhs, rhs))}
    top, bottom, left, right = problem.padding
    found: dict[str, tuple[Callable, Callable]] = {
        "conv": (
            lambda x, w: lax.conv_general_dilated(
                x,
                w,
                problem.stride,
                ((top, bottom), (left, right)),
                rhs_dilation=problem.dilation,
                dimension_numbers=("NHWC", "OHWI", "NHWC"),
                feature_group_count=problem.groups,
            ),
            lambda lhs, rhs: (lhs, jnp.transpose(rhs, (3, 0, 1, 2))),
        )
    }
    if problem.is_gemm:
        found["dot"] = (
            jnp.matmul,
            lambda lhs, rhs: (lhs.reshape(-1, problem.c), rhs.reshape(problem.c, -1)),
        )
    return found


def what_runs(fun: Callable, operands: Sequence[Any]) -> list[str]:
    """The library calls and generated kernels in what XLA compiled, each once."""
    text = jax.jit(fun).lower(*operands).compile().as_text() or ""
    return sorted({call or kind for call, kind in _CALLS.findall(text)})


def _kernels(
    result: dict[str, Any],
    xla: Sequence[jax.Array],
    operands: measure.Operands,
    candidates: Sequence[Candidate],
    built: builder.Built,
    target: Target,
    clock: Clock,
    worker: isolate.Worker,
) -> None:
    """Fills in ``candidates``, ``templates`` and the best times over all of them.

    ``xla`` are XLA's outputs of the region on the first set of operands.
    """

    def micros(candidate: Candidate, sets: int) -> float:
        digest, artifact = built[candidate.source]
        if isinstance(artifact, CompileError):
            raise artifact
        request = isolate.request_for(
            candidate, digest, artifact, sets, _REPEATS, verify=sets > 1
        )
        limit_s = isolate.limit_s(candidate.form.region, sets, target.arch.bandwidth)
        return worker.time(request, limit_s).micros

    groups: dict[tuple[str, str], list[tuple[Candidate, dict[str, Any]]]] = {}
    for candidate in candidates:
        clock.check()
        key = candidate.template.name, candidate.form.name
        entry: dict[str, Any] = {
            "template": candidate.template.name,
            "form": candidate.form.name,
            "config": candidate.config.text,
        }
        result["candidates"].append(entry)
        try:
            entry["rot_us"] = micros(candidate, len(operands.sets))
        except (CompileError, isolate.Failed) as error:
            entry["failure"] = first_line(error)
        else:
            groups.setdefault(key, []).append((candidate, entry))
    site = operands.site
    assert isinstance(site, SiteInfo)
    yardstick = measure.Yardstick(operands)
    xla_errors = yardstick.errors(xla)
    templates = result["templates"]
    for (template, form), group in groups.items():
        found = _fastest_accurate(operands, group, built, target, yardstick, xla_errors)
        if found is None:
            continue
        candidate, entry = found
        entry["hot_us"] = micros(candidate, 1)
        entry["moves_input"] = kernel_problems.moves_input(site, form)
        entry["us"] = entry["in_program_us" if entry["moves_input"] else "rot_us"]
        if template not in templates or entry["us"] < templates[template]["us"]:
            templates[template] = entry
    if templates:
        result["best"] = min(templates, key=lambda name: templates[name]["us"])
        result["ours_us"] = templates[result["best"]]["us"]
        result["hot_us"] = templates[result["best"]]["hot_us"]
        result["in_program_us"] = min(
            entry["in_program_us"]
            for entry in result["candidates"]
            if "in_program_us" in entry
        )
    elif candidates:
        result["failures"].append("no candidate ran and was accurate")


def _fastest_accurate(
    operands: measure.Operands,
    group: list[tuple[Candidate, dict[str, Any]]],
    built: builder.Built,
    target: Target,
    yardstick: measure.Yardstick,
    xla_errors: Sequence[float],
) -> tuple[Candidate, dict[str, Any]] | None:
    """The first by time that is accurate, timed in a program; others are marked."""
    region = operands.site.region
    for candidate, entry in sorted(group, key=lambda pair: pair[1]["rot_us"]):
        try:
            kernel = executable(region, candidate, *built[candidate.source], target)
        except CompileError as error:
            entry["failure"] = first_line(error)
            continue
        run = verdict.time_in_program(kernel, operands, target)
        found = yardstick.errors(run.outputs)
        errors = measure.worst(found, xla_errors, region)
        entry["error"], entry["xla_error"] = errors.kernel, errors.xla
        entry["accurate"] = measure.is_accurate(errors, region)
        if entry["accurate"]:
            entry["in_program_us"] = run.micros
            return candidate, entry
    return None


def _library(
    site: SiteInfo, operands: measure.Operands, ordinal: int
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, (fun, prepare) in library_functions(site).items():
        prepared = jax.jit(prepare)
        sets = tuple(
            tuple(prepared(*operands.roles(i)[:2])) for i in range(len(operands.sets))
        )
        jax.block_until_ready(sets)
        found[name] = {
            "us": measure.time_function(fun, sets, ordinal),
            "runs": what_runs(fun, sets[0]),
        }
    return found


def _copy(site: SiteInfo, root: floor.Root, count: int, ordinal: int) -> float:
    """Reading and writing ``root.bytes`` in all, elementwise, on ``count`` arrays."""
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(2**20, np.float32).astype(jnp.bfloat16)
    # Of different sizes, so that XLA does not make one kernel of them.
    sizes = [root.bytes // 4 + 64 * i for i in range(count)]
    sets = tuple((jax.device_put(np.resize(drawn, size)),) for size in sizes)
    jax.block_until_ready(sets)
    return measure.time_function(jnp.negative, sets, ordinal)


def _dot(problem: ir.GemmProblem) -> Callable:
    """The product in the layout it has; operands of any rank, as users have them."""
    p = problem
    a_shape = (p.m, p.k) if p.a_layout == "row" else (p.k, p.m)
    b_shape = (p.k, p.n) if p.b_layout == "row" else (p.n, p.k)
    lead = (p.batch,) if p.batch > 1 else ()
    at = len(lead)
    contracting = (
        (at + (p.a_layout == "row"),),
        (at + (p.b_layout == "col"),),
    )
    batch = tuple(range(at))

    def fun(lhs: Any, rhs: Any) -> Any:
        a, b = lhs.reshape(lead + a_shape), rhs.reshape(lead + b_shape)
        return lax.dot_general(a, b, (contracting, (batch, batch)))

    return fun


@contextlib.contextmanager
def _noting(failures: list[str], what: str) -> Iterator[None]:
    """A failing part must not end the run."""
    try:
        yield
    except builder.Stopped:
        raise
    except Exception as error:
        failures.append(f"{what}: {type(error).__name__}: {first_line(error)}")
