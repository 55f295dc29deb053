# SPDX-License-Identifier: Apache-2.0
"""What every kernel of several regions on Hopper wants of them."""

from __future__ import annotations

from .. import ir
from ..arch import GpuArch
from . import implicit_gemm_sm90
from .chain_tiles import flat
from .recipe import MAX_VECTORS

_DTYPES = ("bf16", "f16")  # what a slot of shared memory holds


def refusal(chain: ir.Chain, arch: GpuArch) -> str | None:
    """Why no kernel can run ``chain`` on ``arch``, whatever is between, or None."""
    for region in chain.regions:
        problem, epilogue = flat(region.problem), region.epilogue
        if problem.dtype not in _DTYPES:
            return f"takes no operands of {problem.dtype}"
        if epilogue.auxiliary:
            return "a region with an auxiliary output"
        for dtype in epilogue.tensors:
            if dtype not in _DTYPES:
                return f"takes no tensors of {dtype}"
        if isinstance(problem, ir.GemmProblem) and problem.batch > 1:
            return "a batched product"
        if isinstance(problem, ir.ConvProblem) and problem.groups > 1:
            return f"a conv of {problem.groups} groups"
        bare = ir.Region(problem=problem, epilogue=epilogue)
        if reason := implicit_gemm_sm90.supports(bare, arch):
            return reason
    if len({region.problem.dtype for region in chain.regions}) > 1:
        return "operands of two dtypes"
    vectors = sum(len(region.epilogue.vectors) for region in chain.regions)
    if vectors > MAX_VECTORS:
        return f"{vectors} per-channel inputs, more than {MAX_VECTORS}"
    return None
