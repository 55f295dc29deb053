# SPDX-License-Identifier: Apache-2.0
"""The Hopper implicit GEMM: its plans, run by an emulator, give the right results."""

from __future__ import annotations

import dataclasses
import functools
import random

import implicit_gemm_emulator as emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_bolt._src import arch, evaluate, ir
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import (
    geometry,
    implicit_gemm_rank,
    implicit_gemm_sm90,
    implicit_gemm_tiles,
)
from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.config import Config
from jax_bolt._src.kernels.image import Image, axes
from jax_bolt._src.kernels.implicit_gemm_tiles import Tile
from jax_bolt._src.kernels.packing import Packing

HOPPER = arch.from_name("sm_90a")
# Few SMs: persistent CTAs have many tiles each, and resident filters a real use.
SMALL = dataclasses.replace(HOPPER, sm_count=3)

PLAIN = ir.Epilogue((ir.Op("acc"),), 0, "bf16")
SIDE = ir.Epilogue(
    (ir.Op("acc"), ir.Op("side", attr=0), ir.Op("add", (0, 1))),
    2,
    "bf16",
    sides=("bf16",),
)
# (acc * vector_0 + side_0) + vector_1 * side_1
FULL = ir.Epilogue(
    (
        ir.Op("acc"),
        *(ir.Op("vector", attr=0), ir.Op("mul", (0, 1))),
        *(ir.Op("side", attr=0), ir.Op("add", (2, 3))),
        *(ir.Op("vector", attr=1), ir.Op("side", attr=1), ir.Op("mul", (5, 6))),
        ir.Op("add", (4, 7)),
    ),
    8,
    "bf16",
    vectors=(ir.Vector("f32"), ir.Vector("f32")),
    sides=("bf16", "bf16"),
)
WIDE = dataclasses.replace(SIDE, out_dtype="f32")
SINGLE = dataclasses.replace(WIDE, sides=("f32",))
# The first side input as wide as the result, the second wider.
MIXED = dataclasses.replace(FULL, sides=("bf16", "f32"))
# Auxiliary outputs: as wide as the result or wider, beside a side input in its place.
STORED = dataclasses.replace(PLAIN, auxiliary=(ir.Output(0, "f32"),))
BOTH = dataclasses.replace(FULL, auxiliary=(ir.Output(4, "bf16"),))
BOTH_WIDE = dataclasses.replace(SINGLE, auxiliary=(ir.Output(0, "f32"),))


def _full(acc, vectors, sides):
    first = acc * vectors[0] + sides[0]
    return first + vectors[1] * sides[1], first


APPLY: dict[ir.Epilogue, emulator.Apply] = {
    PLAIN: lambda acc, vectors, sides: [acc],
    **dict.fromkeys((SIDE, WIDE, SINGLE), lambda acc, vectors, sides: [acc + sides[0]]),
    **dict.fromkeys(
        (FULL, MIXED), lambda acc, vectors, sides: _full(acc, vectors, sides)[:1]
    ),
    STORED: lambda acc, vectors, sides: [acc, acc],
    BOTH: _full,
    BOTH_WIDE: lambda acc, vectors, sides: [acc + sides[0], acc],
}


