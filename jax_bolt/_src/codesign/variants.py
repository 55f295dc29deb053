# SPDX-License-Identifier: Apache-2.0
"""What a region could be instead: with other channels, or with a 1x1 conv after it.

(Bolt, section 3.3.) Other activations are in ``activation.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp

from .. import evaluate, ir
from ..invoke import JAX_DTYPES
from ..kernels import image
from ..primitive import SiteInfo
from . import activation

_OPERANDS = ("bf16", "f16", "f32")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Padded:
    """A region whose ``operand`` has ``to`` channels, a multiple of ``size``."""

    region: ir.Region
    operand: str
    channels: int
    to: int
    size: int
    unit: str

    @property
    def idle(self) -> float:
        """The share of its units that the present channels leave empty."""
        return 1 - self.channels / (-(-self.channels // self.size) * self.size)


def padded(region: ir.Region) -> Iterator[Padded]:
    """The region with channels that fill whole units, where they do not now.

    Of a tensor core's units only those that at most double the channels.
    """
    problem = region.problem
    item = ir.ITEM_BYTES[problem.dtype]
    load = (16 // item, f"{16 // item} (16 bytes)")
    step = (image.STEP // item, f"{image.STEP // item} (a product's depth)")
    block = (image.BLOCK, f"{image.BLOCK} (a tile's channels)")
    for operand, channels in _channels(problem).items():
        second = {"input": step, "output": block}.get(operand)
        taken = {channels}
        for size, unit in filter(None, (load, second)):
            to = -(-channels // size) * size
            # An image's three channels are not to become 16.
            if to in taken or (unit is not load[1] and to > 2 * channels):
                continue
            taken.add(to)
            yield Padded(
                region=_with_channels(region, operand, to),
                operand=operand,
                channels=channels,
                to=to,
                size=size,
                unit=unit,
            )


def _channels(problem: ir.Problem) -> dict[str, int]:
    """Those that a model chooses, by operand."""
    if isinstance(problem, ir.GemmProblem):
        # Of several products at once, both operands are computed, as in attention.
        batched = problem.batch > 1
        return {} if batched else {"input": problem.k, "output": problem.n}
    if problem.groups == 1:
        return {"input": problem.c, "output": problem.k}
    same = problem.is_depthwise and problem.k == problem.c
    return {"both": problem.c} if same else {}


def _with_channels(region: ir.Region, operand: str, to: int) -> ir.Region:
    names = {"input": "c", "output": "k"}
    if isinstance(region.problem, ir.GemmProblem):
        names = {"input": "k", "output": "n"}
    if operand == "both":
        changes: dict[str, Any] = {"c": to, "k": to, "groups": to}
    else:
        changes = {names[operand]: to}
    return dataclasses.replace(
        region, problem=dataclasses.replace(region.problem, **changes)
    )


def chained(region: ir.Region) -> ir.Chain | None:
    """The region and a 1x1 conv of as many channels, with a bias and its activation.

    None for what is no spatial conv, and where no conv takes its result.
    """
    problem, epilogue = region.problem, region.epilogue
    if isinstance(problem, ir.GemmProblem) or problem.r * problem.s == 1:
        return None
    if region.pool is not None:
        return None
    dtype = epilogue.out_dtype
    if dtype not in _OPERANDS:
        return None
    after = ir.ConvProblem(
        n=problem.n, h=problem.p, w=problem.q, c=problem.k, k=problem.k, r=1, s=1,
        dtype=dtype,
    )  # fmt: skip
    ops = (ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("add", (0, 1)))
    then = ir.Epilogue(ops, 2, dtype, vectors=(ir.Vector(dtype),))
    found = activation.find(epilogue)
    if found is not None:
        then = activation.appended(then, activation.taken(epilogue, found))
    second = ir.Region(problem=after, epilogue=then)
    return ir.Chain(first=region, second=second, stored=False)


def site(region: ir.Region, name: str) -> SiteInfo:
    """``region`` as a site of a program that has nothing else, as tuning takes it."""
    problem, epilogue = region.problem, region.epilogue
    if isinstance(problem, ir.ConvProblem):
        p = problem
        root = "conv_general_dilated"
        lhs, rhs = (p.n, p.h, p.w, p.c), (p.r, p.s, p.group_channels, p.k)
        full = (p.n, p.p, p.q, p.k)
        sizes = (p.p, p.q) if region.pool is None else region.pool.sizes(p.p, p.q)
        out = (p.n, *sizes, p.k)
        stored = dataclasses.replace(problem, filter_layout="hwio")
        region_as_read = dataclasses.replace(region, problem=stored)
    else:
        g = problem
        root = "dot_general"
        batch = (g.batch,) if g.batch > 1 else ()
        lhs = (*batch, *((g.m, g.k) if g.a_layout == "row" else (g.k, g.m)))
        rhs = (*batch, *((g.k, g.n) if g.b_layout == "row" else (g.n, g.k)))
        full = out = (*batch, g.m, g.n)
        region_as_read = region

    def like(shape: tuple[int, ...], dtype: ir.DType) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, cast(Any, JAX_DTYPES[dtype]))

    sides = [like(full, dtype) for dtype in epilogue.sides]
    vectors = [
        like(() if v.scalar else (problem.channels,), v.dtype) for v in epilogue.vectors
    ]

    def plainly(a: Any, b: Any, *rest: Any) -> list[Any]:
        values = evaluate.as_programs_do(
            region_as_read, a, b, rest[: len(sides)], rest[len(sides) :]
        )
        return [
            jnp.reshape(value, out).astype(JAX_DTYPES[output.dtype])
            for value, output in zip(values, epilogue.outputs, strict=True)
        ]

    operands = [like(lhs, problem.dtype), like(rhs, problem.dtype), *sides, *vectors]
    return SiteInfo(
        region=region,
        reference=jax.make_jaxpr(plainly)(*operands),
        operands=tuple(range(len(operands))),
        name=name,
        label=problem.text,
        line="",
        root=root,
        views=(None,) * len(operands),
        result=None,
    )
