# SPDX-License-Identifier: Apache-2.0
"""Operations that one short function of ``epilogue/math.hpp`` does together.

An activation is a good part of a small kernel, and beside tensor cores that read the
same registers each instruction counts twice. Where 16 bits are kept of all results,
``erfc`` and ``logistic`` have short forms, into which constant factors of what goes in
and of what comes out are folded: an exact GELU, ``(x * 0.5) * erfc(-x * sqrt(0.5))``,
becomes ``x * erfc(x, -sqrt(0.5), 0.5)``; ``1 + tanh(y)`` becomes ``logistic(y, 2, 2)``
and ``1 + erf(y)`` ``erfc(y, -1, 1)``.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Sequence

from .. import ir

_LOGISTIC = "logistic_narrow"


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
    erfc = "erfc_bf16" if dtypes == {"bf16"} else "erfc_f16"
    # Of 1 + an operation of the name, too: the function, and factors in and out.
    alone = {"erfc": (erfc, 1.0, 1.0), "logistic": (_LOGISTIC, 1.0, 1.0)}
    and_one = {"erf": (erfc, -1.0, 1.0), "tanh": (_LOGISTIC, 2.0, 2.0)}
    uses = collections.Counter(arg for op in ops for arg in op.args)
    uses.update(output.value for output in epilogue.outputs)
    found: dict[int, Idiom] = {}

    def shortened(i: int, known: dict[str, tuple[str, float, float]]) -> Idiom | None:
        if same[i] or ops[i].name not in known:
            return None
        function, into, out = known[ops[i].name]
        operand, scale = _scaled(ops[i].args[0], ops, same)
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
            times, factor = _scaled(other, ops, same)
        factor *= idiom.factor
        made = dataclasses.replace(idiom, factor=factor, times=times)
        return made if _is_normal(factor) else None

    for i, op in enumerate(ops):
        made = shortened(i, alone)
        if not same[i] and op.name in ("add", "mul"):
            for one, other in (op.args, op.args[::-1]):
                if made is None and uses[one] == 1:
                    made = joined(i, one, other)
        if made is not None:
            found[i] = made
    return found


def _scaled(i: int, ops: Sequence[ir.Op], same: Sequence[bool]) -> tuple[int, float]:
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
        folded = [pair for pair in folded if _is_normal(pair[1])]
        if not folded:
            break
        i, factor = folded[0]
    return i, factor


def _value(op: ir.Op) -> float | None:
    """Of a constant."""
    return None if op.name != "const" else float(op.attr or 0.0)


def _is_normal(factor: float) -> bool:
    return 2.0**-100 < abs(factor) < 2.0**100