def conv(
    n: int, h: int, w: int, c: int, k: int, r: int = 3, s: int | None = None, **kw
) -> ir.ConvProblem:
    s = r if s is None else s
    default: dict = {"padding": (r // 2, r // 2, s // 2, s // 2), "dtype": "bf16"}
    return ir.ConvProblem(n=n, h=h, w=w, c=c, k=k, r=r, s=s, **(default | kw))


def gemm(m: int, n: int, k: int, **kw) -> ir.GemmProblem:
    default: dict = {"dtype": "bf16"}
    return ir.GemmProblem(m=m, n=n, k=k, **(default | kw))


def hwio(problem: ir.ConvProblem) -> ir.ConvProblem:
    return dataclasses.replace(problem, filter_layout="hwio")


CONVS = [
    conv(1, 7, 7, 64, 64),
    conv(4, 7, 7, 64, 136),
    conv(5, 7, 7, 128, 192),
    conv(3, 6, 10, 64, 8),
    conv(1, 14, 14, 64, 72),
    conv(2, 14, 14, 72, 64),
    conv(2, 28, 28, 64, 64),
    conv(2, 9, 13, 64, 64),
    conv(1, 4, 120, 64, 64),
    conv(2, 3, 300, 8, 24),
    conv(1, 36, 25, 8, 8),
    conv(1, 1, 9, 16, 8),
    conv(2, 9, 1, 16, 8),
    # stride 2: a view's dimensions, or element steps
    conv(2, 14, 14, 64, 64, stride=(2, 2)),
    conv(5, 14, 14, 128, 128, stride=(2, 2)),
    conv(2, 56, 56, 64, 64, stride=(2, 2), padding=(0, 1, 0, 1)),
    conv(2, 15, 13, 64, 64, stride=(2, 2)),
    conv(2, 14, 13, 64, 64, stride=(2, 2)),
    conv(2, 16, 12, 24, 40, stride=(2, 2)),
    conv(1, 16, 12, 40, 24, stride=(2, 1)),
    conv(2, 12, 16, 64, 40, stride=(1, 2)),
    conv(2, 12, 15, 64, 40, stride=(3, 3)),
    conv(3, 11, 10, 40, 24, stride=(3, 2), padding=(2, 1, 0, 3)),
    conv(2, 14, 14, 64, 128, 1, stride=(2, 2)),
    conv(2, 13, 15, 64, 128, 1, stride=(2, 2)),
    conv(2, 14, 14, 24, 8, 1, stride=(2, 2)),
    conv(2, 8, 8, 64, 8, 1, stride=(4, 4)),
    conv(5, 21, 23, 64, 72, 1, stride=(2, 2)),
    # few channels, no padding in width: a filter's row is one wide pixel
    conv(2, 12, 15, 16, 24, 4, padding=(2, 1, 0, 0)),
    hwio(conv(2, 12, 15, 16, 24, 4, padding=(2, 1, 0, 0))),
    conv(1, 9, 20, 8, 16, 3, stride=(2, 1), padding=(1, 1, 0, 0)),
    conv(2, 8, 14, 24, 64, 5, dilation=(2, 1), padding=(4, 4, 0, 0)),
    conv(3, 1, 40, 16, 16, 1, 4, padding=(0, 0, 0, 0)),
    # chunks of which the last one is not full: 1, 2 or 3 of its 4 products
    conv(2, 14, 14, 96, 96),
    hwio(conv(1, 9, 13, 112, 64)),
    conv(2, 15, 13, 96, 40, stride=(2, 2)),
    hwio(conv(2, 14, 14, 144, 64, stride=(2, 2))),
    hwio(conv(1, 7, 7, 232, 72, 1)),
    # groups: of one block and chunk, of several, of chunks that are not full
    conv(2, 9, 13, 128, 128, groups=2),
    hwio(conv(2, 14, 14, 192, 192, groups=3, stride=(2, 2))),
    conv(1, 9, 10, 256, 256, groups=2),
    hwio(conv(2, 8, 9, 64, 128, groups=2)),
    conv(3, 11, 10, 96, 256, groups=2, stride=(3, 2), padding=(2, 1, 0, 3)),
    conv(2, 8, 9, 192, 128, groups=2),
    hwio(conv(2, 8, 10, 192, 128, groups=2, stride=(2, 2))),
    hwio(conv(2, 9, 10, 160, 128, groups=2, stride=(2, 2))),
    hwio(conv(5, 21, 23, 128, 256, 1, stride=(2, 2), groups=2)),
    # 5x5, 7x7, asymmetric padding
    conv(2, 14, 14, 24, 40, 5),
    conv(2, 9, 9, 64, 64, 5, stride=(2, 2), padding=(1, 2, 1, 2)),
    conv(1, 23, 21, 8, 64, 7, stride=(2, 2), padding=(3, 3, 3, 3)),
    conv(2, 18, 20, 8, 64, 7, stride=(2, 2), padding=(2, 3, 2, 3)),
    conv(2, 20, 20, 64, 8, 7, stride=(2, 2), padding=(2, 3, 2, 3)),
    conv(1, 16, 16, 8, 8, 8, padding=(3, 4, 3, 4)),
    # dilation
    conv(2, 14, 14, 64, 64, padding=(2, 2, 2, 2), dilation=(2, 2)),
    conv(2, 9, 11, 16, 40, 5, 3, padding=(0, 3, 2, 0), dilation=(2, 2)),
    conv(1, 12, 12, 64, 24, stride=(2, 2), padding=(2, 1, 3, 2), dilation=(2, 3)),
    conv(2, 13, 12, 64, 24, stride=(2, 2), padding=(0, 0, 0, 0), dilation=(3, 3)),
    conv(1, 15, 15, 24, 24, stride=(3, 2), padding=(1, 0, 2, 4), dilation=(2, 3)),
    # one line of taps
    conv(2, 12, 14, 64, 64, 1, 7),
    conv(2, 14, 12, 64, 64, 7, 1),
    conv(2, 17, 17, 40, 24, 1, 3, stride=(2, 2)),
    conv(1, 1, 130, 64, 64, 1, 5),
    # a 1-D conv's line, and the phases of a transposed conv
    conv(2, 70, 1, 64, 24, 3, 1),
    conv(2, 65, 1, 64, 24, 3, 1, stride=(2, 1)),
    hwio(conv(1, 300, 1, 64, 64, 9, 1)),
    hwio(conv(2, 9, 9, 64, 40, 2, padding=(1, 0, 1, 0))),
    # more padding than the filter needs, or none
    conv(2, 7, 7, 64, 64, padding=(2, 2, 2, 2)),
    conv(2, 6, 5, 24, 40, padding=(4, 3, 3, 4)),
    conv(3, 5, 5, 64, 64, 5, padding=(4, 4, 4, 4)),
    conv(2, 2, 2, 64, 8, 5, padding=(3, 3, 3, 3)),
    conv(2, 7, 7, 64, 64, 1, padding=(1, 1, 1, 1)),
    conv(2, 10, 11, 64, 64, padding=(0, 0, 0, 0)),
    conv(3, 3, 3, 64, 64, padding=(0, 0, 0, 0)),
    conv(3, 8, 8, 16, 72, padding=(0, 2, 0, 2)),
    conv(3, 8, 8, 16, 72, padding=(2, 0, 2, 0)),
    # padding cut at the end
    conv(2, 9, 9, 64, 64, padding=(1, -1, 1, -2)),
    # packed by the prologue: RGB stems, patches, channels that are no multiple of 8
    hwio(conv(2, 32, 32, 3, 64, 7, stride=(2, 2), padding=(3, 3, 3, 3))),
    hwio(conv(1, 23, 21, 3, 24, 7, stride=(2, 2), padding=(2, 4, 3, 3))),
    hwio(conv(2, 16, 18, 3, 48, stride=(2, 2), padding=(0, 1, 0, 1))),
    hwio(conv(2, 14, 15, 3, 64)),
    hwio(conv(1, 16, 20, 3, 96, 4, stride=(4, 4), padding=(0, 0, 0, 0))),
    hwio(conv(3, 11, 9, 1, 16, 5, stride=(1, 1), padding=(2, 2, 2, 2))),
    hwio(conv(2, 13, 12, 2, 8, 3, 5, stride=(3, 3))),
    hwio(conv(2, 9, 8, 12, 40)),
    hwio(conv(1, 12, 13, 4, 16, stride=(2, 2), padding=(1, -1, 0, 2))),
    hwio(conv(2, 7, 7, 46, 64)),
    # pointwise
    conv(2, 7, 9, 64, 72, 1),
    conv(3, 1, 40, 64, 72, 1),
    conv(2, 1, 40, 64, 72, 1, padding=(0, 0, 3, 2)),
    conv(2, 1, 40, 64, 72, 1, stride=(2, 1), padding=(1, 0, 0, 0)),
    conv(2, 5, 64, 64, 72, 1, padding=(0, 0, 0, 0), stride=(5, 1)),
    conv(9, 1, 1, 64, 72, 1),
]
GEMMS = [
    gemm(1, 8, 8),
    gemm(5, 64, 64),
    gemm(64, 128, 72, b_layout="col"),
    gemm(129, 136, 200),
    gemm(300, 264, 64, b_layout="col"),
    gemm(700, 64, 24),
    gemm(1100, 8, 64, b_layout="col"),
    gemm(64, 264, 1024, b_layout="col"),
    gemm(70, 48, 24, batch=3),
    gemm(130, 200, 72, batch=5, b_layout="col"),
    gemm(520, 64, 64, batch=2),
    gemm(40, 72, 1000),
]
SINGLES = [
    conv(2, 9, 13, 32, 64, dtype="f32"),
    conv(1, 7, 7, 96, 136, dtype="f32"),
    conv(2, 14, 14, 12, 24, 5, stride=(2, 2), dtype="f32"),
    conv(2, 12, 16, 64, 40, stride=(1, 2), padding=(1, 0, 0, 1), dtype="f32"),
    conv(2, 20, 23, 12, 64, 4, padding=(2, 1, 0, 0), dtype="f32"),
    gemm(129, 136, 100, b_layout="col", dtype="f32"),
    gemm(70, 24, 516, batch=3, b_layout="col", dtype="f32"),
]
PROBLEMS: list[ir.Problem] = [
    *CONVS,
    *SINGLES,
    *(hwio(problem) for problem in CONVS[::3]),
    *GEMMS,
]


def max_pool(
    size: int, stride: int, top: int = 0, bottom: int = 0, left: int = 0, right: int = 0
) -> ir.Pool:
    """Of a square."""
    return ir.Pool(
        window=(size, size),
        stride=(stride, stride),
        padding=(top, bottom, left, right),
    )


# As ResNet has it behind its stem, and VGG behind its convs; and what has other sizes.
STEM_POOL, PAIRS = max_pool(3, 2, 1, 1, 1, 1), max_pool(2, 2)
POOLED: list[tuple[ir.ConvProblem, ir.Pool]] = [
    (conv(5, 7, 7, 64, 64), STEM_POOL),
    (conv(4, 14, 14, 64, 136), PAIRS),
    (conv(2, 28, 28, 64, 64), PAIRS),
    (conv(2, 28, 28, 8, 200), STEM_POOL),
    (conv(1, 56, 112, 8, 24), STEM_POOL),
    (conv(2, 9, 13, 64, 64), PAIRS),  # a row and a column are in no window
    (conv(2, 15, 17, 64, 40), STEM_POOL),
    (conv(3, 13, 12, 24, 64), max_pool(3, 1, 1, 1, 1, 1)),
    (conv(2, 30, 29, 8, 64), max_pool(3, 1, 1, 1, 1, 1)),
    (conv(2, 16, 16, 16, 64), max_pool(3, 2)),
    (conv(2, 17, 40, 16, 64), max_pool(3, 2, 0, 1, 0, 1)),
    (conv(2, 19, 23, 16, 24), max_pool(4, 3, 2, 1, 0, 3)),
    (conv(2, 18, 11, 16, 24), max_pool(1, 2)),  # results that are in no window
    (
        conv(1, 21, 30, 16, 24),
        ir.Pool(window=(1, 3), stride=(1, 2), padding=(0, 0, 1, 1)),
    ),
    (
        conv(1, 40, 9, 16, 24),
        ir.Pool(window=(3, 2), stride=(2, 1), padding=(2, 0, 0, 1)),
    ),
    # strides of the conv: a view's dimensions, or element steps
    (conv(2, 28, 28, 64, 64, stride=(2, 2)), STEM_POOL),
    (conv(2, 29, 27, 24, 64, stride=(2, 2)), STEM_POOL),
    (conv(1, 50, 44, 24, 64, 1, stride=(2, 2)), PAIRS),
    (conv(2, 20, 36, 64, 64, 5, dilation=(2, 1), padding=(1, 0, 2, 2)), STEM_POOL),
    # wide pixels, groups, images that are one row, and a product over pixels
    (conv(2, 24, 31, 16, 24, 4, padding=(2, 1, 0, 0)), STEM_POOL),
    (hwio(conv(2, 18, 20, 128, 128, groups=2)), PAIRS),
    (
        conv(2, 1, 70, 64, 24, 1),
        ir.Pool(window=(1, 2), stride=(1, 2)),
    ),
    (conv(2, 20, 20, 64, 72, 1), PAIRS),
    # packed by the prologue
    (hwio(conv(2, 32, 32, 3, 64, 7, stride=(2, 2), padding=(3, 3, 3, 3))), STEM_POOL),
    (hwio(conv(1, 75, 70, 3, 24, 7, stride=(2, 2), padding=(2, 4, 3, 3))), STEM_POOL),
    (hwio(conv(2, 22, 23, 3, 64)), PAIRS),
]


# As a network's last conv has it; of images whose rows and columns lie apart in a box,
# of one pixel, of as many as an accumulator has, and more of them than a block takes.
MEANS: list[ir.ConvProblem] = [
    conv(5, 7, 7, 64, 136, 1),
    hwio(conv(32, 7, 7, 16, 64, 1)),
    conv(5, 7, 7, 64, 64),
    hwio(conv(9, 4, 4, 64, 200)),
    conv(3, 14, 14, 24, 136),
    conv(2, 15, 17, 64, 72, 1),
    conv(1, 16, 16, 16, 8, 1),
    conv(3, 6, 10, 64, 8),
    conv(2, 9, 1, 16, 8),
    conv(2, 1, 40, 64, 72, 1),
    conv(2, 3, 70, 16, 8, 1),
    conv(9, 1, 1, 64, 72, 1),
    conv(7, 2, 2, 64, 8, 5, padding=(3, 3, 3, 3)),
    conv(3, 9, 10, 24, 64, padding=(0, 0, 0, 0)),
    # strides: a view's dimensions, or element steps
    hwio(conv(5, 14, 14, 128, 128, stride=(2, 2))),
    conv(3, 15, 13, 24, 64, stride=(2, 2)),
    conv(5, 14, 14, 64, 128, 1, stride=(2, 2)),
    # dilation, wide pixels, groups; packed by the prologue
    conv(2, 12, 11, 64, 24, padding=(2, 2, 2, 2), dilation=(2, 2)),
    conv(2, 12, 15, 16, 24, 4, padding=(2, 1, 0, 0)),
    hwio(conv(2, 8, 9, 128, 128, groups=2)),
    hwio(conv(2, 16, 16, 3, 64, stride=(2, 2), padding=(0, 1, 0, 1))),
]
SINGLE_MEANS = [
    conv(5, 7, 7, 96, 136, 1, dtype="f32"),
    conv(3, 9, 8, 12, 64, dtype="f32"),
]


def region(problem: ir.Problem, epilogue: ir.Epilogue = PLAIN) -> ir.Region:
    return ir.Region(problem=problem, epilogue=epilogue)


def pooled(
    problem: ir.ConvProblem, pool: ir.Pool, epilogue: ir.Epilogue = PLAIN
) -> ir.Region:
    return ir.Region(problem=problem, epilogue=epilogue, pool=pool)


def averaged(problem: ir.ConvProblem, epilogue: ir.Epilogue = PLAIN) -> ir.Region:
    image = ir.Pool(window=(problem.p, problem.q), operation="mean")
    return pooled(problem, image, epilogue)


@functools.lru_cache(maxsize=1)
def operands(taken: ir.Region) -> tuple[dict, list[np.ndarray]]:
    """Small integers, whose sums are exact in any order, and the expected outputs."""
    rng = np.random.default_rng(len(taken.text))

    def some(count: int) -> np.ndarray:
        return rng.integers(-4, 5, count).astype(np.float32)

    problem, epilogue = taken.problem, taken.epilogue
    a, b = map(some, problem.operand_elements)
    sides = [some(problem.rows * problem.channels) for _ in epilogue.sides]
    vectors = [some(problem.channels) for _ in epilogue.vectors]
    given = {"a": a, "b": b, "sides": sides, "vectors": vectors}
    expected = evaluate.outputs(taken, **jax.tree.map(jnp.asarray, given))
    return given, [np.asarray(output).reshape(-1) for output in expected]


def check(taken: ir.Region, config: Config, gpu: arch.GpuArch) -> None:
    given, expected = operands(taken)
    recipe = implicit_gemm_sm90.recipe(taken, config, gpu)
    assert recipe.grid <= gpu.sm_count * Tile.of(config).ctas
    launch = emulator.Launch(
        recipe,
        implicit_gemm_sm90.instantiate(taken, config, gpu),
        elements=expected[0].size,
        auxiliary=len(taken.epilogue.auxiliary),
        apply=APPLY[taken.epilogue],
        prologue=implicit_gemm_sm90.prologue(taken),
        **given,
    ).run()
    np.testing.assert_array_equal(launch.writes, 1, config.text)
    # XLA divides by the reciprocal, the kernel does not.
    near = 3e-7 if taken.pool is not None and taken.pool.is_mean else 0
    for got, want in zip(launch.outputs, expected, strict=True):
        np.testing.assert_allclose(got, want, near, 0, err_msg=config.text)


def sample(taken: ir.Region, gpu: arch.GpuArch, count: int) -> list[Config]:
    """Some of all tiles, ranked or not."""
    image = Image.of_region(taken)
    tiles = list(implicit_gemm_tiles.tiles_of(image, taken.epilogue, gpu))
    chosen = random.Random(taken.text).sample(tiles, min(count, len(tiles)))
    return [tile.config() for tile in chosen]


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.text)
def test_what_the_kernel_computes(problem):
    kinds = (PLAIN, SIDE, FULL, WIDE, SINGLE, MIXED, STORED, BOTH, BOTH_WIDE)
    epilogue = kinds[PROBLEMS.index(problem) % len(kinds)]
    taken = region(problem, epilogue)
    assert implicit_gemm_sm90.supports(taken, HOPPER) is None
    for config in implicit_gemm_sm90.configs(taken, HOPPER):
        check(taken, config, HOPPER)
    for config in sample(taken, SMALL, 8):
        check(taken, config, SMALL)


AFFINE = ir.Epilogue(
    (ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("mul", (0, 1))),
    2,
    "bf16",
    vectors=(ir.Vector("f32"),),
)
APPLY[AFFINE] = lambda acc, vectors, sides: [acc * vectors[0]]


@pytest.mark.parametrize(
    ("problem", "pool"), POOLED, ids=lambda value: getattr(value, "text", "")
)
def test_what_a_kernel_with_a_pool_computes(problem, pool):
    # Of a factor that may be negative the maximum is not that of the sums.
    taken = pooled(problem, pool, AFFINE)
    assert implicit_gemm_sm90.supports(taken, HOPPER) is None
    for config in implicit_gemm_sm90.configs(taken, HOPPER)[:12]:
        check(taken, config, HOPPER)
    for config in sample(taken, SMALL, 8):
        check(taken, config, SMALL)


def test_the_pools_cover_every_kind_of_tile():
    kinds, blocks, counts = set(), set(), set()
    for problem, pool in POOLED:
        taken = pooled(problem, pool)
        image = Image.of_region(taken)
        for tile in implicit_gemm_tiles.tiles_of(image, PLAIN, SMALL):
            layout = tile.layout(image)
            shape = (tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n)
            kinds.add((*shape, tile.schedule))
            blocks.add((layout.whole_images, layout.whole_rows))
            counts.add(layout.count)
            assert tile.splits == tile.parts == 1 and not tile.im2col
    assert kinds == set(implicit_gemm_tiles._SHAPES) and counts == {1, 2, 4}
    assert blocks == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("problem", [*MEANS, *SINGLE_MEANS], ids=lambda p: p.text)
def test_what_a_kernel_with_a_mean_computes(problem):
    # Side inputs lie where the results are left; float32 is of two tiles. Of large
    # images there is no room for more than one of them.
    kinds = (PLAIN, SIDE, FULL, WIDE, SINGLE, MIXED)
    if problem.p * problem.q > 128:
        kinds = (PLAIN, SIDE) if problem.k > 64 else (PLAIN,)
    at = [*MEANS, *SINGLE_MEANS].index(problem)
    for epilogue in {kinds[at % len(kinds)], kinds[(at + 2) % len(kinds)]}:
        taken = averaged(problem, epilogue)
        assert implicit_gemm_sm90.supports(taken, HOPPER) is None
        for config in implicit_gemm_sm90.configs(taken, HOPPER)[:12]:
            check(taken, config, HOPPER)
        for config in sample(taken, SMALL, 6):
            check(taken, config, SMALL)


def test_the_means_cover_every_kind_of_tile():
    kinds, counts, images = set(), set(), set()
    for problem in MEANS:
        image = Image.of_region(averaged(problem))
        for tile in implicit_gemm_tiles.tiles_of(image, PLAIN, SMALL):
            layout = tile.layout(image)
            shape = (tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n)
            kinds.add((*shape, tile.schedule))
            counts.add(layout.count)
            images.add(tile.block.images)
            assert tile.splits == tile.parts == 1 and not tile.im2col
            assert layout.whole_images and layout.results_bytes == 0
    assert kinds == set(implicit_gemm_tiles._SHAPES)
    assert counts == images == {1, 2, 4}


def spans(least: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    one = st.integers(least, most)
    return st.tuples(one, one)


@st.composite
def convs(draw: st.DrawFn) -> ir.ConvProblem:
    r, s = draw(spans(1, 5))
    stride, dilation = draw(spans(1, 3)), draw(spans(1, 3))
    top, left = draw(spans(0, 4))
    bottom, right = draw(spans(-1, 4))
    # At least one output.
    p, q = draw(spans(1, 20))
    h = max(1, (p - 1) * stride[0] + (r - 1) * dilation[0] + 1 - top - bottom)
    w = max(1, (q - 1) * stride[1] + (s - 1) * dilation[1] + 1 - left - right)
    channels = st.sampled_from((8, 24, 64, 72, 128))
    return ir.ConvProblem(
        n=draw(st.integers(1, 5)),
        h=h + draw(st.integers(0, stride[0] - 1)),
        w=w + draw(st.integers(0, stride[1] - 1)),
        c=draw(channels),
        k=draw(channels),
        r=r,
        s=s,
        stride=stride,
        dilation=dilation,
        padding=(top, bottom, left, right),
        dtype="bf16",
        filter_layout=draw(st.sampled_from(("krsc", "hwio"))),
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(convs())
def test_any_conv(problem):
    taken = region(problem)
    assert implicit_gemm_sm90.supports(taken, HOPPER) is None
    for config in implicit_gemm_sm90.configs(taken, HOPPER)[:2]:
        check(taken, config, HOPPER)
    for config in sample(taken, SMALL, 4):
        check(taken, config, SMALL)


@st.composite
def pools(draw: st.DrawFn) -> ir.Pool:
    window, stride = draw(spans(1, 4)), draw(spans(1, 4))
    rows, cols = (st.integers(0, size - 1) for size in window)
    padding = (draw(rows), draw(rows), draw(cols), draw(cols))
    return ir.Pool(window=window, stride=stride, padding=padding)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(convs(), pools())
def test_any_conv_with_a_pool(problem, pool):
    taken = pooled(problem, pool)
    if taken.stored_rows == 0:
        assert implicit_gemm_sm90.supports(taken, HOPPER) == "an empty dimension"
        return
    assert implicit_gemm_sm90.supports(taken, HOPPER) is None
    for config in implicit_gemm_sm90.configs(taken, HOPPER)[:2]:
        check(taken, config, HOPPER)
    for config in sample(taken, SMALL, 4):
        check(taken, config, SMALL)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(convs(), st.sampled_from([PLAIN, SIDE, WIDE]))
def test_any_conv_with_a_mean(problem, epilogue):
    taken = averaged(problem, epilogue)
    refused = implicit_gemm_sm90.supports(taken, HOPPER)
    if refused is not None:
        # Of large images alone.
        assert refused.startswith(("a mean of", "no tile fits"))
        assert problem.p * problem.q > 64
        return
    for config in implicit_gemm_sm90.configs(taken, HOPPER)[:2]:
        check(taken, config, HOPPER)
    for config in sample(taken, SMALL, 4):
        check(taken, config, SMALL)


def test_the_problems_cover_every_kind_of_tile():
    """So that the tests above leave no schedule, layout or shape of block out."""
    kinds, blocks, resident, parts, im2col = (set() for _ in range(5))
    for problem in PROBLEMS[::2]:
        image = Image.of(problem)
        for tile in implicit_gemm_tiles.tiles_of(image, PLAIN, SMALL):
            layout = tile.layout(image)
            shape = (tile.blocks, tile.channel_blocks, tile.warps_m, tile.warps_n)
            kinds.add((*shape, tile.schedule))
            resident.add(tile.rings.resident)
            parts.add(tile.parts)
            blocks.add((layout.whole_images, layout.whole_rows, image.is_line))
            im2col.add((tile.im2col, layout.loads))
    assert kinds == set(implicit_gemm_tiles._SHAPES)
    assert resident == {0, 1} and parts == {1, 2, 3, 4}
    assert {(False, 1), (False, 2), (True, 1), (True, 2)} <= im2col
    deep = Image.of(gemm(40, 72, 1000))
    splits = {t.splits for t in implicit_gemm_tiles.tiles_of(deep, PLAIN, HOPPER)}
    assert splits == {1, 2, 3, 4, 6, 8}
    assert blocks == {
        *((whole, rows, False) for whole in (True, False) for rows in (True, False)),
        (False, False, True),
    }
    folded = {Image.of(p).folds for p in CONVS if p.stride != (1, 1)}
    assert folded == {True, False}


@pytest.mark.parametrize("problem", [CONVS[0], CONVS[13], hwio(CONVS[17]), GEMMS[3]])
def test_configs(problem):
    """Few, different, the same every time, and their text says all of a tile."""
    taken = region(problem, SIDE)
    found = implicit_gemm_sm90.configs(taken, HOPPER)
    assert 1 <= len(found) <= implicit_gemm_sm90._CANDIDATES
    assert len({config.text for config in found}) == len(found)
    axes.cache_clear()
    implicit_gemm_tiles.blocks_of.cache_clear()
    assert implicit_gemm_sm90.configs(taken, HOPPER) == found
    image = Image.of(problem)
    costs = [
        implicit_gemm_rank.cycles(Tile.of(config), image, taken, HOPPER)
        for config in found
    ]
    first = implicit_gemm_sm90._FIRST
    assert costs[:first] == sorted(costs[:first])
    assert costs[first:] == sorted(costs[first:])
    for tile in implicit_gemm_tiles.tiles_of(image, SIDE, HOPPER):
        assert Tile.of(tile.config()) == tile
        # Only numbers and words: what the database's text can carry.
        fields = dict(part.split("=") for part in tile.config().text.split(" "))
        again = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
        assert Tile.of(Config.of(implicit_gemm_sm90.name, **again)) == tile


def strided(channels: int) -> ir.ConvProblem:
    return ir.ConvProblem(
        **{"n": 32, "h": 56, "w": 56, "c": channels, "k": 128, "r": 3, "s": 3},
        **{"stride": (2, 2), "padding": (1, 1, 1, 1), "filter_layout": "hwio"},
        dtype="bf16",
    )


def test_an_estimate_counts_the_tiles_of_the_busiest_sm():
    problem, shared = strided(64), 0
    image, taken = Image.of(problem), region(problem, SIDE)
    for tile in implicit_gemm_tiles.tiles_of(image, SIDE, HOPPER):
        count = implicit_gemm_tiles.tile_count(tile, image) * tile.splits
        ctas = implicit_gemm_tiles.grid(tile, image, HOPPER)
        sms = min(ctas, HOPPER.sm_count)
        turns = implicit_gemm_rank.estimate(tile, image, taken, HOPPER).turns
        assert (turns - 1) * sms < count <= turns * sms
        shared += ctas > sms
    assert shared > 0


@pytest.mark.parametrize(
    ("channels", "dtype", "steps"),
    [
        (16, "bf16", (1, 1)),
        (48, "bf16", (3, 3)),
        (64, "bf16", (4, 4)),
        (72, "bf16", (4, 1)),
        (96, "bf16", (4, 2)),
        (168, "f16", (4, 3)),
        (192, "bf16", (4, 4)),
        (12, "f32", (2, 2)),
        (100, "f32", (4, 1)),
    ],
)
def test_no_products_over_channels_that_do_not_exist(channels, dtype, steps):
    taken = region(gemm(700, 136, channels, dtype=dtype, b_layout="col"))
    config = implicit_gemm_sm90.configs(taken, HOPPER)[0]
    instance = implicit_gemm_sm90.instantiate(taken, config, HOPPER)
    arguments = emulator.Arguments.of(instance)
    assert (arguments.steps, arguments.last_steps) == steps


def test_an_estimate_counts_the_products_that_run():
    """Of two and a half chunks, of which a split tile's last CTA has the half one."""

    def products(channels: int, tile: Tile) -> float:
        problem = gemm(4096, 512, channels)
        image, taken = Image.of(problem), region(problem)
        return implicit_gemm_rank.estimate(tile, image, taken, HOPPER).products

    tiles = [
        tile
        for tile in implicit_gemm_tiles.tiles_of(
            Image.of(gemm(4096, 512, 160)), PLAIN, HOPPER
        )
        # Where two products take longer than what is between chunks.
        if tile.splits == 1 and tile.pixels >= 224
    ]
    assert tiles
    for tile in tiles:
        assert products(160, tile) * 12 == products(192, tile) * 10
    split = dataclasses.replace(tiles[0], splits=2)
    assert products(160, split) * 8 == products(192, split) * 6
    split = dataclasses.replace(tiles[0], splits=3)
    assert products(160, split) == products(192, split)


def test_boxes_that_step_over_pixels_take_longer():
    """A stride is folded into the map where chunks of channels are full."""
    folded, stepped = strided(64), strided(48)
    assert [Image.of(p).folds for p in (folded, stepped)] == [True, False]

    def moves(problem: ir.ConvProblem) -> dict[tuple[object, ...], float]:
        image, taken = Image.of(problem), region(problem, PLAIN)
        return {
            dataclasses.astuple(tile): implicit_gemm_rank.estimate(
                tile, image, taken, HOPPER
            ).moves
            for tile in implicit_gemm_tiles.tiles_of(image, PLAIN, HOPPER)
            if not tile.im2col
        }

    whole, part = moves(folded), moves(stepped)
    both = whole.keys() & part.keys()
    assert len(both) > 100
    assert all(part[tile] > whole[tile] for tile in both)


@pytest.mark.parametrize("epilogue", [PLAIN, FULL])
def test_the_source_says_no_sizes(epilogue):
    """Equal tiles are one kernel, whatever the batch, the image and the channels."""
    pairs = [
        (conv(4, 14, 14, 64, 136), conv(9, 14, 14, 64, 136)),
        (conv(4, 14, 14, 64, 136), conv(4, 9, 14, 128, 72)),
        (gemm(300, 264, 64), gemm(700, 136, 192)),
        (gemm(300, 264, 72), gemm(700, 136, 200)),
    ]
    for one, other in pairs:
        tiles = [
            set(implicit_gemm_tiles.tiles_of(Image.of(p), epilogue, HOPPER))
            for p in (one, other)
        ]
        shared = tiles[0] & tiles[1]
        assert shared
        for config in (tile.config() for tile in shared):
            sources = {
                codegen.source(region(p, epilogue), implicit_gemm_sm90, config, HOPPER)
                for p in (one, other)
            }
            assert len(sources) == 1


def test_operands_of_a_recipe():
    """Sides and vectors by their numbers, and something for the ones there are none."""
    for epilogue in (PLAIN, SIDE, FULL, STORED, BOTH):
        taken = region(CONVS[0], epilogue)
        config = implicit_gemm_sm90.configs(taken, HOPPER)[0]
        recipe = implicit_gemm_sm90.recipe(taken, config, HOPPER)
        sides = [4 + i for i in range(len(epilogue.sides))]
        vectors = [recipes.vector(i) for i in range(len(epilogue.vectors))]
        outputs = [recipes.output(i) for i in range(1 + len(epilogue.auxiliary))]
        assert [m.operand for m in recipe.maps] == [0, 1, *outputs, *(sides or [2])]
        assert list(recipe.pointers) == (vectors or [-1])


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (region(conv(1, 8, 8, 12, 64)), "12 input or 64 output channels: TMA needs"),
        (region(conv(1, 8, 8, 64, 20)), "64 input or 20 output channels"),
        (region(gemm(64, 60, 64)), "64 input or 60 output channels"),
        (region(hwio(conv(1, 8, 8, 64, 64, dtype="f32"))), "channels innermost only"),
        (region(gemm(64, 64, 64, dtype="f32")), "channels innermost only"),
        (
            region(CONVS[0], dataclasses.replace(PLAIN, out_dtype="bool")),
            "takes no tensors of bool",
        ),
        (
            region(CONVS[0], dataclasses.replace(SIDE, sides=("bool",))),
            "takes no tensors of bool",
        ),
        (
            region(CONVS[0], dataclasses.replace(FULL, sides=("bf16",) * 3)),
            "3 side inputs, more than 2",
        ),
        (
            region(
                CONVS[0],
                dataclasses.replace(PLAIN, auxiliary=(ir.Output(0, "bool"),)),
            ),
            "takes no tensors of bool",
        ),
        (
            region(CONVS[0], dataclasses.replace(STORED, auxiliary=STORED.outputs)),
            "2 auxiliary outputs, more than 1",
        ),
        (region(conv(1, 16, 16, 8, 8, 9)), "a filter of 9x9, more than 64 taps"),
        (region(conv(1, 64, 64, 8, 8, 5, stride=(5, 5))), "strides (5, 5)"),
        (region(conv(1, 64, 64, 8, 8, 1, stride=(9, 9))), "strides (9, 9)"),
        (region(conv(1, 8, 8, 8, 8, padding=(-1, 1, 1, 1))), "negative padding"),
        (region(conv(0, 8, 8, 8, 8)), "an empty dimension"),
        (region(gemm(0, 8, 8)), "an empty dimension"),
        (region(gemm(64, 64, 64, a_layout="col")), "A is stored with M innermost"),
        (region(gemm(2**31 - 1, 8, 8)), "an extent above"),
        (pooled(CONVS[0], max_pool(5, 1)), "a pool of 5x5, more than 16"),
        (pooled(CONVS[0], PAIRS, SIDE), "a pool after side inputs"),
        (
            pooled(CONVS[0], PAIRS, dataclasses.replace(PLAIN, out_dtype="f32")),
            "a pool of f32",
        ),
        (pooled(conv(1, 1, 8, 8, 8), PAIRS), "an empty dimension"),
        (averaged(conv(1, 112, 112, 64, 64, 1)), "a mean of 112x112 results, more"),
        # Of a 3x3 conv a box's rows are longer than those of the image.
        (averaged(conv(1, 16, 16, 64, 64)), "a mean of 16x16 results, more than"),
        (region(conv(1, 8, 8, 64, 64, groups=2)), "groups of 32 output channels"),
        # A box would have some of the next group's, of which infinity times 0 is NaN.
        (region(conv(1, 8, 8, 48, 128, groups=2)), "groups of 24 input channels"),
        (region(conv(1, 8, 8, 208, 128, groups=2)), "groups of 104 input channels"),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_refused_with_a_reason(refused, reason):
    assert reason in (implicit_gemm_sm90.supports(refused, HOPPER) or "taken")


@pytest.mark.parametrize(
    "changes",
    [
        {"dilation": (2, 2), "padding": (2, 2, 2, 2)},
        {"filter_layout": "krsc"},
        {"stride": (2, 1)},
        {"c": 24},
        {"c": 70},
        {"padding": (-1, 1, 1, 1)},
    ],
    ids=str,
)
def test_what_the_prologue_does_not_pack(changes):
    packed = hwio(conv(1, 12, 12, 12, 16))
    assert Packing.of(packed) is not None
    assert Packing.of(dataclasses.replace(packed, **changes)) is None


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_100a"])
def test_hopper_alone(name):
    gpu = arch.from_name(name)
    assert "needs sm_90a" in (implicit_gemm_sm90.supports(region(CONVS[0]), gpu) or "")


def _moved(recipe, field: str, by: int, pools: bool = False):
    """``recipe`` with one of the Geometry's ints changed."""
    at = 0
    for name, length in emulator.geometry_fields(pools):
        if name == field:
            break
        at += length or 1
    ints = list(recipe.ints)
    ints[at] += by
    return dataclasses.replace(recipe, ints=tuple(ints))


@pytest.mark.parametrize(
    ("field", "by"),
    [
        *(("tiles", -1), ("tile_rows", 1), ("tile_rows", -1), ("col_tiles", 1)),
        *(("chunks", -1), ("load_bytes", 128), ("stage_bytes", -1024)),
        *(("block_rows", 1), ("stores", 1), ("store_bytes", 128)),
        *(("phase_col", 1), ("phase_row", -1), ("phase_taps", -1)),
        *(("tap_offset", 128), ("tap_filter", 1)),
    ],
)
def test_the_emulator_sees_a_wrong_number(field, by, monkeypatch):
    taken = region(CONVS[7])
    tiles = implicit_gemm_tiles.tiles_of(Image.of(taken.problem), PLAIN, HOPPER)
    # Two blocks, of two rows each, that are stored row by row.
    block = geometry.Block(1, 2, 7)
    tile = next(t for t in tiles if t.blocks * t.warps_n == 2 and t.block == block)
    check(taken, tile.config(), HOPPER)
    right = implicit_gemm_sm90.recipe

    def wrong(*args):
        return _moved(right(*args), field, by)

    monkeypatch.setattr(implicit_gemm_sm90, "recipe", wrong)
    with pytest.raises((AssertionError, IndexError)):
        check(taken, tile.config(), HOPPER)


@pytest.mark.parametrize(
    ("field", "by"),
    [
        *(("tile_rows", 1), ("tile_cols", -1), ("step_rows", -1), ("step_cols", 1)),
        *(("block_rows", 1), ("phase_row", 1), ("phase_col", 1)),
        *(("block_outputs", -1), ("output_rows", 1), ("output_cols", 1)),
        *(("pitch_rows", -1), ("pitch", 1), ("results_bytes", -1024)),
        *(("result_rows", 1), ("result_rows", -1), ("result_cols", 1)),
        *(("origin_row", 1), ("origin_col", -1), ("window_row", -1)),
        ("window_col", 1),
    ],
)
def test_the_emulator_sees_a_wrong_number_of_a_pool(field, by, monkeypatch):
    # Of two images whole, and of column blocks whose last one is not full.
    taken = pooled(conv(4, 7, 7, 64, 64), STEM_POOL)
    if field not in ("output_rows", "pitch_rows"):
        problem = conv(1, 31, 25, 64, 64)
        taken = dataclasses.replace(taken, problem=problem)
    image = Image.of_region(taken)
    tiles = implicit_gemm_tiles.tiles_of(image, PLAIN, HOPPER)
    tile = next(
        t
        for t in tiles
        if t.block in (geometry.Block(2, 4, 4), geometry.Block(1, 3, 5))
        and t.blocks * t.warps_n == 2
    )
    check(taken, tile.config(), HOPPER)
    right = implicit_gemm_sm90.recipe

    def wrong(*args):
        return _moved(right(*args), field, by, pools=True)

    monkeypatch.setattr(implicit_gemm_sm90, "recipe", wrong)
    with pytest.raises((AssertionError, IndexError, ZeroDivisionError)):
        check(taken, tile.config(), HOPPER)


@pytest.mark.parametrize(
    ("field", "by"),
    [
        *(("tile_images", 1), ("block_images", 1), ("side_bytes", -128)),
        *(("block_outputs", -1), ("pitch_rows", 1), ("pitch", 1), ("pitch", -1)),
        *(("result_rows", 1), ("result_rows", -1), ("result_cols", 1)),
        ("result_cols", -1),
    ],
)
def test_the_emulator_sees_a_wrong_number_of_a_mean(field, by, monkeypatch):
    # Of several images, whose rows are longer in a box.
    taken = averaged(conv(5, 7, 6, 64, 64), SIDE)
    image = Image.of_region(taken)
    tile = next(
        t
        for t in implicit_gemm_tiles.tiles_of(image, SIDE, HOPPER)
        if t.block.images == t.blocks * t.warps_n == 2
    )
    check(taken, tile.config(), HOPPER)
    right = implicit_gemm_sm90.recipe

    def wrong(*args):
        return _moved(right(*args), field, by, pools=True)

    monkeypatch.setattr(implicit_gemm_sm90, "recipe", wrong)
    with pytest.raises((AssertionError, IndexError)):
        check(taken, tile.config(), HOPPER)
