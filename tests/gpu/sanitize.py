# SPDX-License-Identifier: Apache-2.0
"""Runs every template over the ragged cases with nothing else on the GPU.

For compute-sanitizer, with every buffer an allocation of its own so that a read past
its end is seen:

    XLA_PYTHON_CLIENT_ALLOCATOR=platform compute-sanitizer --tool memcheck \\
        --error-exitcode 1 python tests/gpu/sanitize.py

Operands are made and rearranged on the CPU, and results compared there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import region_cases as cases
import test_chain_kernels as chains
import test_kernels as kernels

from jax_bolt._src import forms, invoke, launches, plan
from jax_bolt._src.jit import loader
from jax_bolt._src.tune import measure

TOLERANCE = {"bf16": 1e-2, "f16": 2e-3, "f32": 2e-3}


def error_of(site, operands, candidate) -> float:
    """The relative error of one launch against float64, of the worst output."""
    kernel = kernels.load(site, candidate)
    lhs, rhs, sides, vectors = measure.split(site, operands)
    region = candidate.form.region
    full = region.stored_rows, region.problem.channels
    outputs = [
        np.full(full, np.nan, invoke.JAX_DTYPES[o.dtype])
        for o in site.region.epilogue.outputs
    ]
    space = np.zeros(max(1, kernel.workspace_bytes), np.uint8)
    a, b = forms.prepare(candidate.form.name, site.region.problem, lhs, rhs)
    arrays = _launched(kernel, (a, b, outputs, sides, vectors, space))
    return float(max(kernels.errors(arrays[2], kernels.truth(site, operands))))


def error_of_chain(site, operands, candidate) -> float:
    """As ``error_of``, of several regions in one kernel."""
    kernel = chains.load(site, candidate)
    assert isinstance(kernel, invoke.ChainExecutable)
    shapes = [each.out_avals[0].shape for each in site.sites]
    a, b, sides, vectors = launches.bound(
        kernel, measure.roles_of(site, operands), shapes
    )
    outputs = [
        np.full(
            (r.problem.rows, r.problem.channels),
            np.nan,
            invoke.JAX_DTYPES[r.epilogue.out_dtype],
        )
        for r in site.region.regions[-2 if site.region.stored else -1 :]
    ]
    space = np.zeros(max(1, kernel.workspace_bytes), np.uint8)
    arrays = _launched(kernel, (a, b, outputs, sides, vectors, space))
    return float(max(kernels.errors(arrays[2], kernels.truth(site, operands))))


def _launched(kernel, arrays):
    """The arguments on the GPU, after one launch on them."""
    arrays = jax.device_put(arrays, jax.devices("cuda")[0])
    jax.block_until_ready(arrays)
    address = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), arrays)
    kind, dims = invoke.launched(kernel.form.region)
    ordinal = kernels.target().ordinal
    # Nothing else runs: what is read without waiting may be.
    recipe = kernel.held_recipe
    loader.native().run(kernel.digest, kind, dims, address, ordinal, recipe)
    return arrays


def _loads_for_others(candidate) -> bool:
    return dict(candidate.config.params).get("cluster", 1) != 1


def main(part: int = 0, parts: int = 1) -> int:
    bad = done = 0
    found = dict(kernels.all_candidates()[0])
    all_cases = [*cases.GEMMS, *cases.CONVS]
    if kernels.target().arch.sm == 90:
        found |= chains.all_candidates()[0]
        all_cases += chains.ALL
    # CTAs that load for each other come last: racecheck may not come back from them.
    turns = [(case, shared) for shared in (False, True) for case in all_cases]
    for case, shared in turns[part::parts]:
        wanted = [c for c in found[case.name] if _loads_for_others(c) == shared]
        if not wanted:
            continue
        with jax.default_device(jax.devices("cpu")[0]):
            site = case.site()
            operands = measure.make_operands(site, l2_bytes=1).sets[0]
            for candidate in wanted:
                if candidate.form.pool is not None:
                    continue  # XLA's to end, and a kernel of another case
                # Before the launch: the tool may speak of it, or never come back.
                print(f"{case.name}: {candidate.text}", flush=True)
                of_chain = isinstance(candidate, plan.ChainCandidate)
                error = (error_of_chain if of_chain else error_of)(
                    site, operands, candidate
                )
                done += 1
                if not error <= TOLERANCE[site.region.dtype]:
                    bad += 1
                    print(f"WRONG {case}: {candidate.text}: {error:.2e}")
    print(f"{done} launches, {bad} wrong")
    return 1 if bad or not done else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
