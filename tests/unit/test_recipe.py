# SPDX-License-Identifier: Apache-2.0
"""Launch recipes: what they may say, and their numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jax_bolt import _native
from jax_bolt._src.kernels import recipe
from jax_bolt._src.kernels.recipe import Recipe, TensorMap

# 32 pixels of 64 channels of an image of 7 by 8, every other one.
MAP = TensorMap(
    operand=recipe.A,
    dtype=recipe.DTYPES.index("f16"),
    dims=(64, 8, 7, 5),
    strides=(128, 1024, 7168),
    box=(64, 8, 4, 2),
    steps=(1, 2, 1, 1),
    swizzle=128,
    offset=32,
)
# Of images of 7 by 9 and their padding every other pixel, 32 of them at once.
COLUMNS = TensorMap(
    operand=recipe.A,
    dtype=recipe.DTYPES.index("bf16"),
    dims=(64, 9, 7, 5),
    strides=(128, 1152, 8064),
    box=(64, 32, 1, 1),
    steps=(1, 2, 2, 1),
    swizzle=128,
    corners=(-1, -1, 1, 0),
)
RECIPE = Recipe(
    threads=384,
    grid=132,
    cluster=2,
    smem_bytes=100_000,
    programmatic=True,
    maps=(MAP,),
    pointers=(recipe.NULL, recipe.D, recipe.side(1), recipe.vector(7)),
    ints=(5, -6),
)


def test_encode() -> None:
    assert RECIPE.encode() == (
        *(4, 384, 132, 2, 100_000, 1, 0, 0, 1, 4, 2),
        *(0, 1, 4),
        *(64, 8, 7, 5, 1),
        *(128, 1024, 7168, 0),
        *(64, 8, 4, 2, 1),
        *(1, 2, 1, 1, 1),
        *(128, 32),
        *(0, 0, 0, 0, 0),
        *(-1, 2, 5, 14),
        *(5, -6),
    )
    assert len(MAP.numbers) == 29
    assert RECIPE.parameter_bytes == 128 + 32 + 8


def test_im2col_mode() -> None:
    assert COLUMNS.numbers[24:] == (1, -1, -1, 1, 0)
    assert MAP.numbers[24:] == (0, 0, 0, 0, 0)
    for change, message in (
        (dict(corners=(-129, 0, 0, 0)), "corner -129 is not from -128 to 127"),
        (dict(corners=(0, 0, 0, 128)), "corner 128"),
        (dict(box=(64, 32, 2, 1)), "C W H N and boxes of pixels"),
        (dict(steps=(1, 2, 2, 2)), "C W H N and boxes of pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(COLUMNS, **change)  # type: ignore[arg-type]


def test_a_prologue_follows_the_recipe() -> None:
    prologue = Recipe(threads=256, grid=7, ints=(1, 2))
    both = dataclasses.replace(RECIPE, workspace_bytes=640, prologue=prologue)
    head = list(RECIPE.encode())
    head[6:8] = 640, 1
    assert both.encode() == (*head, *prologue.encode())
    assert both.parameter_bytes == RECIPE.parameter_bytes
    with pytest.raises(ValueError, match="a prologue has no prologue"):
        dataclasses.replace(RECIPE, prologue=both)


def test_the_operands_are_those_of_the_abi() -> None:
    count = _native.MAX_SIDES + _native.MAX_VECTORS
    assert recipe.vector(_native.MAX_VECTORS - 1) == 4 + count - 1
    outputs = [recipe.output(i) for i in range(_native.MAX_AUXILIARY + 1)]
    assert outputs == [recipe.D, *(4 + count + i for i in range(len(outputs) - 1))]
    with pytest.raises(ValueError, match="output 2 is not from 0 to 1"):
        recipe.output(2)
    with pytest.raises(ValueError, match="side 3 is not from 0 to 2"):
        recipe.side(3)
    with pytest.raises(ValueError, match="vector -1 is not from 0 to 11"):
        recipe.vector(-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(operand=-1), "operand -1"),
        (dict(operand=20), "operand 20"),
        (dict(dtype=4), "dtype 4 is not from 0 to 3"),
        (dict(offset=8), "offset 8 is not a multiple of 16 bytes"),
        (dict(offset=-16), "offset -16"),
        (dict(dims=()), "rank 0 is not from 1 to 5"),
        (dict(dims=(1,) * 6), "rank 6 is not from 1 to 5"),
        (dict(strides=(128,)), r"strides \(128,\) are not 3, for rank 4"),
        (dict(box=(8, 8)), r"box \(8, 8\) are not 4"),
        (dict(steps=(1, 1)), r"steps \(1, 1\) are not 4"),
        (dict(dims=(64, 0, 7, 5)), "dim 0"),
        (dict(dims=(64, 2**32, 7, 5)), "dim 4294967296"),
        (dict(strides=(120, 1024, 7168)), "stride 120 is not a multiple of 16"),
        (dict(strides=(128, 1024, 2**40)), "stride 1099511627776"),
        (dict(box=(64, 257, 4, 2)), "box 257 is not from 1 to 256"),
        (dict(box=(64, 0, 4, 2)), "box 0 is not from 1 to 256"),
        (dict(steps=(1, 9, 1, 1)), "step 9 is not from 1 to 8"),
        (dict(steps=(2, 1, 1, 1)), "innermost step, 2"),
        (dict(swizzle=96), "swizzle 96"),
        (dict(swizzle=64), "row of 128 bytes is longer than the swizzle, 64"),
        (dict(box=(4, 8, 4, 2)), "row of 8 bytes is not a multiple of 16"),
    ],
)
def test_maps_that_the_hardware_does_not_have(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(MAP, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(threads=0), "threads 0"),
        (dict(threads=1025), "threads 1025"),
        (dict(grid=0), "grid 0"),
        (dict(cluster=9), "cluster 9 is not from 1 to 8"),
        (dict(grid=131), "cluster of 2 does not divide the grid, 131"),
        (dict(smem_bytes=300_000), "smem_bytes 300000"),
        (dict(pointers=(-2,)), "pointer -2"),
        (dict(pointers=(20,)), "pointer 20"),
        (dict(ints=(2**31,)), "int 2147483648"),
        (dict(maps=(MAP,) * 32), "4136 bytes of parameters, more than 4096"),
    ],
)
def test_launches_that_there_are_none_of(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


def test_the_most_parameters() -> None:
    full = Recipe(32, 1, ints=(0,) * 1024)
    assert full.parameter_bytes == 4096
    assert Recipe(32, 1).encode() == (4, 32, 1, 1, 0, 0, 0, 0, 0, 0, 0)
