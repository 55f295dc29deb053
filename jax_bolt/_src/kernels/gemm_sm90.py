# SPDX-License-Identifier: Apache-2.0
"""Matrix products on Hopper: TMA and wgmma, persistent (``jax_bolt/gemm/sm90.hpp``)."""

from __future__ import annotations

import dataclasses
from typing import Final

from .. import ir
from ..arch import GpuArch
from . import hoist
from .config import CPP_TYPES, Config, alignment, epilogue_limit

name = "gemm_sm90"
header = "jax_bolt/gemm/sm90.hpp"
artifact: Final = "module"

_MAX_EXTENT = 2**31 - 1 - 4096  # the kernel counts tiles in 32 bits
_MAX_CONFIGS = 2  # each compiles for over a minute
_LAYOUT = {"row": "cutlass::layout::RowMajor", "col": "cutlass::layout::ColumnMajor"}


@dataclasses.dataclass(frozen=True, slots=True)
class _Tile:
    """A CTA's tile and the cluster that shares its loads, counted in CTAs."""

    m: int
    n: int
    schedule: str
    cluster_m: int = 1
    cluster_n: int = 1


_TILES = (
    _Tile(128, 128, "Pingpong"),
    _Tile(128, 128, "Pingpong", cluster_m=2),
    _Tile(64, 128, "Pingpong"),
    _Tile(128, 64, "Pingpong"),
    _Tile(64, 64, "Pingpong"),
    _Tile(128, 256, "Cooperative"),
    _Tile(256, 128, "Cooperative"),
    _Tile(256, 128, "Cooperative", cluster_m=2),
)


