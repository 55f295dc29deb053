# SPDX-License-Identifier: Apache-2.0
"""Compiles, on a machine without a GPU, what on_gpu.sh would compile on one with it.

    JAX_BOLT_CACHE_DIR=/tmp/carried python benchmarks/prebuild.py
    JAX_BOLT_CACHE_DIR=/tmp/carried python benchmarks/prebuild.py --only tests,chains

``library`` are an architecture's base programs, ``results`` the kernels that the tuning
results shipped here name, ``models`` the likeliest chains of the benchmark's models,
``chains`` those of bench_chains.py, ``tests`` the kernels that tests/gpu has a list of.
Kernels are stored by their sources and by nvcc's version: a cache that is carried to a
machine with the same nvcc saves that machine the time.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import bench_chains, chain_pairs
from benchmarks.models import models
from jax_bolt._src import arch as arch_
from jax_bolt._src import chain, options, paths, plan, program, region_text
from jax_bolt._src.arch import GpuArch
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import store, toolchain
from jax_bolt._src.tune import db
from jax_bolt._src.warm import library

_MODELS = ("resnet50", "resnet18", "vgg16", "repvgg_a0")


def of_library(arch: GpuArch) -> Iterator[str]:
    active = options.current()
    yield from library.sources(arch, active, toolchain.find(active))


def of_results(arch: GpuArch) -> Iterator[str]:
    """Of results that were made from other headers, too: these are tried first."""
    for file in db.Database(paths.shipped_tuning()).all():
        board = db.arch_of(file.device)
        if board.name != arch.name:
            continue
        for text, entry in file.entries.items():
            found = plan.chosen(region_text.parse(text), board, entry)
            if found is not None:
                yield found.source


def of_models(arch: GpuArch) -> Iterator[str]:
    for name in _MODELS:
        apply, *args = models.shapes(name)
        traced = program.trace(apply, (), args, {}, options.current())[0]
        for group in chain.sequences(traced.program):
            for each in group:
                found, _ = plan.chain_candidates(each.info.region, arch)
                yield from (candidate.source for candidate in found)


def of_chains(arch: GpuArch) -> Iterator[str]:
    groups = (chain_pairs.TABLE1, chain_pairs.TABLE2, chain_pairs.PERCEPTRONS)
    for pair in chain_pairs.collect((*groups, chain_pairs.RESNET), 32, "bfloat16"):
        candidates = [*bench_chains.candidates(pair, arch)[0]]
        for site in (pair.site.first, pair.site.second):
            candidates += bench_chains.own_candidates(site, arch)
        yield from (candidate.source for candidate in candidates)


def of_tests(arch: GpuArch) -> Iterator[str]:
    tests = Path(__file__).resolve().parents[1] / "tests"
    sys.path += [str(tests), str(tests / "gpu")]
    names = ("test_kernels", "test_chain_kernels", "test_pooled")
    modules: list[Any] = [importlib.import_module(name) for name in names]
    regions, chains, pooled = modules
    found: list[str] = []

    def build(tools: object, sources: Sequence[str], arch: object) -> dict:
        found.extend(sources)
        return {}

    target = SimpleNamespace(
        arch=arch, toolchain=None, kernels=SimpleNamespace(build=build)
    )
    for module in modules:
        module.target = lambda: target
    regions.all_candidates()
    chains.all_candidates()
    for case in pooled.HOPPER:
        found += [candidate.source for candidate in pooled.chosen(case)]
        possible, _ = plan.candidates(case.site().region, arch)
        found += [c.source for c in possible if c.form.ends_on_xla][:1]
    yield from found


PARTS: dict[str, Callable[[GpuArch], Iterator[str]]] = {
    "library": of_library,
    "results": of_results,
    "models": of_models,
    "chains": of_chains,
    "tests": of_tests,
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", default="sm_90a", help="the GPU's architecture")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--list", action="store_true", help="count, and build nothing")
    args = parser.parse_args(argv)
    names = args.only.split(",")
    for name in names:
        if name not in PARTS:
            parser.error(f"--only: {name!r} is none of {', '.join(PARTS)}")
    jax.config.update("jax_platforms", "cpu")
    arch, active = arch_.from_name(args.arch), options.current()
    tools = toolchain.find(active)
    kernels = store.Store(paths.kernel_root(active))
    failed = 0
    for name in names:
        wanted = list(dict.fromkeys(PARTS[name](arch)))
        there = sum(
            kernels.find(kernels.digest(tools, s, arch)) is not None for s in wanted
        )
        print(f"{name}: {len(wanted)} kernels, {there} there", flush=True)
        if not args.list:
            built = kernels.build(tools, wanted, arch, active.jobs)
            errors = [e for e in built.values() if isinstance(e, CompileError)]
            failed += len(errors)
            for error in errors:
                print(f"{name}: {error}", file=sys.stderr)
    print(f"in {kernels.root}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
