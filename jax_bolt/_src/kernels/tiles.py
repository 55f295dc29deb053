# SPDX-License-Identifier: Apache-2.0
"""CTA tiles of the sm80 kernels, and an estimate that puts them in order."""

from __future__ import annotations

import dataclasses

from .. import ir
from ..arch import GpuArch
from . import hoist

_START_US = 2.0
_STORE = 4  # instructions for an element of the result, beside the epilogue's
_LANES, _CLOCK = 128, 1.4e9  # of an SM, for each instruction
_SHARE_OF_WGMMA = 0.6  # of Hopper's peak, what mma.sync reaches


@dataclasses.dataclass(frozen=True, slots=True)
class Tile:
    """Rows, channels and depth of a CTA's tile; its warps' part; stages in flight.

    ``rate`` is the tile's steady share of the tensor cores' peak: small tiles load
    more operand bytes for each product.
    """

    m: int
    n: int
    k: int
    warp_m: int
    warp_n: int
    stages: int
    rate: float

    @property
    def shape(self) -> str:
        return f"{self.m}x{self.n}x{self.k}"

    @property
    def warp(self) -> str:
        return f"{self.warp_m}x{self.warp_n}x{self.k}"


def of_item(tiles: tuple[Tile, ...], item_bytes: int) -> tuple[Tile, ...]:
    """``tiles``, written for 2-byte elements, with as many bytes of depth."""
    if item_bytes == 2:
        return tiles
    return tuple(dataclasses.replace(t, k=t.k * 2 // item_bytes) for t in tiles)


def shared_bytes(tile: Tile, dtype: ir.DType, epilogue: ir.Epilogue) -> int:
    """Shared memory of one CTA."""
    operands = (tile.m + tile.n) * tile.k * ir.ITEM_BYTES[dtype] * tile.stages
    # Two buffers of 8 rows of every warp's tile, padded by 8 floats.
    exchange = 2 * (tile.m // tile.warp_m) * 8 * (tile.n + 8) * 4
    columns = max(1, len(hoist.columns(epilogue))) * tile.n * 4
    return max(operands, exchange) + columns


def cost(
    tile: Tile, rows: int, channels: int, depth: int, batch: int, sms: int
) -> float:
    """Relative time: the busiest SM's products, as if all ran at the tile's rate.

    ``depth`` is the K that the kernel runs, zeros included. The constant is what
    filling the pipeline and storing the tile cost, in products' depth.
    """
    ctas = -(-rows // tile.m) * -(-channels // tile.n) * batch
    return -(-ctas // sms) * tile.m * tile.n * (depth + 256) / tile.rate


def named(tiles: tuple[Tile, ...], shape: str, item_bytes: int) -> Tile:
    """That of ``tiles``, for elements of ``item_bytes``, whose shape is ``shape``."""
    return next(t for t in of_item(tiles, item_bytes) if t.shape == shape)


def micros(work: float, region: ir.Region, arch: GpuArch) -> float:
    """About what a launch takes, in µs: ``work`` is the ``cost`` of its tiles.

    The longer of products and epilogue, and of device memory. Nothing of it was fitted:
    tiles are put in order by ``cost`` alone.
    """
    problem = region.problem
    memory = region.bytes_moved / arch.bandwidth
    values = problem.rows * problem.channels * (_STORE + hoist.work(region.epilogue))
    own = values / (arch.sm_count * _LANES * _CLOCK)
    if arch.peak_flops is not None:
        peak = arch.peak_flops * (_SHARE_OF_WGMMA if arch.sm == 90 else 1)
        peak /= 2 if problem.dtype == "f32" else 1
        own += 2 * work * arch.sm_count / peak
    return _START_US + max(own, memory) * 1e6


def reasoning(shape: str, rows: int, channels: int, batch: int, arch: GpuArch) -> str:
    """Of a tile of that ``shape``: how it fills the GPU."""
    m, n, _ = map(int, shape.split("x"))
    ctas = -(-rows // m) * -(-channels // n) * batch
    waves = -(-ctas // arch.sm_count)
    return f"{ctas} tiles of {m}x{n} in {waves} waves of {arch.sm_count}"


def fits(tile: Tile, dtype: ir.DType, epilogue: ir.Epilogue, arch: GpuArch) -> bool:
    return shared_bytes(tile, dtype, epilogue) <= arch.smem_per_block
