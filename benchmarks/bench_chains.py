# SPDX-License-Identifier: Apache-2.0
"""Regions in one kernel, against each on a kernel of its own, and XLA's path.

Run by path, so that an installed jax_bolt comes before the source tree:

    python benchmarks/bench_chains.py
    python benchmarks/bench_chains.py --groups resnet50 --only 14x14
    python benchmarks/bench_chains.py --plan

Of the chain's candidates, and of those of either region, the fastest in the tuner's
worker is taken, operands rotated. "chain" and "apart" are then timed alike, in programs
as jax_bolt runs them: kernels of one custom call, each of which may start while the one
before it ends. Where the chain begins with a merged shortcut, "apart" has the merged
pair in one kernel. "alone" is the worker's time of the chain, "hot" with one set of
operands. "bytes" is what both kernels move over what the chain moves, at least.

Writes ``chains-<device>-<date>[-<label>].json`` after every pair, and a table.
``--plan`` lists pairs and candidates and needs no GPU. Exits with 1 where a pair
failed, with 2 where nothing can be measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import chain_pairs, environment, kernel_problems, kernel_times
from benchmarks.chain_pairs import Pair
from jax_bolt._src import arch as arch_
from jax_bolt._src import forms, plan
from jax_bolt._src.arch import GpuArch
from jax_bolt._src.chain import AnySite, ChainInfo
from jax_bolt._src.errors import CompileError
from jax_bolt._src.kernels import chain_sm90
from jax_bolt._src.launches import Launches, Promise
from jax_bolt._src.plan import AnyCandidate, Candidate, ChainCandidate
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import builder, isolate, measure
from jax_bolt._src.tune.target import Target, executable

_REPEATS = 7
_COLUMNS = {
    "chain_us": "chain",
    "apart_us": "apart",
    "xla_us": "XLA",
    "alone_us": "alone",
    "hot_us": "hot",
    "speedup": "apart/chain",
    "xla_speedup": "XLA/chain",
    "paper": "paper",
    "bytes_ratio": "bytes",
}
_NAME, _WIDTH = 34, 12


def candidates(pair: Pair, arch: GpuArch) -> tuple[list[ChainCandidate], str]:
    """The chain's, and why there is none."""
    reason = ""
    for form in forms.chain_forms(pair.site.region):
        reason = chain_sm90.supports(form.region, arch)
        if reason is None:
            configs = chain_sm90.configs(form.region, arch)
            return [ChainCandidate(form, chain_sm90, c, arch) for c in configs], ""
    return [], reason or "it has no form"


def own_candidates(site: AnySite, arch: GpuArch) -> list[AnyCandidate]:
    """The likeliest of a region that take its left operand as it lies; or a merged
    pair's."""
    if isinstance(site, ChainInfo):
        return [*plan.chain_candidates(site.region, arch)[0]]
    found, _ = plan.candidates(site.region, arch)
    taken = [c for c in found if not kernel_problems.moves_input(site, c.form.name)]
    return [c for c in plan.likeliest(taken) if isinstance(c, Candidate)]


class Bench:
    """What all measurements share."""

    def __init__(self, target: Target, built: builder.Built, worker: isolate.Worker):
        self.target, self.built, self.worker = target, built, worker

    def micros(self, candidate: AnyCandidate, sets: int) -> float:
        digest, artifact = self.built[candidate.source]
        if isinstance(artifact, CompileError):
            raise artifact
        request = isolate.request_for(
            candidate, digest, artifact, sets, _REPEATS, verify=sets > 1
        )
        bandwidth = self.target.arch.bandwidth
        limit_s = isolate.limit_s(candidate.form.region, sets, bandwidth)
        return self.worker.time(request, limit_s).micros

    def ranked(
        self, found: Sequence[AnyCandidate], sets: int, entries: list[dict[str, Any]]
    ) -> list[tuple[float, AnyCandidate]]:
        """By time, the fastest first; ``entries`` gets every one."""
        timed: list[tuple[float, AnyCandidate]] = []
        for candidate in found:
            entry: dict[str, Any] = {"candidate": candidate.text}
            entry["expected"] = candidate.reasoning
            entries.append(entry)
            try:
                entry["us"] = self.micros(candidate, sets)
            except (CompileError, isolate.Failed) as error:
                entry["failure"] = str(error).splitlines()[0]
            else:
                timed.append((entry["us"], candidate))
        return sorted(timed, key=lambda pair: pair[0])

    def load(self, region: Any, candidate: AnyCandidate) -> Any:
        built = self.built[candidate.source]
        return executable(region, candidate, *built, self.target)

    def measure(self, pair: Pair, result: dict[str, Any]) -> None:
        """Fills in ``result``."""
        site, ordinal = pair.site, self.target.ordinal
        arch = self.target.arch
        operands = kernel_times.rotating_operands(site, arch.l2_bytes)
        sets = result["sets"] = len(operands.sets)
        xla = measure.time_region(reference_fun(site.reference), operands, ordinal)
        result["xla_us"] = xla.micros
        yardstick = measure.Yardstick(operands)
        xla_errors = yardstick.errors(xla.outputs)
        self._apart(pair, operands, sets, result)
        found, _ = candidates(pair, arch)
        for alone_us, candidate in self.ranked(found, sets, result["candidates"]):
            kernel = self.load(site.region, candidate)
            run = measure.time_in_sequence(kernel, operands, ordinal)
            errors = measure.worst(
                yardstick.errors(run.outputs), xla_errors, site.region
            )
            if not measure.is_accurate(errors, site.region):
                result["failures"].append(
                    f"{candidate.text}: error {errors.kernel:.2e}, XLA {errors.xla:.2e}"
                )
                continue
            result |= {"chosen": candidate.text, "alone_us": alone_us}
            result |= {"chain_us": run.micros, "hot_us": self.micros(candidate, 1)}
            result |= {"error": errors.kernel, "xla_error": errors.xla}
            break
        ours = result.get("chain_us")
        for name, other in (("speedup", "apart_us"), ("xla_speedup", "xla_us")):
            if ours and result.get(other):
                result[name] = result[other] / ours

    def _apart(
        self, pair: Pair, operands: measure.Operands, sets: int, result: dict[str, Any]
    ) -> None:
        """Both regions on the best kernel of each."""
        kernels, texts, alone = [], [], 0.0
        for site in (pair.site.first, pair.site.second):
            entries: list[dict[str, Any]] = []
            found = own_candidates(site, self.target.arch)
            # As many sets as keep the L2 cold for the pair do so for each.
            ranked = self.ranked(found, sets, entries)
            if not ranked:
                result["failures"].append(f"no kernel runs {site.region.text}")
                return
            micros, best = ranked[0]
            kernels.append(self.load(site.region, best))
            texts.append(best.text)
            alone += micros
        result["apart"], result["apart_alone_us"] = texts, alone
        left = pair.site.second.in_avals[pair.site.second.operands[0]]
        right = pair.site.second.in_avals[pair.site.second.operands[1]]
        between = Promise(-1, left.shape, left.dtype)
        assert Launches().takes(kernels[1], (between, right))
        run = measure.time_apart(tuple(kernels), operands, self.target.ordinal)
        result["apart_us"] = run.micros


