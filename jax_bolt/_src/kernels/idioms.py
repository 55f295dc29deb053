# SPDX-License-Identifier: Apache-2.0
"""Operations that one short function of ``epilogue/math.hpp`` does together.

An activation is a good part of a small kernel, and beside tensor cores that read the
same registers each instruction counts twice. Where 16 bits are kept of all results,
there are short forms of ``logistic``, and of ``erfc`` in an exact GELU, into which
constant factors of what goes in and of what comes out are folded:
``(x * 0.5) * erfc(-x * sqrt(0.5))`` becomes ``x * erfc(x, -sqrt(0.5), 0.5)``,
``1 + tanh(y)`` becomes ``logistic(y, 2, 2)`` and ``1 + erf(y)`` ``erfc(y, -1, 1)``.

The short ``erfc`` is right where it is large. Beside a factor that vanishes with it, as
in a GELU, that is enough; alone, it would be far off where it is tiny.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence
from typing import TypeAlias

from .. import ir

_LOGISTIC, _ERFC = "logistic_narrow", ("erfc_bf16", "erfc_f16")
# Instructions, and the factor that takes none.
_COSTS = {_LOGISTIC: (4, 1.0), "erfc_bf16": (9, 0.5), "erfc_f16": (11, 0.5)}
# Constants are folded where no product with them can leave float32's range: erfc has
# its scale to the 13th power.
_MOST = {_LOGISTIC: 2.0**60} | dict.fromkeys(_ERFC, 16.0)
_MOST_FACTOR = 2.0**20

Form: TypeAlias = tuple[str, float, float]  # a function, and factors in and out


@dataclasses.dataclass(frozen=True, slots=True)
class Idiom:
    """``times * factor * function(scale * operand)``, without ``times`` where None."""

    function: str
    operand: int
    scale: float
    factor: float = 1.0
    times: int | None = None

    @property
    def args(self) -> tuple[int, ...]:
        return (self.operand,) if self.times is None else (self.times, self.operand)

    @property
    def cost(self) -> int:
        """Instructions."""
        cost, free = _COSTS[self.function]
        return cost + (self.factor != free) + (self.times is not None)

    @property
    def is_right(self) -> bool:
        """Also where the function's value is tiny."""
        return self.function not in _ERFC or self.times == self.operand


def is_narrow(epilogue: ir.Epilogue) -> bool:
    """Whether at most 16 bits are kept of all that is stored."""
    return all(ir.ITEM_BYTES[output.dtype] <= 2 for output in epilogue.outputs)


@functools.lru_cache(maxsize=1024)  # every tile asks
def idioms(epilogue: ir.Epilogue) -> dict[int, Idiom]:
    """By the operation whose value it is; empty where more than 16 bits are kept."""
    if not is_narrow(epilogue):
        return {}
    ops, same = epilogue.ops, epilogue.per_channel()
    dtypes = {output.dtype for output in epilogue.outputs}
    erfc = _ERFC[dtypes != {"bf16"}]
    alone: dict[str, Form] = {
        "erfc": (erfc, 1.0, 1.0),
        "logistic": (_LOGISTIC, 1.0, 1.0),
    }
    and_one: dict[str, Form] = {"erf": (erfc, -1.0, 1.0), "tanh": (_LOGISTIC, 2.0, 2.0)}
    uses = _uses(epilogue)
    found: dict[int, Idiom] = {}

    def shortened(i: int, known: dict[str, Form]) -> Idiom | None:
        if same[i] or ops[i].name not in known:
            return None
        function, into, out = known[ops[i].name]
        operand, scale = _scaled(ops[i].args[0], ops, same, _MOST[function])
        return Idiom(function, operand, into * scale, out)

    def joined(i: int, one: int, other: int) -> Idiom | None:
        """A sum or product with the function or idiom that ``one`` is."""
        if ops[i].name == "add":
            return shortened(one, and_one) if _value(ops[other]) == 1.0 else None
        idiom, factor = found.get(one), _value(ops[other])
        if idiom is None:
            return None
        times = idiom.times
        if factor is None:
            if times is not None:
                return None
            times, factor = _scaled(other, ops, same, _MOST_FACTOR)
        factor *= idiom.factor
        made = dataclasses.replace(idiom, factor=factor, times=times)
        return made if _is_moderate(factor, _MOST_FACTOR) else None

    for i, op in enumerate(ops):
        made = shortened(i, alone)
        if not same[i] and op.name in ("add", "mul"):
            for one, other in (op.args, op.args[::-1]):
                if made is None and uses[one] == 1:
                    made = joined(i, one, other)
        if made is not None:
            found[i] = made
    return {i: idiom for i, idiom in found.items() if idiom.is_right}


def _uses(epilogue: ir.Epilogue) -> collections.Counter[int]:
    """How often what is stored needs each value."""
    ops, stored = epilogue.ops, [output.value for output in epilogue.outputs]
    live = ir.needed(stored, lambda i: ops[i].args)
    return collections.Counter([*stored, *(arg for i in live for arg in ops[i].args)])


def _scaled(
    i: int, ops: Sequence[ir.Op], same: Sequence[bool], most: float
) -> tuple[int, float]:
    """A value and a constant factor, of which the value ``i`` is the product."""
    factor = 1.0
    while not same[i]:
        op = ops[i]
        if op.name == "neg":
            pairs = [(op.args[0], -1.0)]
        elif op.name == "mul":
            values = [_value(ops[arg]) for arg in op.args]
            pairs = list(zip(op.args[::-1], values, strict=True))
        elif op.name == "div" and (value := _value(ops[op.args[1]])):
            pairs = [(op.args[0], 1 / value)]
        else:
            break
        folded = [(a, factor * by) for a, by in pairs if by is not None]
        folded = [pair for pair in folded if _is_moderate(pair[1], most)]
        if not folded:
            break
        i, factor = folded[0]
    return i, factor


def _value(op: ir.Op) -> float | None:
    """Of a constant."""
    return None if op.name != "const" else float(op.attr or 0.0)


def _is_moderate(factor: float, most: float) -> bool:
    return 1 / most <= abs(factor) <= most
