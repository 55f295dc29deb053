# SPDX-License-Identifier: Apache-2.0
"""The ways a region's operands can be put before a kernel.

A *form* is a region equal to the user's, with its operands rearranged by a few XLA
operations: filters packed from HWIO to KRSC, channels padded to what tensor cores
load at once (Bolt, section 3.2.3), a 1x1 conv as a matrix product, an RGB stem in
its exact space-to-depth form, groups merged until they are as wide as a product. Their
cost is part of what tuning measures; so is that of what XLA does after a kernel for
only a ``part`` of a region with two outputs, or for all of a region but its pool.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import ir, part
from .part import Part

_THEN_XLA = "+xla"  # at the end of the name of a form with a part


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
    """A name, and the region a kernel runs in this form.

    With a ``part``, that ends at the auxiliary output, and XLA computes the rest. With
    a ``pool`` it ends before that, and XLA pools.
    """

    name: str
    region: ir.Region
    part: Part | None = None
    pool: ir.Pool | None = None

    @property
    def ends_on_xla(self) -> bool:
        return self.part is not None or self.pool is not None

    @property
    def left_to_xla(self) -> str:
        """What XLA computes, for a reader; "" where the kernel does all of it."""
        if self.pool is not None:
            return "the mean" if self.pool.is_mean else "the pooling"
        return "" if self.part is None else "what follows the auxiliary output"


@dataclasses.dataclass(frozen=True, slots=True)
class ChainForm:
    """The forms of all regions, and the chain that a kernel runs in them."""

    first: Form | ChainForm
    second: Form
    region: ir.Chain

    @property
    def forms(self) -> tuple[Form, ...]:
        """In the order of the chain's regions."""
        first = self.first
        return (
            *(first.forms if isinstance(first, ChainForm) else (first,)),
            self.second,
        )

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.second.name}"

    @property
    def part(self) -> None:
        """A chain's kernel computes all of it."""

    @property
    def pool(self) -> None:
        """As ``part``."""

    @property
    def ends_on_xla(self) -> bool:
        return False


def chain_forms(chain: ir.Chain) -> tuple[ChainForm, ...]:
    """Every form of ``chain``, the plainest first.

    Its second region takes what the first makes as it lies.
    """
    found: list[ChainForm] = []
    inner = chain.first
    firsts = chain_forms(inner) if isinstance(inner, ir.Chain) else forms(inner)
    for first in firsts:
        for second in forms(chain.second):
            with contextlib.suppress(ValueError):  # padded channels are not made
                region = dataclasses.replace(
                    chain, first=first.region, second=second.region
                )
                found.append(ChainForm(first, second, region))
    return tuple(found)


def forms(region: ir.Region) -> tuple[Form, ...]:
    """Every form of ``region``, the plainest first, and those that XLA ends last."""
    if region.pool is not None:
        return _pooled_forms(region, region.pool)
    made = [_form(region, name) for name in _names(region.problem)]
    leading = part.of(region.epilogue)
    if leading is not None:
        made += [
            Form(
                whole.name + _THEN_XLA,
                dataclasses.replace(whole.region, epilogue=leading.epilogue),
                leading,
            )
            for whole in made
        ]
    return tuple(made)


def _pooled_forms(region: ir.Region, pool: ir.Pool) -> tuple[Form, ...]:
    names = _names(region.problem)
    # A product has no rows and columns to pool.
    inside = [name for name in names if name in _CONVS]
    if not inside and region.problem.dtype == "f32":
        inside.append("krsc")  # as TF32 tensor cores read it
    elif not inside and region.problem.channels % _unit(region.problem) == 0:
        inside.append("hwio")
    apart = dataclasses.replace(region, pool=None)
    return (
        *(_form(region, name) for name in inside),
        *(
            Form(name + _THEN_XLA, _form(apart, name).region, pool=pool)
            for name in names
        ),
    )


def _form(region: ir.Region, name: str) -> Form:
    problem = _FORMS[name][0](region.problem)
    return Form(name, dataclasses.replace(region, problem=problem))


