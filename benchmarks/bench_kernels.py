# SPDX-License-Identifier: Apache-2.0
"""Every conv and product of the models, kernel by kernel: templates, library, XLA.

Run by path, so that an installed jax_bolt comes before the source tree:

    python benchmarks/bench_kernels.py --models resnet50 --batches 1 32
    python benchmarks/bench_kernels.py --plan

"library" is the conv or product alone, without its epilogue, as XLA runs it: cuDNN or
cuBLASLt, or a Triton kernel where XLA timed that faster (the file says which). Filters
are packed beforehand, for it and for our kernels. "XLA region" is XLA's own lowering of
the whole region, from the user's operands; "in prog" is ours, measured like that.

Writes ``kernels-<device>-<date>[-<label>].json`` after every problem and a table.
``--plan`` lists problems and candidates and needs no GPU. Exits with 1 where a part of
a problem failed, with 2 where nothing can be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import environment, floor, kernel_problems, kernel_table, kernel_times
from benchmarks.kernel_problems import Problem
from jax_bolt._src import arch as arch_
from jax_bolt._src import kernels
from jax_bolt._src.tune import builder, isolate
from jax_bolt._src.tune.target import Target

TEMPLATES = tuple(template.name for template in kernels.TEMPLATES)
# What an H100 reached; only sorts problems into classes where nothing is measured.
NOMINAL = floor.Ceilings(flops=790e12, bandwidth=3.0e12)


def plan_text(problems: Sequence[Problem], args: argparse.Namespace) -> str:
    """The problems and their candidates on the architecture ``args.arch``."""
    arch = arch_.from_name(args.arch)
    lines: list[str] = []
    total, sources = 0, set()
    for problem in problems:
        found = kernel_problems.candidates(
            problem, arch, _disabled(args.templates), args.quick
        )
        total += len(found)
        sources |= {candidate.source for candidate in found}
        where = ", ".join(f"{n} x{count}" for n, count in problem.where.items())
        kind = kernel_problems.classify(problem.region, NOMINAL)
        lines.append(f"{problem.region.problem.text} {problem.label} [{kind}; {where}]")
        lines += [f"    {candidate.text}" for candidate in found] or ["    none"]
    lines.append(
        f"{len(problems)} problems, {total} candidates, {len(sources)} kernels to "
        f"build for {arch.name}"
    )
    return "\n".join(lines)


def run(problems: Sequence[Problem], target: Target, args: Any) -> int:
    """Builds, measures, prints and writes; the exit code."""
    clock = kernel_times.Clock(args.budget_s)
    ceilings = floor.measure()
    disable = tuple(dict.fromkeys((*target.disable, *_disabled(args.templates))))
    templates = [name for name in TEMPLATES if name not in disable]
    found = [
        kernel_problems.candidates(problem, target.arch, disable, args.quick)
        for problem in problems
    ]
    print(f"{len(problems)} problems, {sum(map(len, found))} candidates", flush=True)
    built = kernel_times.build([c for group in found for c in group], target, clock)
    document = _document(args, ceilings)
    path = args.out / _file_name(document["environment"], args.label)
    args.out.mkdir(parents=True, exist_ok=True)
    results = document["problems"]
    print(kernel_table.header(templates), flush=True)
    worker = isolate.worker(target.ordinal)
    libraries: dict[str, Any] = {}
    try:
        for problem, candidates in zip(problems, found, strict=True):
            clock.check()
            result = kernel_times.measure_problem(
                problem, candidates, built, target, ceilings, clock, worker, libraries
            )
            results.append(result)
            print(kernel_table.row(result, templates), flush=True)
            for failure in result["failures"]:
                print(f"{problem.text}: {failure}", file=sys.stderr, flush=True)
            # After every problem: a run that is cut short keeps what it measured.
            _write(path, document)
    except builder.Stopped as reason:
        document["not_reached"] = [p.region.text for p in problems[len(results) :]]
        print(f"stopped: {reason}; {len(problems) - len(results)} problems not reached")
    finally:
        worker.stop()
    _write(path, document)
    print(f"\n{kernel_table.summary_text(document['summary'])}\n")
    device = document["environment"]["device"]
    print(
        f"{device}: {ceilings.flops / 1e12:.0f} TFLOP/s bf16, "
        f"{ceilings.bandwidth / 1e12:.2f} TB/s; times in µs, L2 cold; ratios over 1: "
        "jax_bolt is faster; *: the input's rearrangement is in the time"
    )
    print(f"written: {path}")
    return int(any(result["failures"] for result in results))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _arguments(argv)
    problems = [
        problem
        for problem in kernel_problems.collect(
            args.models, args.batches, args.image, args.dtype
        )
        if args.only in problem.text
    ]
    if not problems:
        print(f"no problem contains {args.only!r}", file=sys.stderr)
        return 2
    if args.plan:
        print(plan_text(problems, args))
        return 0
    target = kernel_times.target_or_none("bench_kernels.py", "problems")
    if target is None:
        return 2
    return run(problems, target, args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = kernel_problems.NAMES
    parser.add_argument("--models", nargs="+", default=list(names), choices=names)
    parser.add_argument("--batches", nargs="+", type=int, default=[32], metavar="N")
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="problems whose text contains TEXT"
    )
    parser.add_argument(
        "--templates", nargs="+", default=list(TEMPLATES), choices=TEMPLATES
    )
    parser.add_argument("--budget-s", type=float, metavar="S", help="stop after that")
    parser.add_argument(
        "--quick", action="store_true", help="two candidates per template and form"
    )
    parser.add_argument("--plan", action="store_true", help="list only; needs no GPU")
    parser.add_argument("--arch", default="sm_90a", help="of --plan")
    parser.add_argument(
        "--label", default="", metavar="TEXT", help="at the end of the file's name"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


def _disabled(wanted: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in TEMPLATES if name not in wanted)


def _document(args: argparse.Namespace, ceilings: floor.Ceilings) -> dict[str, Any]:
    settings = {
        key: value for key, value in vars(args).items() if key not in ("out", "plan")
    }
    return {
        "environment": environment.describe(),
        "settings": settings,
        "ceilings": {"flops": ceilings.flops, "bandwidth": ceilings.bandwidth},
        "problems": [],
    }


def _file_name(described: dict[str, Any], label: str) -> str:
    slug = environment.slug(described["device"])
    end = f"-{label}" if label else ""
    return f"kernels-{slug}-{described['date'][:10]}{end}.json"


def _write(path: Path, document: dict[str, Any]) -> None:
    document["summary"] = kernel_table.summary(document["problems"])
    path.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
