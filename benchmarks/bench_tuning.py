# SPDX-License-Identifier: Apache-2.0
"""What tuning costs, and how good its choices are.

    python benchmarks/bench_tuning.py --models resnet50 --space 12

For each model, in a cache of its own, three fresh processes: from the import with
nothing built ("cold"), with the base library built and nothing tuned ("library"), and
with everything there ("next"). Each counts what it compiled, tuned and timed. None has
the results that come with jax_bolt.

``--space N`` then times all tiles of N problems, drawn from the benchmark's, with base
programs, compiles the best of them with the region's own epilogue as well, and compares
with what the tuner's two stages take of it and with the rank model's order. (A base
program multiplies a last chunk's zeros, which the model does not count.) With
``--budget-s`` no problem is begun later than that; ``--tiles`` keeps all their times.

Writes ``tuning-<device>-<date>.json``. Exits with 1 where a process did not end well or
the "next" one compiled or tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

_MARK = "bench_tuning: "
_COLD, _LIBRARY, _NEXT = "cold", "library", "next"
_COUNTED = ("compiled", "tuned", "stage1", "stage2", "restarts")
_BEST = 8  # tiles of the whole space that are compiled with the region's epilogue


def tuned_here(name: str, batch: int, image: int) -> dict[str, Any]:
    """Imports, tunes and runs once, in this process. Seconds from before the import."""
    start = time.perf_counter()
    import jax_bolt

    imported = time.perf_counter()
    from benchmarks.models import models
    from jax_bolt._src import paths

    paths.shipped_tuning = lambda: Path("/nonexistent")

    apply, variables, x = models.build(name, batch, image)
    import jax

    fun = jax_bolt.optimize(apply)
    jax.block_until_ready((variables, x))
    began = time.perf_counter()
    report = fun.tune(variables, x, progress=False)
    tuned = time.perf_counter()
    jax.block_until_ready(fun(variables, x))
    counters = report.counters
    from jax_bolt._src.tune import job

    return {
        "import_s": imported - start,
        "model_s": began - imported,
        "tune_s": tuned - began,
        "from_import_s": tuned - start,
        "first_call_s": time.perf_counter() - tuned,
        "sites": len(report.sites),
        "spent_s": {what: round(s, 2) for what, s in job.spent.items()},
        "counters": {name: int(counters.get(name, 0)) for name in _COUNTED},
    }


def in_fresh_process(name: str, cache: Path, args: argparse.Namespace) -> Any:
    """``tuned_here`` in a new process with that cache; RuntimeError if it dies."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    command += ["--batch", str(args.batch), "--image", str(args.image)]
    return json.loads(_run(command, cache))


def built_library(cache: Path) -> float:
    """Seconds of ``python -m jax_bolt warm``."""
    start = time.perf_counter()
    _run([sys.executable, "-P", "-m", "jax_bolt", "warm"], cache)
    return time.perf_counter() - start


def _run(command: list[str], cache: Path) -> str:
    # JAX's own compilation cache would hide what is measured.
    env = os.environ | {
        "JAX_BOLT_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        log = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{command[1:4]} ended with {done.returncode}:\n{log}")
    marked = [x for x in done.stdout.splitlines() if x.startswith(_MARK)]
    return marked[-1].removeprefix(_MARK) if marked else ""


