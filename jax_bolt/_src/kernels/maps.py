# SPDX-License-Identifier: Apache-2.0
"""Tensor maps of arrays without gaps: filters, results, side inputs."""

from __future__ import annotations

from . import recipe
from .image import BLOCK, ROW
from .recipe import TensorMap


def filters_map(
    operand: int,
    dtype: int,
    taps: int,
    inputs: int,
    outputs: int,
    k_outer: bool,
    *,
    blocks: int = 1,
    count: int = 1,
    offset: int = 0,
) -> TensorMap:
    """A map of ``count`` filters. A box has ``blocks`` of 64 output channels where
    those are outermost (``k_outer``), and else one."""
    chunk = ROW // recipe.ITEM_BYTES[dtype]
    if k_outer:
        sizes, box = (inputs, taps, outputs, count), (chunk, 1, BLOCK * blocks, 1)
    else:
        sizes, box = (outputs, inputs, taps, count), (BLOCK, chunk, 1, 1)
    return contiguous(operand, dtype, sizes, box, offset)


def contiguous(
    operand: int,
    dtype: int,
    dims: tuple[int, ...],
    box: tuple[int, ...],
    offset: int = 0,
) -> TensorMap:
    """A map of a contiguous array, innermost dimension first."""
    strides, stride = [], recipe.ITEM_BYTES[dtype]
    for size in dims[:-1]:
        stride *= size
        strides.append(stride)
    return TensorMap(
        operand=operand,
        dtype=dtype,
        dims=dims,
        strides=tuple(strides),
        box=box,
        steps=(1,) * len(dims),
        swizzle=128,
        offset=offset,
    )