def _names(problem: ir.Problem) -> list[str]:
    """Of the forms that ``problem`` has, the plainest first."""
    names: list[str] = []
    if isinstance(problem, ir.GemmProblem):
        names.append("direct")
        if _wants_k_major(problem):
            names.append("k_major")
    elif problem.is_gemm:
        names.append("pixels")
        if _wants_k_major(_as_gemm(problem)):
            names.append("pixels_k_major")
    elif problem.groups > 1:
        names.append("hwio")
        if _merged(problem) > 1:
            names.append("merged_groups")
    else:
        if _fits_space_to_depth(problem):
            names.append("space_to_depth")
        if problem.k % _unit(problem) == 0:
            names.append("hwio")
        if (problem.r, problem.s, *problem.padding) == (1, 1, 0, 0, 0, 0):
            names.append("strided_pixels")
        names.append("krsc")
    return names


def form(region: ir.Region, name: str) -> Form | None:
    """The form of that name, or None where ``region`` has no such form."""
    return next((f for f in forms(region) if f.name == name), None)


@dataclasses.dataclass(frozen=True, slots=True)
class Ready:
    """A right operand as the user has it, and as some form wants it."""

    given: jax.Array
    made: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.given.shape

    @property
    def dtype(self) -> Any:
        return self.given.dtype


def whole(name: str) -> str:
    """The name of a form, or of the one that it is a part of."""
    return name.removesuffix(_THEN_XLA)


def prepare(
    name: str, problem: ir.Problem, lhs: jax.Array, rhs: jax.Array | Ready
) -> tuple[jax.Array, jax.Array]:
    """The operands a kernel reads, from the user's.

    Args:
      name: a form's name.
      problem: the user's problem (not the form's).
      lhs, rhs: the root's operands, in the user's shapes; the right one may be ready
        for this form.
    """
    _, left, _ = _FORMS[whole(name)]
    return left(problem, lhs), prepare_right(name, problem, rhs)


def prepare_right(name: str, problem: ir.Problem, rhs: jax.Array | Ready) -> jax.Array:
    """As ``prepare``, of the right operand alone."""
    _, _, right = _FORMS[whole(name)]
    return rhs.made if isinstance(rhs, Ready) else right(problem, rhs)


@functools.lru_cache(maxsize=4096)
def only_views(
    name: str, problem: ir.Problem, shape: tuple[int, ...], dtype: Any, *, right: bool
) -> bool:
    """Whether the form takes an operand's bytes as they lie.

    Args:
      name: a form's name.
      problem: the user's problem.
      shape, dtype: the operand's.
      right: whether it is the right one.
    """
    _, *sides = _FORMS[whole(name)]
    like = jax.ShapeDtypeStruct(shape, dtype)
    jaxpr = jax.make_jaxpr(functools.partial(sides[right], problem))(like).jaxpr
    return all(eqn.primitive.name in ("reshape", "squeeze") for eqn in jaxpr.eqns)


def _unit(problem: ir.Problem) -> int:
    """Elements in 16 bytes, the widest load."""
    return 16 // ir.ITEM_BYTES[problem.dtype]


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _pad_axis(x: jax.Array, axis: int, size: int) -> jax.Array:
    if x.shape[axis] == size:
        return x
    config = [(0, 0, 0)] * x.ndim
    config[axis] = (0, size - x.shape[axis], 0)
    return lax.pad(x, jnp.zeros((), x.dtype), config)


# Matrix products --------------------------------------------------------------------


def _matrix(x: jax.Array, batch: int, layout: str, rows: int, cols: int) -> jax.Array:
    shape = (rows, cols) if layout == "row" else (cols, rows)
    return x.reshape((batch, *shape) if batch > 1 else shape)


def _direct_left(problem: ir.GemmProblem, lhs):
    p = problem
    return _matrix(lhs, p.batch, p.a_layout, p.m, p.k)


def _direct_right(problem: ir.GemmProblem, rhs):
    p = problem
    return _matrix(rhs, p.batch, p.b_layout, p.k, p.n)


def _wants_k_major(problem: ir.GemmProblem) -> bool:
    """Where a kernel may refuse the operands as they lie, or load them in pieces."""
    if problem.a_layout == "col" or problem.k % _unit(problem):
        return True
    # TF32 tensor cores read K-major operands only.
    unaligned = problem.dtype == "f32" or problem.n % _unit(problem) != 0
    return problem.b_layout == "row" and unaligned


def _k_major_problem(problem: ir.GemmProblem) -> ir.GemmProblem:
    k = _up(problem.k, _unit(problem))
    return dataclasses.replace(problem, k=k, a_layout="row", b_layout="col")


