# SPDX-License-Identifier: Apache-2.0
"""The least time a GPU could take for a region: what a kernel's time is held against.

The floor is the longer of its FLOPs at the tensor cores' peak and its least traffic at
the bandwidth of device memory, both as NVIDIA publishes them (``arch``). No kernel
reaches it. One whose operands lie in L2 already may pass below the second part.
"""

from __future__ import annotations

import dataclasses

from . import ir
from .arch import GpuArch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """``flops`` and least ``bytes_moved`` of a region, and the time of each, in µs.

    ``compute_us`` is None where the peak of the architecture is not known.
    """

    flops: int
    bytes_moved: int
    compute_us: float | None
    memory_us: float

    @property
    def time_us(self) -> float:
        return max(self.compute_us or 0.0, self.memory_us)


def floor(region: ir.Region, arch: GpuArch) -> Floor:
    """The floor of one launch of ``region`` on ``arch``."""
    problem = region.problem
    moved = region.bytes_moved - _unread_bytes(problem)
    compute_us = None
    if arch.peak_flops is not None:
        # TF32 runs at half the rate of the narrower types.
        peak = arch.peak_flops / (2 if problem.dtype == "f32" else 1)
        compute_us = problem.flops / peak * 1e6
    return Floor(
        flops=problem.flops,
        bytes_moved=moved,
        compute_us=compute_us,
        memory_us=moved / arch.bandwidth * 1e6,
    )


def of_chain(chain: ir.Chain, arch: GpuArch) -> Floor:
    """The floor of a chain's regions in one launch on ``arch``."""
    floors = [floor(region, arch) for region in chain.regions]
    kept = sum(region.bytes_moved for region in chain.regions) - chain.bytes_moved
    moved = sum(each.bytes_moved for each in floors) - kept
    times = [each.compute_us for each in floors]
    compute_us = None
    if None not in times:
        compute_us = sum(time or 0.0 for time in times)
    return Floor(
        flops=sum(each.flops for each in floors),
        bytes_moved=moved,
        compute_us=compute_us,
        memory_us=moved / arch.bandwidth * 1e6,
    )


def _unread_bytes(problem: ir.Problem) -> int:
    """What no output needs of the image, such as 3/4 of it for a 1x1 of stride 2."""
    if isinstance(problem, ir.GemmProblem):
        return 0
    (stride_h, stride_w), (step_h, step_w) = problem.stride, problem.dilation
    top, _, left, _ = problem.padding
    rows = touched(problem.h, problem.p, problem.r, stride_h, step_h, top)
    columns = touched(problem.w, problem.q, problem.s, stride_w, step_w, left)
    unread = problem.h * problem.w - rows * columns
    return problem.n * unread * problem.c * ir.ITEM_BYTES[problem.dtype]


def touched(
    size: int, outputs: int, taps: int, stride: int, step: int, before: int
) -> int:
    """How many of ``size`` positions along one dimension a conv reads."""
    read = {
        output * stride + tap * step - before
        for output in range(outputs)
        for tap in range(taps)
    }
    return sum(0 <= position < size for position in read)
