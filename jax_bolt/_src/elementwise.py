# SPDX-License-Identifier: Apache-2.0
"""Elementwise equations as epilogue operations: one table of JAX primitives.

A primitive has a row here if every element of its result depends on the same element
of its operands alone and the epilogue language (``ir.ARITHMETIC``) can say it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax import lax

from . import ir
from .compat import JaxprEqn, Literal, aval_of, closed

DTYPES: dict[str, ir.DType] = {
    "bfloat16": "bf16",
    "float16": "f16",
    "float32": "f32",
    "bool": "bool",
}
_CALLS = ("custom_jvp_call", "custom_vjp_call", "jit", "pjit", "closed_call")
# Same value, other shape: transparent for operands that are broadcast per channel.
SHAPE_ONLY = ("broadcast_in_dim", "reshape", "squeeze", "expand_dims")

_SAME_NAME = frozenset(
    "neg abs sign floor ceil exp exp2 expm1 log log1p sqrt rsqrt cbrt sin cos tan asin "
    "acos atan sinh cosh tanh asinh acosh atanh logistic erf erfc erf_inv square add "
    "sub mul div rem max min pow atan2 clamp eq ne lt le gt ge and or xor not "
    "is_finite".split()
)

_COMMUTATIVE = frozenset("add mul max min eq ne and or xor".split())


class NotElementwise(Exception):
    """Why an equation cannot be part of an epilogue."""


class Builder:
    """Appends operations to an epilogue program, sharing equal ones."""

    def __init__(self) -> None:
        self.ops: list[ir.Op] = [ir.Op("acc")]
        self.vectors: list[ir.Vector] = []
        self.sides: list[ir.DType] = []
        # For every value, whether it is the same in all rows.
        self.per_channel: list[bool] = [False]
        self._known: dict[str, int] = {self.ops[0].text: 0}

    def op(self, name: str, *args: int, attr: float | int | None = None) -> int:
        if name in _COMMUTATIVE:
            # x + y and y + x are one kernel.
            args = tuple(sorted(args))
        op = ir.Op(name, args, attr)
        # By text: 0.0 equals -0.0 and NaN does not equal itself.
        if op.text not in self._known:
            self._known[op.text] = len(self.ops)
            self.ops.append(op)
            self.per_channel.append(op.is_per_channel(self.per_channel))
        return self._known[op.text]

    def const(self, value: Any) -> int:
        return self.op("const", attr=float(value))

    def vector(self, dtype: ir.DType, scalar: bool) -> int:
        self.vectors.append(ir.Vector(dtype, scalar))
        return self.op("vector", attr=len(self.vectors) - 1)

    def side(self, dtype: ir.DType) -> int:
        self.sides.append(dtype)
        return self.op("side", attr=len(self.sides) - 1)

    def epilogue(self, outputs: Sequence[ir.Output]) -> ir.Epilogue:
        """The program that stores ``outputs``, the result first."""
        result, *auxiliary = outputs
        return ir.Epilogue(
            ops=tuple(self.ops),
            result=result.value,
            out_dtype=result.dtype,
            vectors=tuple(self.vectors),
            sides=tuple(self.sides),
            auxiliary=tuple(auxiliary),
        )


Emit: TypeAlias = Callable[[Builder, JaxprEqn, Sequence[int]], int]


def dtype_of(atom: Any) -> ir.DType:
    name = np.dtype(atom.aval.dtype).name
    if name not in DTYPES:
        raise NotElementwise(f"{name} values are not supported in an epilogue")
    return DTYPES[name]


def literal(builder: Builder, atom: Literal) -> int:
    """A scalar literal as a constant."""
    dtype_of(atom)
    if np.ndim(atom.val):
        raise NotElementwise("an array literal")
    return builder.const(np.asarray(atom.val).astype(np.float32))


def emit(builder: Builder, eqn: JaxprEqn, args: Sequence[int]) -> tuple[int, ...]:
    """Appends the operations of ``eqn`` on the values ``args``.

    Returns one value for each of ``eqn``'s results.

    Raises:
      NotElementwise: the table has no row for this equation.
    """
    name = eqn.primitive.name
    if name in _CALLS:
        return _emit_call(builder, eqn, args)
    for var in eqn.outvars:
        dtype_of(var)
    if name in SHAPE_ONLY or name == "copy":
        return (args[0],)
    if name in _SAME_NAME:
        _check_operands(eqn)
        return (builder.op(name, *args),)
    if name == "add_any":
        return (builder.op("add", *args),)
    if name in _SPECIAL:
        return (_SPECIAL[name](builder, eqn, args),)
    raise NotElementwise(f"{name} is not elementwise or not known")


def supported(eqn: JaxprEqn) -> bool:
    """Whether ``emit`` has a rule for ``eqn`` (shapes are the matcher's business)."""
    try:
        scratch = Builder()
        emit(scratch, eqn, [0] * len(eqn.invars))
    except (NotElementwise, ValueError):
        return False
    return True


def _emit_call(builder: Builder, eqn: JaxprEqn, args: Sequence[int]) -> tuple[int, ...]:
    body = closed(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")))
    if body.consts or eqn.effects:
        raise NotElementwise(f"{eqn.primitive.name} with constants or effects")
    if len(eqn.outvars) != 1:
        raise NotElementwise(f"{eqn.primitive.name} with {len(eqn.outvars)} results")
    env: dict[Any, int] = dict(zip(body.jaxpr.invars, args, strict=True))
    for inner in body.jaxpr.eqns:
        values = [
            literal(builder, atom) if isinstance(atom, Literal) else env[atom]
            for atom in inner.invars
        ]
        if inner.primitive.name in SHAPE_ONLY:
            # Only a scalar may change shape in here; anything else moves elements.
            source, result = aval_of(inner.invars[0]), aval_of(inner.outvars[0])
            if source.size != 1 and source.shape != result.shape:
                raise NotElementwise(f"{inner.primitive.name} inside a call")
        results = emit(builder, inner, values)
        env.update(zip(inner.outvars, results, strict=True))
    (out,) = body.jaxpr.outvars
    if isinstance(out, Literal):
        raise NotElementwise("a call with a constant result")
    return (env[out],)


def _check_operands(eqn: JaxprEqn) -> None:
    """Logical primitives are bitwise on integers; those have no row."""
    for atom in eqn.invars:
        dtype_of(atom)


def _integer_pow(builder, eqn, args) -> int:
    return builder.op("integer_pow", args[0], attr=int(eqn.params["y"]))


def _select(builder, eqn, args) -> int:
    which, *cases = eqn.invars
    if len(cases) != 2 or dtype_of(which) != "bool":
        raise NotElementwise("select_n with other than two cases")
    if dtype_of(cases[0]) == "bool":
        raise NotElementwise("select_n of booleans")
    return builder.op("select", *args)


def _round(builder, eqn, args) -> int:
    to_even = eqn.params["rounding_method"] == lax.RoundingMethod.TO_NEAREST_EVEN
    return builder.op("round_even" if to_even else "round_away", args[0])


def _convert(builder, eqn, args) -> int:
    source, target = dtype_of(eqn.invars[0]), dtype_of(eqn.outvars[0])
    if source == target:
        return args[0]
    if target == "bool":
        return builder.op("ne", args[0], builder.const(0.0))
    if source == "bool":
        return builder.op("to_float", args[0])
    if builder.per_channel[args[0]] and ir.ITEM_BYTES[target] < 4:
        return builder.op(f"to_{target}", args[0])
    return args[0]


_SPECIAL: dict[str, Emit] = {
    "integer_pow": _integer_pow,
    "select_n": _select,
    "round": _round,
    "convert_element_type": _convert,
}
