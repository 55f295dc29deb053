# SPDX-License-Identifier: Apache-2.0
"""Root equations → problems: which convs and matrix products a region may start from.

Each refusal is a sentence a user can read in ``explain``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ir
from .compat import JaxprEqn, Literal, aval_of
from .frame import Frame
from .views import Both, Permutation, PhaseFilter, Phases, View, transposition

ROOTS = ("conv_general_dilated", "dot_general")
_FLOATS: dict[str, ir.DType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
# Algorithms (jax.lax.DotAlgorithmPreset) that an f32 accumulator satisfies.
_ALGORITHMS = {
    "bf16": ("DEFAULT", "BF16_BF16_F32", "ANY_F8_ANY_F8_F32"),
    "f16": ("DEFAULT", "F16_F16_F32", "F16_F16_F16"),
    "f32": ("DEFAULT", "TF32_TF32_F32"),
}


class Refused(Exception):
    """Why a root stays with XLA."""


@dataclasses.dataclass(frozen=True, slots=True)
class Root:
    """A problem, and how the equation's operands and result lie for it.

    ``lhs`` and ``rhs`` rearrange the operands where they do not lie as kernels take
    them. ``operands`` are their positions in the equation.
    """

    problem: ir.Problem
    label: str
    frame: Frame
    lhs: View | None = None
    rhs: View | None = None
    operands: tuple[int, int] = (0, 1)

    @property
    def shares_layout(self) -> bool:
        """Whether full tensors beside the result are likely to lie as it does.

        As in a model that is written in NCHW: what rearranges them cancels.
        """
        is_conv = isinstance(self.problem, ir.ConvProblem)
        return is_conv and self.frame.is_transposition


def read_root(eqn: JaxprEqn) -> tuple[Root, ...]:
    """The problem of a conv or dot equation, in one or two ways.

    The product of a transposed result is the second one: which of the operands has the
    channels is for what reads the result to say.

    Raises:
      Refused: with the reason, when no region can start here.
    """
    where = getattr(eqn.ctx, "compute_type", None)
    if where:
        raise Refused(f"placed by compute_on({where!r})")
    if any(isinstance(v, Literal) for v in eqn.invars):
        raise Refused("an operand is a literal of the program")
    dtype = _operand_dtype(eqn)
    shapes = [tuple(aval_of(v).shape) for v in (*eqn.invars, *eqn.outvars)]
    if not all(isinstance(d, int) for shape in shapes for d in shape):
        raise Refused("shapes are symbolic; kernels are chosen for fixed shapes")
    if any(d == 0 for shape in shapes for d in shape):
        raise Refused("a dimension is zero")
    if eqn.primitive.name == "dot_general":
        roots: tuple[Root, ...] = (
            _read_dot(eqn, dtype),
            _read_dot(eqn, dtype, swapped=True),
        )
    else:
        roots = (_read_conv(eqn, dtype),)
    for root in roots:
        _check_precision(eqn, root.problem)
    return roots


def _operand_dtype(eqn: JaxprEqn) -> ir.DType:
    lhs, rhs = (np.dtype(aval_of(v).dtype).name for v in eqn.invars)
    out = np.dtype(aval_of(eqn.outvars[0]).dtype).name
    if lhs != rhs:
        raise Refused(f"operands of different dtypes ({lhs}, {rhs})")
    for name in (lhs, out):
        if name not in _FLOATS:
            raise Refused(f"dtype {name}: kernels take bfloat16, float16 and float32")
    return _FLOATS[lhs]


def _check_precision(eqn: JaxprEqn, problem: ir.Problem) -> None:
    precision = eqn.params.get("precision")
    if precision is None:
        return
    dtype = problem.dtype
    # Depthwise kernels have no tensor cores, and so no TF32.
    exact = isinstance(problem, ir.ConvProblem) and problem.is_depthwise
    for item in precision if isinstance(precision, tuple) else (precision,):
        name = getattr(item, "name", str(item))
        if name in ("HIGH", "HIGHEST"):
            if dtype == "f32" and not exact:
                raise Refused(f"precision={name} asks for more than TF32 on float32")
        elif name not in _ALGORITHMS[dtype]:
            raise Refused(f"precision {name} is not what the kernels compute")


def _read_dot(eqn: JaxprEqn, dtype: ir.DType, swapped: bool = False) -> Root:
    """``swapped``: the kernel's rows are the right operand's, its channels the left's.

    Then the result is the user's transposed.
    """
    contract, batch = eqn.params["dimension_numbers"]
    if not contract[0]:
        raise Refused("an outer product: nothing is contracted")
    operands = (1, 0) if swapped else (0, 1)
    shapes = [tuple(aval_of(v).shape) for v in eqn.invars]
    free = [
        [i for i in range(len(shape)) if i not in (*contract[side], *batch[side])]
        for side, shape in enumerate(shapes)
    ]
    # Both contract in one order; better one in which neither has to be rearranged.
    pairs = [tuple(pair[i] for i in operands) for pair in zip(*contract, strict=True)]
    a, b = min(
        (
            [
                _matrix(
                    shapes[i],
                    batch[i],
                    free[i],
                    [pair[side] for pair in ordered],
                    # Tensor cores read half precision either way, of the right operand.
                    may_turn=side == 1 and dtype != "f32",
                )
                for side, i in enumerate(operands)
            ]
            for ordered in (sorted(pairs), sorted(pairs, key=lambda pair: pair[1]))
        ),
        key=lambda matrices: sum(view is not None for _, view in matrices),
    )
    first, second = (_size(shapes[i], free[i]) for i in operands)
    problem = ir.GemmProblem(
        m=first,
        n=second,
        k=_size(shapes[0], contract[0]),
        batch=_size(shapes[0], batch[0]),
        dtype=dtype,
        a_layout="row" if a[0] else "col",
        b_layout="col" if b[0] else "row",
    )
    axes = iter(range(len(batch[0]) + len(free[0]) + len(free[1])))
    parts = [[next(axes) for _ in part] for part in (batch[0], *free)]
    order = (*parts[0], *parts[1 + operands[0]], *parts[1 + operands[1]])
    shape = tuple(aval_of(eqn.outvars[0]).shape)
    frame = Frame.of(shape, order, len(free[operands[1]]))
    return Root(problem, "dot", frame, a[1], b[1], operands)


def _size(shape: Sequence[int], axes: Sequence[int]) -> int:
    return math.prod(shape[i] for i in axes)


def _matrix(
    shape: Sequence[int],
    batch: Sequence[int],
    free: Sequence[int],
    contract: Sequence[int],
    may_turn: bool,
) -> tuple[bool, View | None]:
    """Whether an operand's free dimensions come before those it contracts.

    And what puts the batch first, and the others behind it in that order, where they do
    not lie so: preferably such that what is innermost stays there.
    """
    view = transposition(shape, (*batch, *free, *contract))
    turned = transposition(shape, (*batch, *contract, *free))
    if view is None or turned is None:
        return view is None, None
    if may_turn and free and max(free) == len(shape) - 1:
        return False, turned
    return True, view


@dataclasses.dataclass(frozen=True, slots=True)
class _Axis:
    """One spatial axis of a conv; ``zeros`` is the dilation of its input."""

    size: int = 1
    taps: int = 1
    before: int = 0
    after: int = 0
    stride: int = 1
    dilation: int = 1
    zeros: int = 1

    @property
    def is_batch(self) -> bool:
        """Whether each place is by itself."""
        return dataclasses.replace(self, size=1, dilation=1) == _Axis()

    @property
    def outputs(self) -> int:
        reach = self.dilation * (self.taps - 1) + 1
        size = self.zeros * (self.size - 1) + 1
        return (size + self.before + self.after - reach) // self.stride + 1


def _read_conv(eqn: JaxprEqn, dtype: ir.DType) -> Root:
    p = eqn.params
    if p["batch_group_count"] != 1:
        raise Refused(f"batch_group_count={p['batch_group_count']}")
    if any(int(n) < 0 for pair in p["padding"] for n in pair):
        raise Refused(f"negative padding {p['padding']}")
    shapes = [tuple(aval_of(v).shape) for v in (*eqn.invars, *eqn.outvars)]
    orders = _orders(p["dimension_numbers"])
    x, w, out = (
        tuple(shape[axis] for axis in order)
        for shape, order in zip(shapes, orders, strict=True)
    )
    groups = int(p["feature_group_count"])
    space = _space(p, x[1:-1], w[:-2])
    batch = x[0] * math.prod(axis.size for axis in space[:-2])
    down, right = space[-2:]
    lhs, rhs = (transposition(shapes[i], orders[i]) for i in (0, 1))
    frame = Frame.of(shapes[2], orders[2], 1)
    label = "conv" if groups == 1 else "depthwise" if w[-2] == 1 else "grouped"
    if (down.zeros, right.zeros) != (1, 1):
        if groups > 1:
            raise Refused(f"feature_group_count={groups}: transposed conv in groups")
        label = "conv_transpose"
        filters = _phases(w, down, right)
        frame = _frame_of_phases(shapes[2], orders[2], filters)
        rhs = filters if rhs is None else Both(rhs, filters)
        down = _of_phases(down, filters.down)
        right = _of_phases(right, filters.right)
    problem = ir.ConvProblem(
        n=batch,
        h=down.size,
        w=right.size,
        c=x[-1],
        k=w[-1] * frame.repeats,
        r=down.taps,
        s=right.taps,
        stride=(down.stride, right.stride),
        padding=(down.before, down.after, right.before, right.after),
        dilation=(down.dilation, right.dilation),
        dtype=dtype,
        groups=groups,
    )
    if problem.rows * problem.k != math.prod(out):
        raise Refused(f"the result's shape {out} is not that of the problem")
    label += "x".join(map(str, w[:-2]))
    return Root(problem, label, frame, lhs, rhs)


def _orders(numbers: Any) -> tuple[Permutation, Permutation, Permutation]:
    """What transposes input, filter and result to NHWC, HWIO and NHWC."""
    batch, features, *space = numbers.lhs_spec
    outputs, inputs, *taps = numbers.rhs_spec
    rows, channels, *places = numbers.out_spec
    return (
        (batch, *space, features),
        (*taps, inputs, outputs),
        (rows, *places, channels),
    )


def _space(p: Any, sizes: Sequence[int], taps: Sequence[int]) -> list[_Axis]:
    """The spatial axes: any that are a batch, then the two of the problem."""
    axes = [
        _Axis(size, taps, *map(int, pads), *map(int, steps))
        for size, taps, pads, *steps in zip(
            sizes,
            taps,
            p["padding"],
            *(p[n] for n in ("window_strides", "rhs_dilation", "lhs_dilation")),
            strict=True,
        )
    ]
    if not all(axis.is_batch for axis in axes[:-2]):
        raise Refused(f"a {len(axes)}-D conv: kernels are 2-D")
    # Kernels take images of any height, but not of any width.
    return [*axes, *(_Axis() for _ in range(2 - len(axes)))]


# Of its products a plain conv that stands for a transposed one may have three times as
# many: 2.25 for 4x4 taps and stride 2, 1.8 for 3x3.
_MAX_PHASE_WORK = 3


def _phases(w: Sequence[int], down: _Axis, right: _Axis) -> PhaseFilter:
    where = f"lhs_dilation={(down.zeros, right.zeros)}"
    for axis in (down, right):
        if (axis.stride, axis.dilation) != (1, 1):
            raise Refused(f"{where}: transposed conv with a stride or a dilation, too")
        if axis.outputs % axis.zeros:
            raise Refused(f"{where}: {axis.outputs} results are no multiple of that")
    axes = [Phases.of(axis.zeros, axis.taps, axis.before) for axis in (down, right)]
    work = math.prod(phases.stride * phases.taps / phases.size for phases in axes)
    if work > _MAX_PHASE_WORK:
        raise Refused(
            f"{where}: transposed conv that has {work:.3g} times the products as a "
            "plain one"
        )
    return PhaseFilter(tuple(w), axes[0], axes[1])


def _of_phases(axis: _Axis, phases: Phases) -> _Axis:
    """The axis of the plain conv."""
    blocks = axis.outputs // axis.zeros
    after = blocks - axis.size - phases.lead + phases.taps - 1
    if after < 0:
        raise Refused("transposed conv that does not read all of its input")
    return _Axis(axis.size, phases.taps, phases.lead, after)


def _frame_of_phases(
    shape: tuple[int, ...], order: Permutation, filters: PhaseFilter
) -> Frame:
    """Results next to each other are channels of one pixel, by phase."""
    strides = [1] * len(shape)
    for axis, phases in zip(order[1:-1][-2:], filters.axes, strict=False):
        strides[axis] = phases.stride
    pixels = [n for size, s in zip(shape, strides, strict=True) for n in (size // s, s)]
    rows, channels = order[:-1], order[-1]
    places = (*(2 * a for a in rows), *(2 * a + 1 for a in rows), 2 * channels)
    frame = Frame.of(tuple(pixels), places, 1).reshaped(shape)
    assert frame is not None  # the pixels are its factors
    return dataclasses.replace(frame, repeats=math.prod(strides))