def blank(pair: Pair) -> dict[str, Any]:
    region = pair.site.region
    apart = region.first.bytes_moved + region.second.bytes_moved  # a pair is merged
    return {
        "group": pair.group,
        "name": pair.name,
        "region": region.text,
        "paper": pair.paper,
        "bytes": region.bytes_moved,
        "bytes_ratio": apart / region.bytes_moved,
        "candidates": [],
        "failures": [],
    }


def row(result: dict[str, Any]) -> str:
    cells = (result.get(key) for key in _COLUMNS)
    texts = (f"{'-' if c is None else f'{c:.2f}':>{_WIDTH}}" for c in cells)
    return f"{result['name']:{_NAME}}{''.join(texts)}"


def header() -> str:
    heads = "".join(f"{name:>{_WIDTH}}" for name in _COLUMNS.values())
    return f"{'pair, times in µs':{_NAME}}{heads}"


def plan_text(pairs: Sequence[Pair], arch: GpuArch) -> str:
    lines = []
    for pair in pairs:
        found, reason = candidates(pair, arch)
        lines.append(f"{pair.group}: {pair.name}{': ' if reason else ''}{reason}")
        lines += [f"    {c.config.text}\n        {c.reasoning}" for c in found]
    return "\n".join(lines)


def run(pairs: Sequence[Pair], target: Target, args: argparse.Namespace) -> int:
    """Builds, measures, prints and writes; the exit code."""
    wanted: list[AnyCandidate] = []
    for pair in pairs:
        wanted += candidates(pair, target.arch)[0]
        for site in (pair.site.first, pair.site.second):
            wanted += own_candidates(site, target.arch)
    clock = kernel_times.Clock(args.budget_s)
    built = kernel_times.build(wanted, target, clock)
    document = {"environment": environment.describe(), "settings": {}, "pairs": []}
    settings = {"groups": args.groups, "batch": args.batch, "dtype": args.dtype}
    document["settings"] = settings
    slug = environment.slug(document["environment"]["device"])
    end = f"-{args.label}" if args.label else ""
    date = document["environment"]["date"][:10]
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"chains-{slug}-{date}{end}.json"
    print(header(), flush=True)
    failed = False
    with isolate.worker(target.ordinal) as worker:
        bench = Bench(target, built, worker)
        for pair in pairs:
            result = blank(pair)
            document["pairs"].append(result)
            try:
                clock.check()
                bench.measure(pair, result)
            except builder.Stopped as reason:
                print(f"stopped: {reason}")
                break
            except Exception as error:  # one pair must not end the run
                result["failures"].append(f"{type(error).__name__}: {error}")
            print(row(result), flush=True)
            for failure in result["failures"]:
                print(f"{pair.name}: {failure}", file=sys.stderr, flush=True)
            failed |= bool(result["failures"])
            # After every pair: a run that is cut short keeps what it measured.
            path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"written: {path}")
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _arguments(argv)
    pairs = chain_pairs.collect(tuple(args.groups), args.batch, args.dtype)
    pairs = [pair for pair in pairs if args.only in pair.name]
    if not pairs:
        print(f"no pair's name contains {args.only!r}", file=sys.stderr)
        return 2
    if args.plan:
        print(plan_text(pairs, arch_.from_name(args.arch)))
        return 0
    target = kernel_times.target_or_none("bench_chains.py", "pairs")
    if target is None:
        return 2
    return run(pairs, target, args)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    groups = chain_pairs.GROUPS
    parser.add_argument("--groups", nargs="+", default=list(groups), choices=groups)
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--only", default="", metavar="TEXT", help="in a pair's name")
    parser.add_argument("--budget-s", type=float, metavar="S", help="stop after that")
    parser.add_argument("--plan", action="store_true", help="list only; needs no GPU")
    parser.add_argument("--arch", default="sm_90a", help="of --plan")
    parser.add_argument("--label", default="", metavar="TEXT")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