def cost_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """The three processes of one model."""
    found: dict[str, Any] = {}

    def process(key: str, cache: Path) -> None:
        one = found[key] = in_fresh_process(name, cache, args)
        print(
            f"{name}, {key}: {one['from_import_s']:.1f} s from the import, "
            f"{one['tune_s']:.1f} s of them tuning; {one['counters']}; "
            f"{one['spent_s']}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "library"
        found["warm_s"] = built_library(cache)
        print(f"{name}: the base library took {found['warm_s']:.1f} s", flush=True)
        process(_LIBRARY, cache)
        process(_NEXT, cache)
        if args.export:
            export = [sys.executable, "-P", "-m", "jax_bolt", "cache", "export"]
            _run([*export, str(args.export)], cache)
        process(_COLD, Path(folder) / "cold")
    return found


# The whole space --------------------------------------------------------------------


def drawn_problems(count: int) -> list[Any]:
    """Some of the benchmark's problems that the Hopper family takes, at batch 32."""
    from benchmarks import kernel_problems as problems

    left_out = ("hard_swish", "depthwise")
    names = [n for n in problems.NAMES if not n.endswith(left_out)]
    found = problems.collect(names, [32], 224, "bfloat16")
    return random.Random(0).sample(found, min(count, len(found)))


def listed(site: Any, arch: Any) -> list[Any]:
    """The tuner's candidates. Kernels are timed alone here, so that forms which
    rearrange activations first, or leave a part of the region, are left out."""
    from benchmarks.kernel_problems import moves_input
    from jax_bolt._src import plan

    found, _ = plan.candidates(site.region, arch)
    whole = [c for c in found if not c.form.ends_on_xla]
    return [c for c in whole if not moves_input(site, c.form.name)]


def whole_space(site: Any, arch: Any) -> list[Any]:
    """A candidate for every tile of these forms, in the rank model's order."""
    from jax_bolt._src import plan
    from jax_bolt._src.kernels import implicit_gemm_rank as rank
    from jax_bolt._src.kernels import implicit_gemm_sm90 as family
    from jax_bolt._src.kernels import implicit_gemm_tiles as tiles
    from jax_bolt._src.kernels.image import Image

    found: list[tuple[float, Any]] = []
    forms = dict.fromkeys(c.form for c in listed(site, arch) if c.template is family)
    for form in forms:
        image = Image.of(form.region.problem)
        for tile in tiles.tiles_of(image, form.region.epilogue, arch):
            made = plan.Candidate(form, family, tile.config(), arch)
            found.append((rank.cycles(tile, image, form.region, arch), made))
    return [made for _, made in sorted(found, key=lambda pair: pair[0])]


def against_the_space(
    problems: Sequence[Any],
    target: Any,
    budget_s: float = math.inf,
    tiles: Path | None = None,
) -> list[dict[str, Any]]:
    """For each problem: the best tile there is, and what the two stages take.

    ``tiles`` gets a line of JSON for each: every tile's base program's time, by region
    and candidate.
    """
    deadline = time.monotonic() + budget_s
    from benchmarks.kernel_problems import short
    from jax_bolt._src import base
    from jax_bolt._src.tune import builder, isolate, measure, stages

    def times(candidates: Sequence[Any], sets: int, built: Any) -> dict[Any, float]:
        found: dict[Any, float] = {}
        for candidate in candidates:
            digest, artifact = built[candidate.source]
            if not isinstance(artifact, Path):
                continue
            request = isolate.request_for(
                candidate, digest, artifact, sets, 5, verify=False
            )
            try:
                found[candidate] = worker.time(request).micros
            except isolate.Failed as error:
                print(f"  {candidate.text}: {error}", flush=True)
        return found

    def build(candidates: Sequence[Any]) -> Any:
        return builder.build(list(candidates), target, lambda _: None)

    results = []
    spaces = [whole_space(p.site, target.arch) for p in problems]
    plains = [[(c, base.plain(c)) for c in space] for space in spaces]
    built = build([p for pairs in plains for _, p in pairs if p is not None])
    rounds: list[tuple[Any, int, list[Any], dict[Any, float], list[Any]]] = []
    with isolate.worker(target.ordinal) as worker:
        for problem, pairs in zip(problems, plains, strict=True):
            if time.monotonic() > deadline:
                print(f"{len(problems) - len(rounds)} problems not reached", flush=True)
                break
            region = problem.region
            sets = measure.sets_for(region, target.arch.l2_bytes)
            timed = times([p for _, p in pairs if p is not None], sets, built)
            micros = {c: timed[p] for c, p in pairs if p in timed}
            best = sorted(micros, key=micros.__getitem__)[:_BEST]
            if tiles is not None:
                with tiles.open("a") as file:
                    every = {c.text: us for c, us in micros.items()}
                    file.write(json.dumps({region.text: every}) + "\n")
            offered = listed(problem.site, target.arch)
            stage1 = {c: micros[c] for c in offered if c in micros and base.stand_in(c)}
            chosen = stages.finalists(offered, stage1, None)
            rounds.append((problem, sets, best, micros, chosen))
            print(f"{short(region.problem)}: {len(micros)} tiles timed", flush=True)
        built = build([c for *_, best, _, chosen in rounds for c in (*best, *chosen)])
        for problem, sets, best, micros, chosen in rounds:
            found = times(list(dict.fromkeys((*best, *chosen))), sets, built)
            if not any(c in found for c in chosen):
                continue
            winner = min(found, key=found.__getitem__)
            taken = min(found[c] for c in chosen if c in found)
            order = listed(problem.site, target.arch)
            near = [
                order.index(c)
                for c in found
                if c in order and found[c] <= 1.02 * found[winner]
            ]
            results.append(
                {
                    "problem": short(problem.region.problem),
                    "epilogue": problem.label,
                    "tiles": len(micros),
                    "best": winner.text,
                    "best_us": found[winner],
                    "tuned_us": taken,
                    "ratio": taken / found[winner],
                    # Of those within 2 % of the best, the first by the rank model.
                    "rank": min(near) + 1 if near else None,
                }
            )
            last = results[-1]
            print(
                f"{last['problem']} {last['epilogue']}: best of {last['tiles']} "
                f"{last['best_us']:.1f} us, tuned {taken:.1f} us, rank {last['rank']}",
                flush=True,
            )
    return results


def summary(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """How far choices are from the best; how often the model has it in its top 8."""
    logs = [math.log(r["ratio"]) for r in results]
    top = [r["rank"] is not None and r["rank"] <= 8 for r in results]
    return {
        "problems": len(results),
        "ratio_geomean": math.exp(sum(logs) / len(logs)),
        "ratio_max": max(r["ratio"] for r in results),
        "in_top_8": sum(top) / len(top),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _arguments(argv)
    if args.child:
        result = tuned_here(args.child, args.batch, args.image)
        print(_MARK + json.dumps(result), flush=True)
        return 0
    document: dict[str, Any] = {"models": {}, "space": []}
    failed = False
    # In processes of their own, before this one takes the GPU's memory.
    for name in args.models:
        try:
            found = document["models"][name] = cost_of(name, args)
        except RuntimeError as error:
            print(error, flush=True)
            failed = True
            continue
        counters = found[_NEXT]["counters"]
        failed = failed or bool(counters["compiled"] or counters["tuned"])
    from benchmarks import environment
    from jax_bolt._src import compat, options, resolve

    document = {"environment": environment.describe()} | document
    document["cpus"] = len(os.sched_getaffinity(0))
    if args.space:
        target = resolve.target_for(compat.cuda_device(), options.current())
        drawn = drawn_problems(args.space)
        found = against_the_space(drawn, target, args.budget_s, args.tiles)
        document["space"] = found
        if found:
            document["space_summary"] = summary(found)
            print(document["space_summary"], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    where = document["environment"]
    name = f"tuning-{environment.slug(where['device'])}-{where['date'][:10]}.json"
    path = args.out / name
    path.write_text(json.dumps(document, indent=1) + "\n")
    return int(failed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="*", default=["resnet50"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument("--space", type=int, default=0, metavar="N", help="problems")
    parser.add_argument("--budget-s", type=float, default=math.inf, metavar="S")
    parser.add_argument(
        "--tiles", type=Path, metavar="FILE", help="every tile's time: for the model"
    )
    parser.add_argument("--export", type=Path, metavar="FILE", help="the tuned cache")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
