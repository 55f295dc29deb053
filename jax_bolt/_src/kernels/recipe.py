# SPDX-License-Identifier: Apache-2.0
"""How a cubin is launched, as data: what a module's own host code would do.

The native launcher (cc/native/recipe.h, cubin.h) encodes the tensor maps, fills the
kernel's one parameter with the maps, the pointers and the ints, in this order and
without gaps, and launches. Nothing there knows of any one kernel.
"""

from __future__ import annotations

import dataclasses

from .. import ir

VERSION = 4

# Operands of the custom call, by number.
NULL, A, B, D, WORKSPACE = -1, 0, 1, 2, 3
# What a tensor map may hold, by number, and its bytes. tf32 is float32 that TMA rounds
# to nearest as it loads: tensor cores themselves only cut off what TF32 does not have.
DTYPES = ("bf16", "f16", "f32", "tf32")
ITEM_BYTES = (2, 2, 4, 4)

# What the C ABI carries (abi.h): those of a chain's regions together, whose later
# products' operands count as side inputs.
MAX_VECTORS, MAX_SIDES = 12, 3
_SIDES = 4
_VECTORS = _SIDES + MAX_SIDES
_AUXILIARY = _VECTORS + MAX_VECTORS
_OPERANDS = _AUXILIARY + ir.MAX_AUXILIARY
_SWIZZLES = (0, 32, 64, 128)
_MAX_RANK = 5
_MAX_CLUSTER = 8  # what every GPU with clusters can launch
_MAX_SHARED = 227 * 1024  # no GPU's block has more
_MAX_PARAMETERS = 4096
_MAP_BYTES, _POINTER_BYTES, _INT_BYTES = 128, 8, 4


def side(index: int) -> int:
    """The operand number of a side input; ValueError where there is none such."""
    _range("side", index, 0, MAX_SIDES - 1)
    return _SIDES + index


def vector(index: int) -> int:
    """The operand number of a per-channel input; ValueError as ``side``."""
    _range("vector", index, 0, MAX_VECTORS - 1)
    return _VECTORS + index


def output(index: int) -> int:
    """The operand number of an output, 0 the result; ValueError as ``side``."""
    _range("output", index, 0, ir.MAX_AUXILIARY)
    return D if index == 0 else _AUXILIARY + index - 1


