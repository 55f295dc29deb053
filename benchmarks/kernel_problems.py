# SPDX-License-Identifier: Apache-2.0
"""The convs and products that ``bench_kernels.py`` measures, with their epilogues.

Those of the benchmark models are the regions jax_bolt finds in them; those of BERT
are its four products per layer, and of the models with convs in groups these alone.
Everything here works on shapes, without a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_bolt._src import forms, ir, options, plan, program
from jax_bolt._src.arch import GpuArch
from jax_bolt._src.primitive import SiteInfo

from . import floor
from .models import models

# name -> hidden size; rows are batch 32 of 40 tokens (Bolt, fig. 8a), and 4096.
BERTS = {"bert_base": 768, "bert_large": 1024}
BERT_ROWS = (1280, 4096)
# name -> convs in groups: pixels per side (of a 224x224 image), channels, taps per
# side, stride and, where they are not depthwise, groups. _EPILOGUES has the rest.
_LAYERS = {
    "convnext_t_depthwise": "56 96 7 1, 28 192 7 1, 14 384 7 1, 7 768 7 1",
    "mobilenet_v2_depthwise": "112 32 3 1, 112 96 3 2, 56 144 3 1, 56 144 3 2, "
    "28 192 3 1, 28 192 3 2, 14 384 3 1, 14 576 3 1, 14 576 3 2, 7 960 3 1",
    "efficientnet_b0_depthwise": "56 144 5 2, 28 240 5 1, 28 240 3 2, 14 480 3 1, "
    "14 480 5 1, 14 672 5 1, 14 672 5 2, 7 1152 5 1, 7 1152 3 1",
    "resnext50_grouped": "56 128 3 1 32, 56 256 3 2 32, 28 256 3 1 32, 28 512 3 2 32, "
    "14 512 3 1 32, 14 1024 3 2 32, 7 1024 3 1 32",
}
GROUPED = {
    name: tuple(tuple(map(int, layer.split())) for layer in layers.split(","))
    for name, layers in _LAYERS.items()
}
NAMES = (*models.MEASURED, *BERTS, *GROUPED)

CONV3X3, STEM, OTHER = "3x3 conv", "stem", "other"
DEPTHWISE_CONV, GROUPED_CONV = "depthwise conv", "grouped conv"
COMPUTE, MEMORY = "1x1/GEMM, compute-bound", "1x1/GEMM, memory-bound"
CLASSES = (CONV3X3, COMPUTE, MEMORY, STEM, DEPTHWISE_CONV, GROUPED_CONV, OTHER)
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

    Those for a part of the region are left out, since kernels are timed alone here.
    ``quick`` takes two of each template and form.
    """
    found, _ = plan.candidates(problem.region, arch, disable, superseded=True)
    found = [candidate for candidate in found if not candidate.form.ends_on_xla]
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
    items = sum(ir.ITEM_BYTES[d] for d in epilogue.tensors)
    items -= ir.ITEM_BYTES[region.problem.dtype]
    outputs = region.problem.rows * region.problem.channels
    return dataclasses.replace(bare, bytes=bare.bytes + outputs * items)


def is_memory_bound(found: floor.Root, ceilings: floor.Ceilings) -> bool:
    return found.bytes / ceilings.bandwidth > found.flops / ceilings.flops


def classify(region: ir.Region, ceilings: floor.Ceilings) -> str:
    """Which of ``CLASSES`` the region belongs to."""
    problem = region.problem
    if isinstance(problem, ir.ConvProblem) and problem.groups > 1:
        return DEPTHWISE_CONV if problem.is_depthwise else GROUPED_CONV
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
    groups = f" g{p.groups}" if p.groups > 1 else ""
    return f"{p.n}x{p.h}x{p.w} {p.c}>{p.k} {p.r}x{p.s} s{stride}{dilation}{groups}"


def moves_input(site: SiteInfo, form: str) -> bool:
    """Whether ``form`` rearranges the left operand, the activations.

    A filter can be rearranged once and for all, activations only at every call.
    """
    lhs = site.in_avals[site.operands[0]]
    like = lhs.shape, lhs.dtype
    return not forms.only_views(form, site.region.problem, *like, right=False)


def _sites(name: str, batch: int | None, image: int, dtype: Any) -> Iterator[SiteInfo]:
    if name in GROUPED:
        for fun, args in _in_groups(name, batch or 1, image, dtype):
            yield from _traced(fun, *args)
        return
    if batch is not None:
        apply, variables, x = models.shapes(name, batch, image, dtype)
        yield from _traced(apply, variables, x)
        return
    for rows in BERT_ROWS:
        for fun, args in _products(BERTS[name], rows, dtype):
            yield from _traced(fun, *args)


def _traced(fun: Callable, *args: Any) -> list[SiteInfo]:
    # Pools apart: what a conv is compared with, a library's and a floor, has none.
    apart = options.Options(disable=("pool",))
    rewritten, _ = program.trace(fun, (), args, {}, apart)
    return rewritten.family.sites


# BatchNorm and an activation; a bias where there is none.
_EPILOGUES: dict[str, Callable | None] = {
    "convnext_t_depthwise": None,
    "mobilenet_v2_depthwise": jax.nn.relu6,
    "efficientnet_b0_depthwise": jax.nn.silu,
    "resnext50_grouped": jax.nn.relu,
}


def _in_groups(
    name: str, batch: int, image: int, dtype: Any
) -> Iterator[tuple[Callable, tuple[Any, ...]]]:
    for side, channels, taps, stride, *groups in GROUPED[name]:
        count = groups[0] if groups else channels
        size = max(1, side * image // 224)
        x = jax.ShapeDtypeStruct((batch, size, size, channels), jnp.dtype(dtype))
        w = jax.ShapeDtypeStruct((taps, taps, channels // count, channels), x.dtype)
        vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
        conv, activation = _grouped_conv(taps, stride), _EPILOGUES[name]
        if activation is None:
            yield _with_bias(conv), (x, w, vector)
        else:
            yield _with_norm(conv, activation), (x, w, *(vector,) * 4)


def _grouped_conv(taps: int, stride: int) -> Callable:
    padding = ((taps // 2, taps // 2),) * 2

    def conv(x: Any, w: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[3] // w.shape[2],
        )

    return conv


def _with_bias(conv: Callable) -> Callable:
    def fun(x: Any, w: Any, bias: Any) -> Any:
        return conv(x, w) + bias.reshape(1, 1, 1, -1).astype(x.dtype)

    return fun


def _with_norm(conv: Callable, activation: Callable) -> Callable:
    """Inference BatchNorm as Flax computes it, and an activation."""

    def fun(x: Any, w: Any, *stats: Any) -> Any:
        mean, var, scale, offset = (v.reshape(1, 1, 1, -1) for v in stats)
        wide = conv(x, w).astype(jnp.float32) - mean
        wide = wide * (lax.rsqrt(var + 1e-5) * scale) + offset
        return activation(wide.astype(x.dtype))

    return fun


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
