# SPDX-License-Identifier: Apache-2.0
"""Base programs: an architecture's kernels that are built once and time any model.

Sizes are launch arguments, so a kernel with a plain epilogue (a bias and a relu, and a
side input where the region has one) tells how fast its template arguments are on a
problem before anything is compiled for the region itself.

On Hopper a program takes a second to compile, and of the template arguments those are
here that most of the first 24 candidates of usual CNNs, BERT and dense layers have, at
batch sizes from 1 to 128: full chunks of input channels, filters with the output
channels innermost. They also time problems whose last chunk is not full, and multiply
its zeros, which the region's own kernel leaves out. The other architectures' stock
templates take ten seconds a kernel and have a few tiles each, so a few problems list
them all.
"""

from __future__ import annotations

import dataclasses
import functools

from . import forms, ir, plan
from .arch import GpuArch
from .jit import codegen
from .kernels import conv_sm80, gemm_sm80, implicit_gemm_sm90
from .kernels.geometry import Block
from .kernels.image import Image
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
    where the library has none. A second side input and auxiliary outputs are left out,
    and no products of zeros.
    """
    made = plain(candidate)
    if made is None or made.source not in _known(candidate.arch):
        return None
    return made


def plain(candidate: Candidate) -> Candidate | None:
    """As ``stand_in``, whether or not the library has it.

    None for other dtypes, and for a pool, which the kernel's type names.
    """
    region = candidate.form.region
    problem, epilogue = region.problem, region.epilogue
    dtype = _TIMED_AS.get(problem.dtype)
    full = epilogue.tensors
    if region.pool is not None:
        return None
    if dtype is None or any(ir.ITEM_BYTES[d] != ir.ITEM_BYTES[dtype] for d in full):
        return None
    # What follows a stock template's main loop takes all its tiles as long.
    stock = candidate.template.artifact == "module"
    simple = ir.Region(
        problem=dataclasses.replace(problem, dtype=dtype),
        epilogue=_epilogue(with_side=bool(epilogue.sides) and not stock),
    )
    form = forms.Form(candidate.form.name, simple)
    config = candidate.config
    if candidate.template is implicit_gemm_sm90:
        image = Image.of(simple.problem)
        zeros = image.last_steps < image.k_steps
        config = dataclasses.replace(Tile.of(config), zeros=zeros).config()
    return dataclasses.replace(candidate, form=form, config=config)


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

# Blocks, warpgroups, schedule, splits and parts as in Tile; side inputs; and pixels, of
# which "a-b" are all multiples of 8. Counted over the candidates of the benchmark's
# problems.
_HOPPER = """
1x1 1x1 pingpong    1 1 0: 8-184 200-256
1x1 1x1 pingpong    1 1 1: 8-64 104-128 152
1x2 1x1 pingpong    1 1 0: 8-200
1x2 1x1 pingpong    1 1 1: 8-32 48-64 80 96 104 128
1x1 2x1 cooperative 1 1 0: 8-32 48-72 96-128 192-232
1x1 2x1 cooperative 1 1 1: 8-80 96-128 192 200
1x1 1x2 cooperative 1 1 0: 8-64 96-128 208 216
1x1 1x2 cooperative 1 1 1: 8-72 104 120
1x1 1x1 cooperative 1 1 0: 8-32 48-152
1x1 1x1 cooperative 1 1 1: 8 16 128
2x1 2x1 cooperative 1 1 0: 32 48-64 96-128 144
2x1 2x1 cooperative 1 1 1: 24 32 48-64 96-112 128 192
1x2 1x2 cooperative 1 1 0: 32 48-64 96-128 144
1x2 1x2 cooperative 1 1 1: 24 32 48-64 96-112 128 192
1x2 2x1 cooperative 1 1 0: 8 32 96 104 120 128 192
1x2 2x1 cooperative 1 1 1: 48-64 96-112 128 136 192
2x1 1x2 cooperative 1 1 0: 56 64 112 120
2x1 1x2 cooperative 1 1 1: 56
1x2 1x1 cooperative 1 1 0: 8 48
1x2 1x1 cooperative 1 1 1: 8 24 48
2x1 2x1 cooperative 1 2 0: 96 128
2x1 2x1 cooperative 1 2 1: 96 128
1x2 1x2 cooperative 1 2 0: 96 128
1x2 1x2 cooperative 1 2 1: 96 128
1x1 2x1 cooperative 1 4 0: 192 256
1x1 2x1 cooperative 1 4 1: 192 256
1x2 2x1 cooperative 1 2 0: 96 128
1x2 2x1 cooperative 1 2 1: 96 128
1x2 1x1 pingpong    1 2 0: 96 128 160
1x2 1x1 pingpong    1 2 1: 128
1x1 2x1 cooperative 1 2 0: 96
1x1 2x1 cooperative 1 2 1: 96 128 224
1x2 1x1 pingpong    1 4 0: 192
1x2 2x1 cooperative 1 4 0: 192
1x1 1x2 cooperative 1 2 0: 96
1x2 1x1 pingpong    1 3 0: 144
1x1 1x1 pingpong    1 2 0: 128
1x2 1x2 cooperative 1 4 0: 192
2x1 2x1 cooperative 1 4 0: 192
1x1 1x1 pingpong    1 4 0: 192
1x1 2x1 cooperative 4 1 0: 8-32 48-64 120
1x1 1x1 cooperative 4 1 0: 8-32 48 64
1x1 2x1 cooperative 2 1 0: 8 56-72 104 120
1x1 1x2 cooperative 4 1 0: 16-32 48
1x1 1x1 cooperative 2 1 0: 8 64 72
1x1 1x2 cooperative 2 1 0: 16 56 64
1x1 2x1 cooperative 3 1 0: 8 32
1x1 1x1 cooperative 8 1 0: 8 32
1x1 2x1 cooperative 8 1 0: 8 32
1x1 1x1 cooperative 3 1 0: 8
1x1 1x1 cooperative 6 1 0: 8
1x1 2x1 cooperative 6 1 0: 8
"""


def _hopper(arch: GpuArch) -> tuple[str, ...]:
    # Of the problem a program keeps the dtype, where K lies in the filter, and that a
    # chunk of its channels is full.
    problem = ir.GemmProblem(m=4096, n=512, k=512, dtype=_DTYPE)
    found: list[str] = []
    for line in _HOPPER.strip().splitlines():
        arguments, counts = line.split(":")
        sides = int(arguments.split()[-1])
        region = ir.Region(problem=problem, epilogue=_epilogue(with_side=sides > 0))
        for pixels in _multiples(counts):
            config = _tile(arguments, pixels).config()
            found.append(codegen.source(region, implicit_gemm_sm90, config, arch))
    return tuple(dict.fromkeys(found))


def _tile(arguments: str, pixels: int) -> Tile:
    blocks, warpgroups, schedule, splits, parts, _ = arguments.split()
    return Tile(
        pixels,
        *map(int, (*blocks.split("x"), *warpgroups.split("x"))),
        schedule=schedule,
        block=Block(1, 1, pixels),
        splits=int(splits),
        parts=int(parts),
    )


def _multiples(text: str) -> list[int]:
    found: list[int] = []
    for run in text.split():
        first, _, last = run.partition("-")
        found += range(int(first), int(last or first) + 1, 8)
    return found


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
