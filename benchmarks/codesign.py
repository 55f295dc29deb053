# SPDX-License-Identifier: Apache-2.0
"""The speed columns of the Bolt paper's RepVGG study (4.3), beside the paper's own.

Run by path, so that an installed jax_bolt comes before the source tree:

    python benchmarks/codesign.py
    python benchmarks/codesign.py --models a1 b0

RepVGG in its deploy form at batch 32 in float16, with each activation, and with 1x1
convs after its 3x3 ones. All variants are tuned together first (``--budget-s``), then
jax.jit and a frozen jax_bolt are timed in turn. Writes
``codesign-<device>-<date>.json`` and prints images per second, and how fast a variant
is beside the plain model: what an activation or more layers cost, here and there. The
paper's are of a Tesla T4, so only the latter can be compared.

A variant that fails, or is far from plain JAX, is recorded, the run goes on, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_models, environment
from benchmarks.models import models, repvgg

PLAIN, FROZEN = bench_models.PLAIN, bench_models.FROZEN
# Of float16 through 43 layers; a wrong kernel is off by far more.
MAX_DIFFERENCE = 0.02

_MODULES = {"a0": repvgg.RepVGGA0, "a1": repvgg.RepVGGA1, "b0": repvgg.RepVGGB0}
_EVERY = {"a0": 21, "a1": 21, "b0": 27}  # 3x3 convs without the last
# The variance of kernels, over their fan-in, that keeps activations of order one.
_GAINS = {"relu": 2.0, "gelu": 2.35, "hard_swish": 2.6, "softplus": 1.09}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A RepVGG, and what the paper has of it.

    ``pointwise``: how many of its first 3x3 convs have a 1x1 conv after them. ``table``
    is the paper's, ``top1`` in per cent, ``paper`` and ``plain`` images per second of
    this variant and, in the same table, of the model with relu and no 1x1 convs.
    """

    model: str
    activation: str = "relu"
    pointwise: int = 0
    table: str
    top1: float
    paper: int
    plain: int

    @property
    def name(self) -> str:
        parts = [self.model, self.activation]
        if self.pointwise:
            parts.append(f"1x1x{self.pointwise}")
        return "-".join(parts)

    @property
    def built(self) -> models.Model:
        make = functools.partial(
            _MODULES[self.model],
            activation=getattr(nn, self.activation),
            pointwise=self.pointwise,
        )
        convs = _EVERY[self.model] + 1 + self.pointwise
        title = f"RepVGG-{self.model.upper()} {self.activation}"
        title += f", {self.pointwise} 1x1" if self.pointwise else ""
        return models.Model(title, make, convs + 1, gain=_GAINS[self.activation])


def _tables_5_and_6() -> list[Variant]:
    rows = {
        "a0": (73.05, 7861, 73.87, 6716, 74.54, 6338),
        "a1": (74.75, 6253, 75.52, 5241, 76.72, 4868),
        "b0": (75.28, 4888, 76.02, 4145, 77.22, 3842),
    }
    found = []
    for model, (top1, plain, top1_5, img_s_5, top1_6, img_s_6) in rows.items():
        row = functools.partial(Variant, model=model, plain=plain)
        every = _EVERY[model]
        found += [
            row(table="5", top1=top1, paper=plain),
            row(table="5", top1=top1_5, paper=img_s_5, pointwise=every),
            row(
                table="6", top1=top1_6, paper=img_s_6, pointwise=every,
                activation="hard_swish",
            ),
        ]  # fmt: skip
    return found


# Table 4 has 5909 images per second for A0 with relu, the tables 5 and 6 have 7861; the
# paper does not say why. Each row is held against its own table's.
_TABLE_4 = functools.partial(Variant, model="a0", table="4", plain=5909)
VARIANTS = (
    *_tables_5_and_6(),
    _TABLE_4(activation="gelu", top1=72.38, paper=5645),
    _TABLE_4(activation="hard_swish", top1=72.98, paper=5713),
    _TABLE_4(activation="softplus", top1=72.57, paper=5453),
    Variant(
        model="a0", activation="hard_swish", pointwise=3, table="text", top1=74.02,
        paper=7288, plain=7861,
    ),
)  # fmt: skip