def _k_major_left(problem: ir.GemmProblem, lhs):
    """With K innermost and padded with zeros: any N, M and K align."""
    a = _direct_left(problem, lhs)
    a = a if problem.a_layout == "row" else jnp.swapaxes(a, -1, -2)
    return _pad_axis(a, a.ndim - 1, _up(problem.k, _unit(problem)))


def _k_major_right(problem: ir.GemmProblem, rhs):
    b = _direct_right(problem, rhs)
    b = b if problem.b_layout == "col" else jnp.swapaxes(b, -1, -2)
    return _pad_axis(b, b.ndim - 1, _up(problem.k, _unit(problem)))


def _as_gemm(problem: ir.ConvProblem) -> ir.GemmProblem:
    return ir.GemmProblem(
        m=problem.n * problem.h * problem.w,
        n=problem.k,
        k=problem.c,
        dtype=problem.dtype,
    )


# Convs ------------------------------------------------------------------------------


def _krsc_problem(problem: ir.ConvProblem) -> ir.ConvProblem:
    return dataclasses.replace(problem, c=_up(problem.c, _unit(problem)))


def _nhwc(problem: ir.ConvProblem, x):
    """With two spatial axes, whatever a conv of one or three has."""
    p = problem
    return x.reshape(p.n, p.h, p.w, p.c)


def _hwio(problem: ir.ConvProblem, w):
    p = problem
    return w.reshape(p.r, p.s, p.group_channels, p.k)


def _padded_nhwc(problem: ir.ConvProblem, x):
    return _pad_axis(_nhwc(problem, x), 3, _up(problem.c, _unit(problem)))


def _krsc(problem: ir.ConvProblem, w):
    krsc = jnp.transpose(_hwio(problem, w), (3, 0, 1, 2))
    return _pad_axis(krsc, 3, _up(problem.c, _unit(problem)))


def _hwio_problem(problem: ir.ConvProblem) -> ir.ConvProblem:
    return dataclasses.replace(problem, filter_layout="hwio")


_WIDEST = 64  # output channels that a kernel multiplies at once
_MOST_MERGED = 32


def _merged(problem: ir.ConvProblem) -> int:
    """How many groups make one of a multiple of 64 output channels, at the least; all
    where none do. 1 where there is nothing to gain."""
    outputs = problem.k // problem.groups
    count = _WIDEST // math.gcd(outputs, _WIDEST)
    if problem.groups % count:
        count = problem.groups
    return 1 if problem.is_depthwise or count > _MOST_MERGED else count


def _merged_problem(problem: ir.ConvProblem) -> ir.ConvProblem:
    groups = problem.groups // _merged(problem)
    return dataclasses.replace(problem, filter_layout="hwio", groups=groups)


