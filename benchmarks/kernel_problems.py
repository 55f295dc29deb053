# SPDX-License-Identifier: Apache-2.0
"""The convs and products that ``bench_kernels.py`` measures, with their epilogues.

Those of the benchmark models are the regions jax_bolt finds in them; those of BERT
are its four products per layer. Everything here works on shapes, without a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_bolt._src import forms, ir, options, plan, program
from jax_bolt._src.arch import GpuArch
from jax_bolt._src.primitive import SiteInfo

from . import floor
from .models import models

# name -> hidden size; rows are batch 32 of 40 tokens (Bolt, fig. 8a), and 4096.
BERTS = {"bert_base": 768, "bert_large": 1024}
BERT_ROWS = (1280, 4096)
NAMES = (*models.MEASURED, *BERTS)

CONV3X3, STEM, OTHER = "3x3 conv", "stem", "other"
COMPUTE, MEMORY = "1x1/GEMM, compute-bound", "1x1/GEMM, memory-bound"
CLASSES = (CONV3X3, COMPUTE, MEMORY, STEM, OTHER)
_STEM_CHANNELS = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A distinct region; ``batch`` is None where the model has none.

    ``where`` counts the sites that have it, by model.
    """

    site: SiteInfo
    batch: int | None
    where: dict[str, int]

    @property
    def region(self) -> ir.Region:
        return self.site.region

    @property
    def label(self) -> str:
        """The site's; a gelu written out in erf, which it leaves out, is named."""
        erf = any(op.name in ("erf", "erfc") for op in self.region.epilogue.ops)
        named = not erf or "gelu" in self.site.label
        return self.site.label if named else f"{self.site.label}+erf"

    @property
    def text(self) -> str:
        """What ``--only`` searches."""
        problem = self.region.problem
        return f"{problem.text} {short(problem)} {self.label}"


def collect(
    names: Sequence[str], batches: Sequence[int], image: int, dtype: Any
) -> list[Problem]:
    """Every distinct region of the models ``names``, in order of appearance."""
    found: dict[str, Problem] = {}
    for name in names:
        for batch in [None] if name in BERTS else batches:
            for site in _sites(name, batch, image, dtype):
                new = Problem(site=site, batch=batch, where={})
                where = found.setdefault(site.region.text, new).where
                where[name] = where.get(name, 0) + 1
    return list(found.values())


def candidates(
    problem: Problem, arch: GpuArch, disable: tuple[str, ...], quick: bool = False
) -> list[plan.Candidate]:
    """The likeliest of ``plan.candidates``, superseded ones included.

    ``quick`` takes two of each template and form.
    """
    found, _ = plan.candidates(problem.region, arch, disable, superseded=True)
    if not quick:
        return plan.likeliest(found)
    groups: dict[tuple[str, str], list[plan.Candidate]] = {}
    for candidate in found:
        key = (candidate.template.name, candidate.form.name)
        groups.setdefault(key, []).append(candidate)
    return [candidate for group in groups.values() for candidate in group[:2]]


def root(region: ir.Region) -> floor.Root:
    """The region as a root of the floor, side inputs and the real output included."""
    (bare,) = floor.of_problems([region.problem])
    epilogue = region.epilogue
    items = sum(ir.ITEM_BYTES[d] for d in (epilogue.out_dtype, *epilogue.sides))
    items -= ir.ITEM_BYTES[region.problem.dtype]
    outputs = region.problem.rows * region.problem.channels
    return dataclasses.replace(bare, bytes=bare.bytes + outputs * items)


def is_memory_bound(found: floor.Root, ceilings: floor.Ceilings) -> bool:
    return found.bytes / ceilings.bandwidth > found.flops / ceilings.flops


def classify(region: ir.Region, ceilings: floor.Ceilings) -> str:
    """Which of ``CLASSES`` the region belongs to."""
    problem = region.problem
    if isinstance(problem, ir.ConvProblem) and (problem.r, problem.s) != (1, 1):
        if problem.c <= _STEM_CHANNELS:
            return STEM
        return CONV3X3 if (problem.r, problem.s) == (3, 3) else OTHER
    return MEMORY if is_memory_bound(root(region), ceilings) else COMPUTE


def short(problem: ir.Problem) -> str:
    """``32x56x56 64>128 3x3 s2`` or ``1280x2304x768 row,row`` (M, N, K)."""
    p = problem
    if isinstance(p, ir.GemmProblem):
        batch = f"{p.batch}x" if p.batch > 1 else ""
        return f"{batch}{p.m}x{p.n}x{p.k} {p.a_layout},{p.b_layout}"
    stride = str(p.stride[0])
    if p.stride[0] != p.stride[1]:
        stride = "x".join(map(str, p.stride))
    dilation = f" d{p.dilation[0]}x{p.dilation[1]}" if p.dilation != (1, 1) else ""
    return f"{p.n}x{p.h}x{p.w} {p.c}>{p.k} {p.r}x{p.s} s{stride}{dilation}"


def moves_input(site: SiteInfo, form: str) -> bool:
    """Whether ``form`` rearranges the left operand, the activations.

    A filter can be rearranged once and for all, activations only at every call.
    """
    lhs, rhs = (site.in_avals[i] for i in site.operands[:2])
    like = ((aval.shape, aval.dtype) for aval in (lhs, rhs))
    return not forms.only_views(form, site.region.problem, *like)


def _sites(name: str, batch: int | None, image: int, dtype: Any) -> Iterator[SiteInfo]:
    if batch is not None:
        apply, variables, x = models.shapes(name, batch, image, dtype)
        yield from _traced(apply, variables, x)
        return
    for rows in BERT_ROWS:
        for fun, args in _products(BERTS[name], rows, dtype):
            yield from _traced(fun, *args)


def _traced(fun: Callable, *args: Any) -> list[SiteInfo]:
    rewritten, _ = program.trace(fun, (), args, {}, options.Options())
    return rewritten.family.sites


def _products(
    hidden: int, rows: int, dtype: Any
) -> list[tuple[Callable, tuple[Any, ...]]]:
    """QKV, output projection, and the two products of the feed-forward block."""

    def dense(x: Any, w: Any, b: Any) -> Any:
        return x @ w + b.reshape(1, -1)

    def dense_gelu(x: Any, w: Any, b: Any) -> Any:
        return jax.nn.gelu(dense(x, w, b), approximate=False)

    def dense_residual(x: Any, w: Any, b: Any, residual: Any) -> Any:
        return dense(x, w, b) + residual

    def args(k: int, n: int, *more: Any) -> tuple[Any, ...]:
        return like(rows, k), like(k, n), like(n), *more

    def like(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    residual = like(rows, hidden)
    return [
        (dense, args(hidden, 3 * hidden)),
        (dense_residual, args(hidden, hidden, residual)),
        (dense_gelu, args(hidden, 4 * hidden)),
        (dense_residual, args(4 * hidden, hidden, residual)),
    ]