Freeze = Callable[[models.Apply, Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """A variant with its parameters, plain and frozen."""

    variant: Variant
    apply: models.Apply
    variables: Any
    frozen: Any


def make(
    variants: Sequence[Variant], settings: bench_models.Settings, freeze: Freeze
) -> tuple[list[Ready], jax.Array]:
    """The variants, and the one image batch they all take."""
    ready: list[Ready] = []
    images: Any = None
    for variant in variants:
        apply, variables, images = models.build(
            variant.built, settings.batch, settings.image, jnp.float16
        )
        ready.append(Ready(variant, apply, variables, freeze(apply, variables)))
    return ready, images


def tune(ready: Sequence[Ready], images: jax.Array, budget_s: float) -> dict[str, Any]:
    """Tunes all variants in one go, which keeps compilers and the GPU busy."""
    import jax_bolt

    start = time.perf_counter()
    report = jax_bolt.tune(
        lambda x: [each.frozen(x) for each in ready], images, budget_s=budget_s
    )
    sites = report.sites
    return {
        "tune_s": time.perf_counter() - start,
        "sites": len(sites),
        "regions": len({site.region for site in sites}),
        "on_kernels": sum(site.kernel not in ("", "xla") for site in sites),
        "not_tuned": sorted({s.reason for s in sites if s.time_us is None}),
    }


def measure(
    ready: Ready, images: jax.Array, settings: bench_models.Settings
) -> dict[str, Any]:
    """What is measured of one variant, as JSON data."""
    jitted, frozen = jax.jit(ready.apply), ready.frozen
    callables = {PLAIN: jitted, FROZEN: lambda _, x: frozen(x)}
    expected = np.asarray(jitted(ready.variables, images).astype(jnp.float32))
    expected = expected.astype(np.float64)
    args = ready.variables, images
    found = {
        name: bench_models.attempt(bench_models.first_call, fun, *args, expected)
        for name, fun in callables.items()
    }
    for step, key in (
        (bench_models.wall, "wall_ms"),
        (bench_models.queued, "queued_ms"),
    ):
        for name, fun in callables.items():
            if "error" in found[name]:
                continue
            rounds = [
                bench_models.attempt(step, fun, *args, settings)
                for _ in range(settings.rounds)
            ]
            found[name] |= min(rounds, key=lambda each: each.get(key, 0.0))
    for timed in found.values():
        for key in ("queued_ms", "wall_ms"):
            if key in timed:
                timed[f"img_s_{key[:-3]}"] = settings.batch / timed[key] * 1e3
    leaves = jax.tree.leaves(ready.variables)
    return {
        "title": ready.variant.built.title,
        "parameters": sum(leaf.size for leaf in leaves),
        "variants": found,
    }


def problems(result: dict[str, Any]) -> list[str]:
    """Why a result is a failure; empty where it is not one."""
    if "error" in result:
        return [result["error"]]
    found = result["variants"]
    out = [f"{name}: {v['error']}" for name, v in found.items() if "error" in v]
    if not out and not found[FROZEN]["relative_l2"] <= MAX_DIFFERENCE:
        out.append(f"{FROZEN} is {found[FROZEN]['relative_l2']:.1e} off plain jax.jit")
    return out


def table(results: dict[str, dict[str, Any]]) -> str:
    """Images per second, and beside the model with relu and no 1x1 convs."""
    head = (
        f"{'variant':34}{'jit':>9}{'bolt':>9}{'bolt/jit':>10}"
        f"{'bolt/plain':>12}{'jit/plain':>11} |{'paper':>7}{'/plain':>8}{'top-1':>7}"
    )
    lines = [head, "-" * len(head)]
    for result in results.values():
        paper = result["paper"]
        if "variants" not in result:
            lines.append(f"{paper['name']:34}{result['error'].splitlines()[0]}")
            continue
        plain = results.get(f"{paper['model']}-relu", {})
        bolt, jitted = (images_per_s(result, which) for which in (FROZEN, PLAIN))
        cells = (
            (jitted, 9, 0),
            (bolt, 9, 0),
            (_ratio(bolt, jitted), 10, 2),
            (_ratio(bolt, images_per_s(plain, FROZEN)), 12, 2),
            (_ratio(jitted, images_per_s(plain, PLAIN)), 11, 2),
        )
        lines.append(
            f"{result['title']:34}"
            + "".join(bench_models.cell(*each) for each in cells)
            + f" |{paper['paper']:7}{paper['paper'] / paper['plain']:8.2f}"
            + f"{paper['top1']:7.2f}"
        )
    return "\n".join(lines)


def images_per_s(result: dict[str, Any], which: str) -> float | None:
    """Of the device's time where that was measured, else of wall time."""
    timed = result.get("variants", {}).get(which, {})
    return timed.get("img_s_queued", timed.get("img_s_wall"))


def _ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def main(argv: Sequence[str] | None = None, freeze: Freeze | None = None) -> int:
    """The command line; tests have a stand-in for ``freeze``."""
    args = _arguments(argv)
    environment.set_sound_cpu_flags()
    if freeze is None:
        import jax_bolt

        freeze = jax_bolt.freeze
    settings = bench_models.Settings(
        batch=args.batch, image=args.image, runs=5 if args.quick else 30, rounds=1
    )
    chosen = [v for v in VARIANTS if v.model in args.models]
    chosen = [v for v in chosen if args.only in v.name]
    described = environment.describe()
    name = f"{environment.slug(described['device'])}-{described['date'][:10]}"
    path = args.out / f"codesign-{name}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    ready, images = make(chosen, settings, freeze)
    document: dict[str, Any] = {
        "environment": described,
        "settings": dataclasses.asdict(settings) | {"dtype": "float16"},
        "tuning": {},
        "variants": {},
    }
    if environment.has_gpu():
        document["tuning"] = bench_models.attempt(tune, ready, images, args.budget_s)
        print(f"tuning: {document['tuning']}", flush=True)
    results = document["variants"]
    for each in ready:
        result = bench_models.attempt(measure, each, images, settings)
        variant = each.variant
        result["paper"] = dataclasses.asdict(variant) | {"name": variant.name}
        results[variant.name] = result
        # After every one: a run that is cut short keeps what it measured.
        path.write_text(json.dumps(document, indent=1) + "\n")
        for problem in problems(result):
            print(f"{variant.name}: {problem}", file=sys.stderr, flush=True)
    print(table(results))
    print(
        f"\n{described['device']}, jax {described['versions']['jax']}: images per s, "
        f"batch {settings.batch}, float16; /plain: beside the same with relu and no 1x1"
        f"\nwritten: {path}"
    )
    failed = "error" in document["tuning"] or any(map(problems, results.values()))
    return int(failed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=["a0"], choices=_MODULES)
    parser.add_argument("--only", default="", help="variants whose name has this in it")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=70.0,
        metavar="SECONDS",
        help="for tuning; what is not reached stays with XLA (default: 70)",
    )
    parser.add_argument("--quick", action="store_true", help="few runs")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
