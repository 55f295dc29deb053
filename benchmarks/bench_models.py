# SPDX-License-Identifier: Apache-2.0
"""Whole models in one process: jax.jit, also with conv fusion, jax_bolt, and frozen.

Run by path, so that an installed jax_bolt comes before the source tree:

    python benchmarks/bench_models.py --models resnet50 --batch 32

Writes ``models-<device>-<date>.json`` and prints a table of ratios of ``queued_ms``:
the device's time from one call to the next while the host is ahead, gaps between
kernels included. Sums of kernel times (``kernels_ms``) mislead where a kernel starts
before the one ahead of it has ended: it counts while it waits. ``busy_ms`` is the time
in which at least one kernel ran. ``wall_ms`` is a call that is waited for,
``back_to_back_ms`` one of many of which only the last is. A model that fails is
recorded with its error, the run goes on, and the exit code is 1. ``--without chain``
also times the frozen model with that in the option ``disable``, so that one run shows
what it is worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import environment, floor, timing
from benchmarks.models import models

PLAIN, CONV_FUSION = "jit", "jit_conv_fusion"
BOLT, FROZEN = "jax_bolt", "jax_bolt+freeze"
FUSION_FLAG = "xla_gpu_experimental_enable_conv_fusion"
_ROOT = f"{Path(__file__).resolve().parents[1]}/"
# jax_bolt may be at most this much further from the reference than plain jax.jit.
MAX_ERROR_RATIO = 1.25

Optimize = Callable[[models.Apply], Any]
Freeze = Callable[[models.Apply, Any], Callable[[jax.Array], jax.Array]]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``runs`` are calls per timing, ``rounds`` timings of every variant in turn."""

    batch: int = 32
    image: int = 224
    runs: int = 100
    rounds: int = 3

    @property
    def traced_runs(self) -> int:
        return max(3, self.runs // 5)


def bench_model(
    name: str,
    optimize: Optimize,
    freeze: Freeze,
    settings: Settings,
    ceilings: floor.Ceilings,
    without: Sequence[str] = (),
    keep: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Everything measured of one model, as JSON data.

    Each variant has an entry under "variants"; one that failed holds its "error".
    ``without`` are names that may be disabled, each in a variant of its own. ``keep``
    gets what there is after every step.
    """
    began = time.perf_counter()
    apply, variables, x = models.build(name, settings.batch, settings.image)
    expected = _host(jax.jit(models.reference(name))(variables, x))
    optimized = optimize(apply)
    frozen = freeze(apply, variables)
    callables = {
        PLAIN: jax.jit(apply),
        CONV_FUSION: jax.jit(apply, compiler_options={FUSION_FLAG: True}),
        BOLT: optimized,
        FROZEN: lambda _, x: frozen(x),
    }
    for disabled in without:
        callables[f"{FROZEN} without {disabled}"] = _without(
            disabled, freeze(apply, variables)
        )
    roots = floor.roots(apply, variables, x)
    found: dict[str, dict[str, Any]] = {}
    result: dict[str, Any] = {
        "title": models.MODELS[name].title,
        "roots": len(roots),
        "floor_ms": floor.seconds(roots, ceilings) * 1e3,
        "variants": found,
    }

    def done(step: str) -> None:
        print(f"  {time.perf_counter() - began:5.1f} s: {step}", flush=True)
        if set(found) == set(callables):
            keep(result | {"ratios": ratios(result)})

    for variant, fun in callables.items():
        found[variant] = attempt(first_call, fun, variables, x, expected)
        done(f"{variant}, first call")
    # Every variant in turn, so that a clock that drifts drifts for all of them; all
    # wall times before the first trace, which may leave the driver slower.
    # One round of traces: kernel times hardly vary, and a trace takes seconds.
    for step, key, prefix, count in (
        (wall, "wall_ms", "", settings.rounds),
        (queued, "queued_ms", "", settings.rounds),
        (_kernels, "kernels_ms", "trace_", 1),
    ):
        rounds: dict[str, list[dict[str, Any]]] = {v: [] for v in callables}
        for _ in range(count):
            for variant, fun in callables.items():
                if "error" not in found[variant]:
                    timed = attempt(step, fun, variables, x, settings, prefix=prefix)
                    rounds[variant].append(timed)
        for variant, timed in rounds.items():
            found[variant] |= _middle(timed, key, f"{prefix}error")
        done(key)
    if "error" not in found[BOLT]:
        result |= attempt(_report, optimized, variables, x, prefix="report_")
    result["ratios"] = ratios(result)
    return result


def _without(name: str, frozen: Callable[[jax.Array], jax.Array]) -> Any:
    """``frozen`` with something disabled, which its first call decides."""
    import jax_bolt

    def run(_: Any, x: jax.Array) -> jax.Array:
        with jax_bolt.options(disable=name):
            return frozen(x)

    return run


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """How jax_bolt compares; above 1 it is faster (``error``: further off)."""
    variants = result["variants"]
    plain, bolt, frozen = (variants[v] for v in (PLAIN, BOLT, FROZEN))
    out: dict[str, float] = {}
    for name, ours in (("bolt", bolt), ("frozen", frozen)):
        for key in ("queued_ms", "wall_ms"):
            if ours.get(key) and plain.get(key):
                xla = [v[key] for v in (plain, variants[CONV_FUSION]) if v.get(key)]
                out[f"jit_over_{name}_{key}"] = plain[key] / ours[key]
                out[f"best_xla_over_{name}_{key}"] = min(xla) / ours[key]
                out[f"{name}_over_floor_{key}"] = ours[key] / result["floor_ms"]
    if bolt.get("queued_ms") and bolt.get("busy_ms"):
        # Where no kernel runs, of the device's time from one call to the next.
        out["gaps"] = max(0.0, 1 - bolt["busy_ms"] / bolt["queued_ms"])
    for variant, timed in variants.items():
        _, _, disabled = variant.partition(f"{FROZEN} without ")
        if disabled and timed.get("queued_ms") and frozen.get("queued_ms"):
            gain = timed["queued_ms"] / frozen["queued_ms"]
            out[f"frozen_without_{disabled}_over_frozen_queued_ms"] = gain
    for key, ours in (("error", bolt), ("error_frozen", frozen)):
        if plain.get("relative_l2") and "relative_l2" in ours:
            out[key] = ours["relative_l2"] / plain["relative_l2"]
    return out


def problems(result: dict[str, Any]) -> list[str]:
    """Why a model's result is a failure; empty where it is not one.

    An XLA that refuses the conv fusion flag is no failure of ours.
    """
    if "error" in result:
        return [result["error"]]
    variants = result["variants"]
    out = [
        f"{variant}: {variants[variant][key]}"
        for variant in (PLAIN, BOLT, FROZEN)
        for key in ("error", "trace_error")
        if key in variants[variant]
    ]
    if "report_error" in result:
        out.append(f"explain: {result['report_error']}")
    if out:
        return out
    for variant, key in ((BOLT, "error"), (FROZEN, "error_frozen")):
        ratio = result["ratios"].get(key, math.nan)
        if not ratio <= MAX_ERROR_RATIO:
            out.append(f"{variant}'s error is {ratio:.2f} times plain jax.jit's")
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """Milliseconds and ratios per model, and the ratios' geometric mean."""
    head = (
        f"{'model':22}{'floor':>8}{'jit':>9}{'+fusion':>9}{'bolt':>9}{'frozen':>9}"
        f"{'jit/bolt':>10}{'XLA/bolt':>10}{'XLA/frozen':>12}{'frozen/floor':>14}"
        f"{'wall jit':>10}{'wall bolt':>11}{'gaps':>7}{'err':>7}"
    )
    rows = [head, "-" * len(head)]
    for name, result in results.items():
        if "variants" not in result:
            rows.append(f"{name:22}{result['error'].splitlines()[0]}")
            continue
        variants, ratio = result["variants"], result["ratios"]
        which = _timed_by(ratio)
        times = [variants[v].get(which) for v in (PLAIN, CONV_FUSION, BOLT, FROZEN)]
        rows.append(
            f"{result['title']:22}{result['floor_ms']:8.3f}"
            + "".join(cell(t, 9, 3) for t in times)
            + cell(ratio.get(f"jit_over_bolt_{which}"), 10, 2)
            + cell(ratio.get(f"best_xla_over_bolt_{which}"), 10, 2)
            + cell(ratio.get(f"best_xla_over_frozen_{which}"), 12, 2)
            + cell(ratio.get(f"frozen_over_floor_{which}"), 14, 2)
            + cell(variants[PLAIN].get("wall_ms"), 10, 3)
            + cell(variants[BOLT].get("wall_ms"), 11, 3)
            + cell(ratio.get("gaps"), 7, 3)
            + cell(ratio.get("error"), 7, 2)
        )
    for name, result in results.items():
        for key, ratio in result.get("ratios", {}).items():
            if key.startswith("frozen_without_"):
                rows.append(f"{name}: {key}: {ratio:.3f}")
    for ours in ("bolt", "frozen"):
        for xla, key in (("jit", "jit"), ("XLA", "best_xla")):
            for which in ("queued_ms", "wall_ms"):
                mean = geometric_mean(results, f"{key}_over_{ours}_{which}")
                if mean is not None:
                    label = f"{xla}/{ours}, {which[:-3]}"
                    rows.append(f"geometric mean, {label}: {mean:.3f}")
    return "\n".join(rows)


def geometric_mean(results: dict[str, dict[str, Any]], key: str) -> float | None:
    """Of one ratio over the models that have it; None where none has."""
    values = [r["ratios"][key] for r in results.values() if key in r.get("ratios", {})]
    return statistics.geometric_mean(values) if values else None


def main(
    argv: Sequence[str] | None = None,
    optimize: Optimize | None = None,
    freeze: Freeze | None = None,
) -> int:
    """The command line; tests have stand-ins for jax_bolt's functions."""
    args = _arguments(argv)
    environment.set_sound_cpu_flags()
    if optimize is None or freeze is None:
        import jax_bolt

        optimize, freeze = jax_bolt.optimize, jax_bolt.freeze
    settings = Settings(batch=args.batch, image=args.image)
    if args.quick:
        settings = dataclasses.replace(settings, runs=5, rounds=1)
    ceilings = floor.measure(quick=not environment.has_gpu())
    described = environment.describe()
    path = args.out / (
        f"models-{environment.slug(described['device'])}-{described['date'][:10]}.json"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}

    def write() -> None:
        document = {
            "environment": described,
            "settings": dataclasses.asdict(settings) | {"dtype": "bfloat16"},
            "ceilings": dataclasses.asdict(ceilings),
            "models": results,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")

    for name in args.models:
        print(f"{name} ...", flush=True)

        def keep(result: dict[str, Any], name: str = name) -> None:
            results[name] = result
            write()

        given = (optimize, freeze, settings, ceilings, args.without, keep)
        results[name] = attempt(bench_model, name, *given)
        # One model's programs and constants must not crowd the next one's memory.
        jax.clear_caches()
        for problem in problems(results[name]):
            print(f"{name}: {problem}", file=sys.stderr, flush=True)
        # And after every step: a run that is cut short keeps what it measured.
        write()
        print(table(results), flush=True)
    print(
        f"\n{described['device']}: {ceilings.flops / 1e12:.0f} TFLOP/s bf16, "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s; ms per run of {settings.batch} images, "
        f"{'of device time, the host ahead' if environment.has_gpu() else 'wall'}"
    )
    print(f"written: {path}")
    return int(any(problems(result) for result in results.values()))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=list(models.MEASURED), choices=models.MODELS
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument(
        "--without", nargs="+", default=[], metavar="NAME", help="of option disable"
    )
    parser.add_argument("--quick", action="store_true", help="few runs, one round")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


def first_call(
    fun: Callable[..., Any], variables: Any, x: jax.Array, expected: np.ndarray
) -> dict[str, Any]:
    """How long it takes, and how far it is from what is ``expected``."""
    start = time.perf_counter()
    logits = jax.block_until_ready(fun(variables, x))
    first_call_s = time.perf_counter() - start
    difference = _host(logits) - expected
    return {
        "first_call_s": first_call_s,
        "max_abs": float(np.abs(difference).max()),
        "relative_l2": float(np.linalg.norm(difference) / np.linalg.norm(expected)),
    }


def wall(
    fun: Callable[..., Any], variables: Any, x: jax.Array, settings: Settings
) -> dict[str, Any]:
    """The time of a call, the host's work included: of one that is waited for, and of
    one among many of which only the last is."""
    wall = timing.wall(fun, variables, x, runs=settings.runs)
    among = timing.back_to_back(fun, variables, x, runs=settings.runs, rounds=1)
    found = {"wall_ms": wall.median, "wall_lowest_ms": wall.lowest}
    found["back_to_back_ms"] = among
    return {name: seconds * 1e3 for name, seconds in found.items()}


def queued(
    fun: Callable[..., Any], variables: Any, x: jax.Array, settings: Settings
) -> dict[str, Any]:
    """The device's time per call while the host is ahead of it."""
    if not environment.has_gpu():
        return {}
    from jax_bolt._src.tune import measure

    return {"queued_ms": measure.time_queued(lambda: fun(variables, x), 0) / 1e3}


def _kernels(
    fun: Callable[..., Any], variables: Any, x: jax.Array, settings: Settings
) -> dict[str, Any]:
    if not environment.has_gpu():
        return {}
    traced = timing.kernels(fun, variables, x, runs=settings.traced_runs)
    return {
        "kernels_ms": traced.us / 1e3,
        "busy_ms": traced.busy_us / 1e3,
        "memcpy_us": traced.memcpy_us,
        "memset_us": traced.memset_us,
        "kernels": traced.count,
        "kernel_table": [dataclasses.asdict(kernel) for kernel in traced.table],
    }


def _middle(rounds: list[dict[str, Any]], key: str, error: str) -> dict[str, Any]:
    """The round whose ``key`` is the middle one, and ``key`` of all; or a failure."""
    if failed := [r for r in rounds if error in r]:
        return failed[0]
    ordered = sorted((r for r in rounds if key in r), key=lambda r: r[key])
    if not ordered:
        return {}
    spread = {f"{key}_rounds": [r[key] for r in rounds]}
    return ordered[(len(ordered) - 1) // 2] | spread


def _report(optimized: Any, variables: Any, x: jax.Array) -> dict[str, Any]:
    return {"report": json.loads(optimized.explain(variables, x).to_json())}


def attempt(
    step: Callable[..., dict[str, Any]], *args: Any, prefix: str = ""
) -> dict[str, Any]:
    """``step(*args)``, or its failure as data: a failing part must not end the run."""
    try:
        return step(*args)
    except Exception as error:
        return {
            f"{prefix}error": f"{type(error).__name__}: {error}",
            # Results are shared: where the checkout lies is nobody's concern.
            f"{prefix}traceback": traceback.format_exc().replace(_ROOT, ""),
        }


def _timed_by(ratio: dict[str, float]) -> str:
    return "queued_ms" if "jit_over_bolt_queued_ms" in ratio else "wall_ms"


def cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"


def _host(logits: jax.Array) -> np.ndarray:
    return np.asarray(logits.astype(jnp.float32)).astype(np.float64)


if __name__ == "__main__":
    sys.exit(main())