@dataclasses.dataclass(frozen=True, slots=True)
class TensorMap:
    """A tensor that TMA moves, and the box that one instruction moves of it.

    ``dtype`` counts in ``DTYPES``. Innermost dimension first: ``dims`` and ``box`` are
    elements, ``strides`` are bytes of all dimensions but the innermost, ``steps`` are
    TMA's element strides: a box takes every ``steps[i]``-th element. ``swizzle`` is in
    bytes, 0 for none. The tensor begins ``offset`` bytes into the operand. Out of
    bounds is read as zeros and not written.

    With ``corners`` it is read in TMA's im2col mode: dims are C W H N, and a box is
    ``box[1]`` pixels, one after the other, of those every ``steps`` from the lower
    corner (W, H) to the upper one, which counts from the image's last pixel.

    Raises ValueError for what the hardware does not have.
    """

    operand: int
    dtype: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    swizzle: int
    offset: int = 0
    corners: tuple[int, int, int, int] | None = None

    def __post_init__(self) -> None:
        rank = len(self.dims)
        _range("operand", self.operand, 0, _OPERANDS - 1)
        _range("rank", rank, 1, _MAX_RANK)
        _range("dtype", self.dtype, 0, len(DTYPES) - 1)
        if self.swizzle not in _SWIZZLES:
            raise ValueError(f"swizzle {self.swizzle} is not one of {_SWIZZLES}")
        for name, values, length in (
            ("strides", self.strides, rank - 1),
            ("box", self.box, rank),
            ("steps", self.steps, rank),
        ):
            if len(values) != length:
                raise ValueError(f"{name} {values} are not {length}, for rank {rank}")
        for extent in self.dims:
            _range("dim", extent, 1, 2**32 - 1)
        for stride in self.strides:
            _range("stride", stride, 0, 2**40 - 1)
            if stride % 16:
                raise ValueError(f"stride {stride} is not a multiple of 16 bytes")
        for extent in self.box:
            _range("box", extent, 1, 256)
        for step in self.steps:
            _range("step", step, 1, 8)
        _range("offset", self.offset, 0, 2**48 - 1)
        if self.offset % 16:
            raise ValueError(f"offset {self.offset} is not a multiple of 16 bytes")
        if self.steps[0] != 1:
            raise ValueError(f"TMA ignores the innermost step, {self.steps[0]}")
        if self.corners is not None:
            if rank != 4 or self.box[2:] != (1, 1) or self.steps[3] != 1:
                raise ValueError("im2col mode has C W H N and boxes of pixels")
            for corner in self.corners:
                _range("corner", corner, -128, 127)
        row = self.box[0] * ITEM_BYTES[self.dtype]
        if row % 16:
            raise ValueError(f"a box's row of {row} bytes is not a multiple of 16")
        if self.swizzle and row > self.swizzle:
            raise ValueError(
                f"a box's row of {row} bytes is longer than the swizzle, {self.swizzle}"
            )

    @property
    def numbers(self) -> tuple[int, ...]:
        """29 numbers: unused dims, boxes and steps are 1, unused strides 0."""
        unused = _MAX_RANK - len(self.dims)
        ones, zeros = (1,) * unused, (0,) * unused
        return (
            *(self.operand, self.dtype, len(self.dims)),
            *(*self.dims, *ones),
            *(*self.strides, *zeros),
            *(*self.box, *ones),
            *(*self.steps, *ones),
            *(self.swizzle, self.offset),
            *(int(self.corners is not None), *(self.corners or (0, 0, 0, 0))),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Recipe:
    """A launch of ``grid`` blocks of ``threads``, in one dimension.

    ``cluster`` blocks form a cluster, ``smem_bytes`` is dynamic shared memory, and
    ``programmatic`` lets the kernel begin before the one ahead of it has ended (it must
    wait itself, with griddepcontrol). ``pointers`` are operand numbers, ``NULL`` for a
    null pointer. The call has a workspace of ``workspace_bytes``, which a ``prologue``,
    a launch of the cubin's other kernel just before, may fill.

    Raises ValueError for what cannot be launched.
    """

    threads: int
    grid: int
    cluster: int = 1
    smem_bytes: int = 0
    programmatic: bool = False
    maps: tuple[TensorMap, ...] = ()
    pointers: tuple[int, ...] = ()
    ints: tuple[int, ...] = ()
    workspace_bytes: int = 0
    prologue: Recipe | None = None

    def __post_init__(self) -> None:
        _range("threads", self.threads, 1, 1024)
        _range("grid", self.grid, 1, 2**31 - 1)
        _range("cluster", self.cluster, 1, _MAX_CLUSTER)
        _range("smem_bytes", self.smem_bytes, 0, _MAX_SHARED)
        if self.grid % self.cluster:
            raise ValueError(
                f"a cluster of {self.cluster} does not divide the grid, {self.grid}"
            )
        _range("workspace_bytes", self.workspace_bytes, 0, 2**48 - 1)
        if self.prologue is not None and self.prologue.prologue is not None:
            raise ValueError("a prologue has no prologue")
        for operand in self.pointers:
            _range("pointer", operand, NULL, _OPERANDS - 1)
        for number in self.ints:
            _range("int", number, -(2**31), 2**31 - 1)
        if self.parameter_bytes > _MAX_PARAMETERS:
            raise ValueError(
                f"{self.parameter_bytes} bytes of parameters, more than "
                f"{_MAX_PARAMETERS}"
            )

    @property
    def parameter_bytes(self) -> int:
        """What the kernel's struct holds, padding at its end aside."""
        return (
            len(self.maps) * _MAP_BYTES
            + len(self.pointers) * _POINTER_BYTES
            + len(self.ints) * _INT_BYTES
        )

    def encode(self) -> tuple[int, ...]:
        """The recipe as the custom call's attribute has it (int64)."""
        return (
            *(VERSION, self.threads, self.grid, self.cluster),
            *(self.smem_bytes, int(self.programmatic)),
            *(self.workspace_bytes, int(self.prologue is not None)),
            *(len(self.maps), len(self.pointers), len(self.ints)),
            *(number for tensor in self.maps for number in tensor.numbers),
            *self.pointers,
            *self.ints,
            *(self.prologue.encode() if self.prologue is not None else ()),
        )


def _range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} {value} is not from {low} to {high}")
