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
import test_kernels as kernels

from jax_bolt._src import forms, invoke
from jax_bolt._src.jit import loader
from jax_bolt._src.tune import measure

TOLERANCE = {"bf16": 1e-2, "f16": 2e-3, "f32": 2e-3}


def error_of(site, operands, candidate) -> float:
    """The relative error of one launch against float64, of the worst output."""
    kernel = kernels.load(site, candidate)
    lhs, rhs, sides, vectors = measure.split(site, operands)
    problem = candidate.form.region.problem
    outputs = [
        np.full((problem.rows, problem.channels), np.nan, invoke.JAX_DTYPES[o.dtype])
        for o in site.region.epilogue.outputs
    ]
    space = np.zeros(max(1, kernel.workspace_bytes), np.uint8)
    a, b = forms.prepare(candidate.form.name, site.region.problem, lhs, rhs)
    gpu = jax.devices("cuda")[0]
    arrays = jax.device_put((a, b, outputs, sides, vectors, space), gpu)
    jax.block_until_ready(arrays)
    address = jax.tree.map(lambda x: x.unsafe_buffer_pointer(), arrays)
    kind, dims = invoke.abi_problem(problem)
    ordinal = kernels.target().ordinal
    loader.native().run(kernel.digest, kind, dims, address, ordinal, kernel.recipe)
    return float(max(kernels.errors(arrays[2], kernels.truth(site, operands))))


def main(part: int = 0, parts: int = 1) -> int:
    bad = launched = 0
    found, _ = kernels.all_candidates()
    for case in (*cases.GEMMS, *cases.CONVS)[part::parts]:
        with jax.default_device(jax.devices("cpu")[0]):
            site = case.site()
            operands = measure.make_operands(site, l2_bytes=1).sets[0]
            for candidate in found[case.name]:
                # Before the launch: the tool may speak of it, or never come back.
                print(f"{case.name}: {candidate.text}", flush=True)
                error = error_of(site, operands, candidate)
                launched += 1
                if not error <= TOLERANCE[site.region.problem.dtype]:
                    bad += 1
                    print(f"WRONG {case}: {candidate.text}: {error:.2e}")
    print(f"{launched} launches, {bad} wrong")
    return 1 if bad or not launched else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
