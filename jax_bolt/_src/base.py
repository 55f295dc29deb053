# SPDX-License-Identifier: Apache-2.0
"""Base programs: an architecture's kernels that are built once and time any model.

Sizes are launch arguments, so a kernel with a plain epilogue (a bias and a relu, and a
side input where the region has one) tells how fast its template arguments are on a
problem before anything is compiled for the region itself.

On Hopper a program takes a second to compile, and of the template arguments those are
here that most of the first 24 candidates of usual CNNs, BERT and dense layers have, at
batch sizes from 1 to 128: full chunks of input channels, filters with the output
channels innermost. The other architectures' stock templates take ten seconds a kernel
and have a few tiles each, so a few problems list them all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeAlias

from . import forms, ir, plan
from .arch import GpuArch
from .jit import codegen
from .kernels import conv_sm80, gemm_sm80, implicit_gemm_sm90
from .kernels.geometry import Block
from .kernels.implicit_gemm_tiles import Tile
from .plan import Candidate

# One instruction takes either, at one rate, and a kernel's arguments name neither: the
# programs of one type time both.
_DTYPE: ir.DType = "bf16"
_TIMED_AS: dict[ir.DType, ir.DType] = {"bf16": _DTYPE, "f16": _DTYPE}


@functools.cache
def sources(arch: GpuArch) -> tuple[str, ...]:
    """The TUs of the base programs of ``arch``, the likeliest to be timed first."""
    if arch.sm == 90:
        return _hopper(arch)
    found = [c for region in _stock_regions() for c in _stock(region, arch)]
    return tuple(dict.fromkeys(c.source for c in found))


def stand_in(candidate: Candidate) -> Candidate | None:
    """The candidate that has a base program and the template arguments of another.

    It takes the same operands, reads and writes as much, and is launched alike. None
    where the library has none. A second side input is left out.
    """
    region = candidate.form.region
    problem, epilogue = region.problem, region.epilogue
    dtype = _TIMED_AS.get(problem.dtype)
    full = (epilogue.out_dtype, *epilogue.sides)
    if dtype is None or any(ir.ITEM_BYTES[d] != ir.ITEM_BYTES[dtype] for d in full):
        return None
    # What follows a stock template's main loop takes all its tiles as long.
    stock = candidate.template.artifact == "module"
    base = ir.Region(
        problem=dataclasses.replace(problem, dtype=dtype),
        epilogue=_epilogue(with_side=bool(epilogue.sides) and not stock),
    )
    form = forms.Form(candidate.form.name, base)
    made = dataclasses.replace(candidate, form=form)
    return made if made.source in _known(candidate.arch) else None


@functools.cache
def _known(arch: GpuArch) -> frozenset[str]:
    return frozenset(sources(arch))


def _epilogue(*, with_side: bool) -> ir.Epilogue:
    """relu(acc + bias), or relu(acc + bias + side)."""
    ops = [ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("add", (0, 1))]
    if with_side:
        ops += [ir.Op("side", attr=0), ir.Op("add", (2, 3))]
    last = len(ops) - 1
    ops += [ir.Op("const", attr=0.0), ir.Op("max", (last, last + 1))]
    return ir.Epilogue(
        tuple(ops),
        len(ops) - 1,
        _DTYPE,
        vectors=(ir.Vector(_DTYPE),),
        sides=(_DTYPE,) if with_side else (),
    )


# Hopper -----------------------------------------------------------------------------

_PAIR, _PINGPONG = "cooperative", "pingpong"
# (blocks, channel blocks, warpgroups along channels and pixels, schedule), splits and
# multicast -> the pixels of a block, without and with a side input. Counted over the
# candidates of the benchmark's problems.
_Shape: TypeAlias = tuple[int, int, int, int, str]
_Pixels: TypeAlias = tuple[int, ...]
_HOPPER: tuple[tuple[_Shape, int, int, _Pixels, _Pixels], ...] = (
    (
        *((1, 1, 1, 1, _PINGPONG), 1, 1),
        (
            *(8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120, 128),
            *(136, 144, 152, 176, 192, 208, 216, 232, 240),
        ),
        (8, 16, 24, 32, 40, 48, 56, 64, 120, 208),
    ),
    (
        *((1, 1, 1, 2, _PAIR), 1, 1),
        (8, 16, 24, 32, 40, 48, 56, 64, 72, 96, 104, 112, 120, 208),
        (8, 16, 24, 32, 40, 48, 56, 64),
    ),
    (
        *((1, 2, 1, 1, _PINGPONG), 1, 1),
        (8, 56, 64, 80, 88, 96, 104, 112, 120, 128, 144, 176, 192),
        (8, 16, 56, 64, 72, 80, 88, 96, 104, 112, 128, 136, 144, 160),
    ),
    (
        *((1, 1, 1, 1, _PAIR), 1, 1),
        (8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 104, 112, 120, 128, 136, 144),
        (8, 16, 24, 32, 40, 48, 56, 104, 112, 128),
    ),
    (
        *((1, 1, 2, 1, _PAIR), 1, 1),
        (8, 16, 24, 32, 48, 56, 64, 96, 104, 112, 120, 192, 200, 208, 216),
        (8, 16, 24, 32, 48, 56, 64, 72, 96, 104, 112, 200),
    ),
    (
        *((2, 1, 2, 1, _PAIR), 1, 1),
        (8, 24, 32, 48, 56, 64, 96, 104, 112, 120, 128),
        (8, 16, 24, 32, 40, 48, 56, 64, 72, 96, 104, 112),
    ),
    (
        *((1, 2, 1, 2, _PAIR), 1, 1),
        (8, 24, 32, 48, 56, 64, 96, 104, 112, 120, 128),
        (8, 16, 24, 32, 40, 48, 56, 64, 72, 96, 104, 112),
    ),
    (
        *((1, 2, 2, 1, _PAIR), 1, 1),
        (8, 96, 104, 120, 128, 192),
        (8, 16, 24, 32, 48, 56, 64, 96, 104, 112, 128),
    ),
    (
        *((2, 1, 1, 2, _PAIR), 1, 1),
        (8, 16, 48, 56, 64, 120),
        (8, 32, 40, 56),
    ),
    ((1, 2, 1, 1, _PAIR), 1, 1, (8,), (8, 16, 24, 32, 48, 56, 64)),
    (
        *((1, 1, 1, 1, _PINGPONG), 1, 2),
        (56, 64, 80, 88, 104, 112, 120, 128, 144, 176, 208, 216, 232),
        (208,),
    ),
    (
        *((1, 2, 1, 1, _PINGPONG), 1, 2),
        (16, 32, 56, 64, 72, 88, 104, 112, 120, 128, 176, 192),
        (104, 112, 136),
    ),
    ((1, 1, 1, 2, _PAIR), 1, 2, (16, 32, 56, 64, 104, 120, 208), ()),
    ((1, 1, 1, 1, _PAIR), 1, 2, (16, 32, 64, 104, 120, 144), ()),
    ((1, 1, 2, 1, _PAIR), 1, 2, (16, 32, 56, 104, 208), ()),
    ((1, 2, 1, 2, _PAIR), 1, 2, (56, 104), (32, 40, 56, 104)),
    ((2, 1, 2, 1, _PAIR), 1, 2, (56, 104), (32, 40, 56, 104)),
    ((1, 2, 2, 1, _PAIR), 1, 2, (96, 104), (96, 104)),
    ((1, 1, 1, 1, _PAIR), 2, 1, (8,), ()),
    ((1, 1, 1, 1, _PAIR), 3, 1, (8,), ()),
    ((1, 1, 1, 1, _PAIR), 4, 1, (8, 16, 32), ()),
    ((1, 1, 1, 1, _PAIR), 6, 1, (8,), ()),
    ((1, 1, 1, 1, _PAIR), 8, 1, (8, 32), ()),
    ((1, 1, 1, 2, _PAIR), 4, 1, (16, 32), ()),
    ((1, 1, 1, 2, _PAIR), 6, 1, (16, 24), ()),
    ((1, 1, 2, 1, _PAIR), 2, 1, (8,), ()),
    ((1, 1, 2, 1, _PAIR), 3, 1, (8,), ()),
    ((1, 1, 2, 1, _PAIR), 4, 1, (8,), ()),
    ((1, 1, 2, 1, _PAIR), 6, 1, (8, 16), ()),
    ((1, 1, 2, 1, _PAIR), 8, 1, (8, 32), ()),
)


def _hopper(arch: GpuArch) -> tuple[str, ...]:
    # Of the problem a program keeps the dtype, where K lies in the filter, and that a
    # chunk of its channels is full.
    problem = ir.GemmProblem(m=4096, n=512, k=512, dtype=_DTYPE)
    found: list[str] = []
    for with_side in (False, True):
        region = ir.Region(problem=problem, epilogue=_epilogue(with_side=with_side))
        for shape, splits, multicast, *pixels in _HOPPER:
            for count in pixels[with_side]:
                block = Block(1, 1, count)
                tile = Tile(count, *shape, block, splits=splits, multicast=multicast)
                config = tile.config()
                found.append(codegen.source(region, implicit_gemm_sm90, config, arch))
    return tuple(dict.fromkeys(found))


# Stock templates --------------------------------------------------------------------


def _stock_regions() -> list[ir.Region]:
    """Regions with operands of whole 16 bytes, large and small, of every layout."""
    problems: list[ir.Problem] = [
        ir.GemmProblem(m=m, n=n, k=k, dtype=_DTYPE)
        for m, n, k in ((65536, 256, 256), (4096, 1024, 1024), (512, 512, 1024))
    ]
    problems += [
        ir.ConvProblem(
            **{"n": 32, "h": size, "w": size, "c": channels, "k": channels},
            **{"r": 3, "s": 3, "padding": (1, 1, 1, 1), "dtype": _DTYPE},
        )
        for size, channels in ((56, 64), (28, 128), (14, 256), (7, 512))
    ]
    epilogue = _epilogue(with_side=False)
    return [ir.Region(problem=p, epilogue=epilogue) for p in problems]


def _stock(region: ir.Region, arch: GpuArch) -> list[Candidate]:
    found, _ = plan.candidates(region, arch)
    names = (gemm_sm80.name, conv_sm80.name)
    return [c for c in found if c.template.name in names]
