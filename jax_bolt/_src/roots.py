# SPDX-License-Identifier: Apache-2.0
"""Root equations → problems: which convs and matrix products a region may start from.

Each refusal is a sentence a user can read in ``explain``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from . import ir
from .compat import JaxprEqn, Literal, aval_of
from .layout import Layout

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
    """A problem and how many trailing axes of the result are its channels.

    ``layout`` is None where the operands and the result lie as the kernels take them;
    else the channels are where it says.
    """

    problem: ir.Problem
    channel_axes: int
    label: str
    layout: Layout | None = None


def read_root(eqn: JaxprEqn) -> Root:
    """The problem of a conv or dot equation.

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
        root = _read_dot(eqn, dtype)
    else:
        root = _read_conv(eqn, dtype)
    _check_precision(eqn, root.problem)
    return root


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


def _read_dot(eqn: JaxprEqn, dtype: ir.DType) -> Root:
    (contract_l, contract_r), (batch_l, batch_r) = eqn.params["dimension_numbers"]
    lhs, rhs = (tuple(aval_of(v).shape) for v in eqn.invars)
    batch_axes = tuple(range(len(batch_l)))
    if tuple(batch_l) != batch_axes or tuple(batch_r) != batch_axes:
        raise Refused("batch dimensions are not the leading ones of both operands")
    if not contract_l:
        raise Refused("an outer product: nothing is contracted")
    order = sorted(range(len(contract_l)), key=lambda i: contract_l[i])
    contract_l = [contract_l[i] for i in order]
    contract_r = [contract_r[i] for i in order]
    if contract_r != sorted(contract_r):
        raise Refused("the operands contract their dimensions in different orders")
    free_l = _free(lhs, contract_l, batch_axes)
    free_r = _free(rhs, contract_r, batch_axes)
    k = _size(lhs, contract_l)
    problem = ir.GemmProblem(
        m=_size(lhs, free_l),
        n=_size(rhs, free_r),
        k=k,
        batch=_size(lhs, batch_axes),
        dtype=dtype,
        a_layout=_layout(lhs, free_l, contract_l, "left"),
        b_layout=_layout(rhs, contract_r, free_r, "right"),
    )
    return Root(problem, len(free_r), "dot")


def _free(shape, contract, batch) -> list[int]:
    return [i for i in range(len(shape)) if i not in contract and i not in batch]


def _size(shape, axes) -> int:
    return math.prod(shape[i] for i in axes)


def _layout(shape, first, second, which: str) -> ir.Layout:
    """ "row" if the axes ``first`` all come before ``second``, "col" if after.

    Axes of size 1 may stand anywhere.
    """
    first = [i for i in first if shape[i] > 1]
    second = [i for i in second if shape[i] > 1]
    if not first or not second or max(first) < min(second):
        return "row"
    if max(second) < min(first):
        return "col"
    raise Refused(f"the {which} operand's free and contracted dimensions interleave")


def _read_conv(eqn: JaxprEqn, dtype: ir.DType) -> Root:
    p = eqn.params
    rank = len(aval_of(eqn.invars[0]).shape)
    if rank != 4:
        raise Refused(f"a {rank - 2}-D conv: kernels are 2-D")
    layout = Layout.of(p["dimension_numbers"])
    x, w, out = (
        tuple(aval_of(v).shape[axis] for axis in axes)
        for v, axes in zip(
            (*eqn.invars, *eqn.outvars),
            (layout.lhs, layout.rhs, layout.out),
            strict=True,
        )
    )
    if p["batch_group_count"] != 1:
        raise Refused(f"batch_group_count={p['batch_group_count']}")
    groups = int(p["feature_group_count"])
    if groups not in (1, x[3]):
        raise Refused(
            f"feature_group_count={groups}, {w[2]} input channels each: grouped, but "
            "not depthwise"
        )
    if tuple(p["lhs_dilation"]) != (1, 1):
        raise Refused(f"lhs_dilation={tuple(p['lhs_dilation'])}: transposed conv")
    (top, bottom), (left, right) = (tuple(map(int, pair)) for pair in p["padding"])
    if min(top, bottom, left, right) < 0:
        raise Refused(f"negative padding {p['padding']}")
    problem = ir.ConvProblem(
        n=x[0],
        h=x[1],
        w=x[2],
        c=x[3],
        k=w[3],
        r=w[0],
        s=w[1],
        stride=_pair(p["window_strides"]),
        padding=(top, bottom, left, right),
        dilation=_pair(p["rhs_dilation"]),
        dtype=dtype,
        groups=groups,
    )
    if (problem.n, problem.p, problem.q, problem.k) != out:
        raise Refused(f"the result's shape {out} is not that of the problem")
    name = "depthwise" if problem.is_depthwise else "conv"
    label = f"{name}{problem.r}x{problem.s}"
    return Root(problem, 1, label, None if layout.is_ours else layout)


def _pair(values: Any) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