def _merged_groups(problem: ir.ConvProblem, w):
    """Several groups as one, with zeros in the filter where one would read another's.

    So a value that is not finite spreads to the groups that are merged with its own.
    """
    p, count = problem, _merged(problem)
    inputs, outputs = p.group_channels, p.k // p.groups
    of_a_group = w.reshape(p.r, p.s, 1, inputs, p.groups // count, count, outputs)
    own = jnp.eye(count, dtype=bool)[:, None, None, :, None]
    merged = jnp.where(own, of_a_group, jnp.zeros((), w.dtype))
    return merged.reshape(p.r, p.s, count * inputs, p.k)


def _fits_space_to_depth(problem: ir.ConvProblem) -> bool:
    """Strided convs on so few channels that padding would waste most of the work."""
    unit = _unit(problem)
    return (
        problem.stride == (2, 2)
        and problem.dilation == (1, 1)
        and problem.c * 2 <= unit
        and max(problem.r, problem.s) > 1
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Fold:
    """One spatial axis of a conv of stride ``factor``, folded into a stride-1 conv.

    Tap ``t`` of output ``o`` reads input ``factor * o + t - pad``. With the padding
    rounded up to ``factor * lead`` that is phase ``(t + shift) % factor`` of block
    ``o + (t + shift) // factor - lead``, ``shift = factor * lead - pad``.
    """

    factor: int
    lead: int
    shift: int
    taps: int
    blocks: int  # of input, after cropping what no output reads
    trail: int  # zero blocks after them

    @staticmethod
    def of(factor: int, size: int, taps: int, pad: int, outputs: int) -> Fold:
        lead = -(-pad // factor)
        shift = factor * lead - pad
        folded = (taps - 1 + shift) // factor + 1
        reach = outputs + folded - 1 - lead
        blocks = min(-(-size // factor), reach)
        return Fold(factor, lead, shift, folded, blocks, reach - blocks)


def folds(problem: ir.ConvProblem) -> tuple[Fold, Fold]:
    """The vertical and the horizontal axis, folded by their strides."""
    p = problem
    return (
        Fold.of(p.stride[0], p.h, p.r, p.padding[0], p.p),
        Fold.of(p.stride[1], p.w, p.s, p.padding[2], p.q),
    )


def folded(problem: ir.ConvProblem, channels: int) -> ir.ConvProblem:
    """``problem`` as a stride-1 conv of ``channels``, its width's padding written out.

    For kernels that read several neighbours as one pixel.
    """
    fh, fw = folds(problem)
    return dataclasses.replace(
        problem,
        h=fh.blocks,
        w=fw.lead + fw.blocks + fw.trail,
        c=channels,
        r=fh.taps,
        s=fw.taps,
        stride=(1, 1),
        padding=(fh.lead, fh.trail, 0, 0),
    )


def _space_to_depth_problem(problem: ir.ConvProblem) -> ir.ConvProblem:
    return folded(problem, _up(4 * problem.c, _unit(problem)))


def _space_to_depth(problem: ir.ConvProblem, x):
    """Exact: [N, H, W, C] -> [N, H/2, W/2, 4C], with the filter's taps to match."""
    fh, fw = folds(problem)
    x = _nhwc(problem, x)
    zero = jnp.zeros((), x.dtype)
    down = (0, 2 * fh.blocks - x.shape[1], 0)
    right = (2 * fw.lead, 2 * (fw.blocks + fw.trail) - x.shape[2], 0)
    x = lax.pad(x, zero, [(0, 0, 0), down, right, (0, 0, 0)])
    width = fw.lead + fw.blocks + fw.trail
    x = x.reshape(x.shape[0], fh.blocks, 2, width, 2, problem.c)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], 4 * problem.c)
    return _pad_axis(x, 3, _up(4 * problem.c, _unit(problem)))


def _folded_filter(problem: ir.ConvProblem, w):
    fh, fw = folds(problem)
    taps = [
        (f.shift, 2 * f.taps - f.shift - n, 0)
        for f, n in ((fh, problem.r), (fw, problem.s))
    ]
    zero = jnp.zeros((), w.dtype)
    w = lax.pad(_hwio(problem, w), zero, [*taps, (0, 0, 0), (0, 0, 0)])
    w = w.reshape(fh.taps, 2, fw.taps, 2, problem.c, problem.k)
    w = w.transpose(5, 0, 2, 1, 3, 4).reshape(
        problem.k, fh.taps, fw.taps, 4 * problem.c
    )
    return _pad_axis(w, 3, _up(4 * problem.c, _unit(problem)))


def _strided_problem(problem: ir.ConvProblem) -> ir.GemmProblem:
    return dataclasses.replace(_as_gemm(problem), m=problem.rows)


def _strided_pixels(problem: ir.ConvProblem, x):
    """A strided 1x1 conv as a product over the pixels it reads, gathered first."""
    x = _nhwc(problem, x)
    x = lax.slice(x, (0,) * 4, x.shape, (1, *problem.stride, 1))
    return _direct_left(_strided_problem(problem), x)


def _pixels(prepare_gemm: Callable) -> Callable:
    return lambda problem, operand: prepare_gemm(_as_gemm(problem), operand)


_CONVS = ("hwio", "krsc", "merged_groups", "space_to_depth")  # with rows and columns
# name -> (the user's problem -> the kernel's; the left and the right operand likewise)
_FORMS: dict[str, tuple[Callable, Callable, Callable]] = {
    "direct": (lambda problem: problem, _direct_left, _direct_right),
    "k_major": (_k_major_problem, _k_major_left, _k_major_right),
    "pixels": (_as_gemm, _pixels(_direct_left), _pixels(_direct_right)),
    "pixels_k_major": (
        lambda problem: _k_major_problem(_as_gemm(problem)),
        _pixels(_k_major_left),
        _pixels(_k_major_right),
    ),
    "strided_pixels": (_strided_problem, _strided_pixels, _pixels(_direct_right)),
    "hwio": (_hwio_problem, _nhwc, _hwio),
    "krsc": (_krsc_problem, _padded_nhwc, _krsc),
    "merged_groups": (_merged_problem, _nhwc, _merged_groups),
    "space_to_depth": (_space_to_depth_problem, _space_to_depth, _folded_filter),
}