def supports(region: ir.Region, arch: GpuArch) -> str | None:
    """Why no config can run ``region`` on ``arch``, or None."""
    problem, epilogue = region.problem, region.epilogue
    if arch.sm != 90:
        return f"needs sm_90a, not {arch.name}"
    if not isinstance(problem, ir.GemmProblem):
        return "not a matrix product"
    if problem.dtype not in ("bf16", "f16", "f32"):
        return f"no tensor-core path for {problem.dtype} operands"
    if problem.dtype == "f32" and (problem.a_layout, problem.b_layout) != (
        "row",
        "col",
    ):
        return "TF32 wgmma reads only operands whose K is contiguous"
    for dtype in (epilogue.out_dtype, *epilogue.sides):
        if dtype == "bool":
            return "a bool output or side input"
    if too_many := epilogue_limit(epilogue):
        return too_many
    extents = (problem.m, problem.n, problem.k, problem.batch)
    if min(extents) < 1:
        return "an empty dimension"
    if max(extents) > _MAX_EXTENT:
        return f"an extent above {_MAX_EXTENT}"
    for what, size, dtype in _rows(problem, epilogue):
        if alignment(size, dtype) * ir.ITEM_BYTES[dtype] < 16:
            return (
                f"{what}'s rows of {size} {dtype} are not a multiple of 16 bytes, "
                "as TMA needs"
            )
    smallest = -(-problem.m // 64) * -(-problem.n // 64) * problem.batch
    if smallest >= 2**29:
        return "too many tiles"
    if not any(_fits(tile, region, arch) for tile in _TILES):
        return "the epilogue's inputs leave no shared memory for the operands"
    return None


def configs(region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
    """The tiles with the least estimated time, best first."""
    legal = [tile for tile in _TILES if _fits(tile, region, arch)]
    ranked = sorted(legal, key=lambda tile: _cycles(tile, region, arch))
    return tuple(_config(tile, region) for tile in ranked[:_MAX_CONFIGS])


def instantiate(region: ir.Region, config: Config, arch: GpuArch) -> str:
    """The C++ type that ``JAX_BOLT_KERNEL`` takes."""
    del arch  # only sm_90a is supported
    problem = region.problem
    assert isinstance(problem, ir.GemmProblem)
    arguments = (
        "Epilogue",
        CPP_TYPES[problem.dtype],
        _LAYOUT[problem.a_layout],
        _LAYOUT[problem.b_layout],
        *str(config["tile"]).split("x"),
        *str(config["cluster"]).split("x"),
        f"jax_bolt::gemm::{config['schedule']}",
    )
    return f"jax_bolt::gemm::Sm90<{', '.join(map(str, arguments))}>"


def _config(tile: _Tile, region: ir.Region) -> Config:
    return Config.of(
        name,
        tile=f"{tile.m}x{tile.n}x{_tile_k(region.problem)}",
        cluster=f"{tile.cluster_m}x{tile.cluster_n}",
        schedule=tile.schedule,
    )


def _tile_k(problem: ir.Problem) -> int:
    """128 bytes: one row of the widest shared-memory swizzle."""
    return 128 // ir.ITEM_BYTES[problem.dtype]


def _rows(
    problem: ir.GemmProblem, epilogue: ir.Epilogue
) -> tuple[tuple[str, int, ir.DType], ...]:
    """(operand, contiguous elements, dtype) of all that TMA moves."""
    return (
        ("A", problem.k if problem.a_layout == "row" else problem.m, problem.dtype),
        ("B", problem.n if problem.b_layout == "row" else problem.k, problem.dtype),
        ("D", problem.n, epilogue.out_dtype),
        *((f"side {i}", problem.n, dtype) for i, dtype in enumerate(epilogue.sides)),
    )


# Shared memory ----------------------------------------------------------------------


def _fits(tile: _Tile, region: ir.Region, arch: GpuArch) -> bool:
    """Whether two mainloop stages, the least that can overlap, fit."""
    return _stages(tile, region, arch) >= 2


def _stages(tile: _Tile, region: ir.Region, arch: GpuArch) -> int:
    """Mainloop stages beside the epilogue's storage, as EpilogueBuilder lays it out."""
    item = ir.ITEM_BYTES[region.problem.dtype]
    stage = (tile.m + tile.n) * _tile_k(region.problem) * item + 16
    room = arch.smem_per_block - _epilogue_bytes(tile, region.epilogue) - 1024
    return room // stage


def _epilogue_bytes(tile: _Tile, epilogue: ir.Epilogue) -> int:
    rows = 128 if tile.schedule == "Cooperative" else 64
    subtiles = tile.m * tile.n // (rows * 32)
    loads, stores = min(subtiles, 4), min(subtiles, 2)
    out = ir.ITEM_BYTES[epilogue.out_dtype]
    sides = [ir.ITEM_BYTES[dtype] for dtype in epilogue.sides]
    if sides and sides[0] == out:
        loads = max(loads, stores + 1)
        staged = loads * sum(sides)  # D takes the place of side 0
    else:
        staged = loads * sum(sides) + stores * out
    return staged * rows * 32 + len(hoist.columns(epilogue)) * tile.n * 4


# Time -------------------------------------------------------------------------------

# Per SM and cycle. Only their ratios matter: they rank tiles, nothing is predicted.
_FLOPS = {"bf16": 4096, "f16": 4096, "f32": 2048}  # dense tensor cores
_SHARED_BYTES = 128  # what wgmma can read of its operands
_L2_BYTES = 48
_CLOCK_HZ = 1.7e9
_TILE_CYCLES = 600  # prologue of one tile: barriers, the pipeline's first latency
_EPILOGUE_ELEMENTS = 24  # through apply() and shared memory


def _cycles(tile: _Tile, region: ir.Region, arch: GpuArch) -> float:
    """An estimate of the kernel's cycles: waves of tiles, or device memory."""
    problem = region.problem
    assert isinstance(problem, ir.GemmProblem)
    item = ir.ITEM_BYTES[problem.dtype]
    k = _up(problem.k, _tile_k(problem))
    tiles_m = _up(-(-problem.m // tile.m), tile.cluster_m)
    tiles_n = _up(-(-problem.n // tile.n), tile.cluster_n)
    waves = -(-tiles_m * tiles_n * problem.batch // arch.sm_count)

    # Each warpgroup's wgmma reads 64 rows of A and all columns of B again.
    products = 2 * tile.m * tile.n * k / _FLOPS[problem.dtype]
    operands = tile.m // 64 * (64 + tile.n) * k * item / _SHARED_BYTES
    loads = (tile.m / tile.cluster_n + tile.n / tile.cluster_m) * k * item / _L2_BYTES
    mainloop = max(products, operands, loads)
    if _stages(tile, region, arch) < 3:
        mainloop *= 1.3  # too few loads in flight to hide their latency

    memory = arch.bandwidth / _CLOCK_HZ / arch.sm_count
    full = (region.epilogue.out_dtype, *region.epilogue.sides)
    moved = tile.m * tile.n * sum(ir.ITEM_BYTES[dtype] for dtype in full)
    epilogue = max(tile.m * tile.n / _EPILOGUE_ELEMENTS, moved / memory)
    work = waves * (mainloop + epilogue + _TILE_CYCLES)
    busy = work
    if tile.schedule == "Pingpong":
        # The first mainloop and the last epilogue have nothing to hide under.
        longer, shorter = max(mainloop, epilogue), min(mainloop, epilogue)
        busy = waves * longer + shorter + _TILE_CYCLES
    floor = region.bytes_moved / (memory * arch.sm_count)
    # Where one resource bounds several tiles alike, the one with less to do wins.
    return max(busy, floor) + 0.1 * work


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
