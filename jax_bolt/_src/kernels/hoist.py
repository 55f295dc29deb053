# SPDX-License-Identifier: Apache-2.0
"""Which of an epilogue's values are computed once per channel, not per element."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from .. import ir
from .idioms import Idiom, idioms

# Instructions, about, of what takes more than one.
_COSTS = {
    **{"div": 6, "sqrt": 6, "rsqrt": 6, "cbrt": 20},
    **{"exp": 9, "exp2": 8, "expm1": 20, "log": 12, "log1p": 20, "pow": 40},
    **{"tanh": 14, "logistic": 12, "erf": 25, "erfc": 24, "erf_inv": 40},
    **{"sin": 20, "cos": 20, "tan": 30},
}


def live(
    epilogue: ir.Epilogue, short: Mapping[int, Idiom] | None = None
) -> frozenset[int]:
    """The values that the outputs depend on, some computed by the idioms ``short``."""
    stored = (output.value for output in epilogue.outputs)
    return ir.needed(stored, lambda i: (short or {}).get(i, epilogue.ops[i]).args)


def constant(epilogue: ir.Epilogue) -> tuple[bool, ...]:
    """For every value, whether no input reaches it: the C++ compiler folds those."""
    known: list[bool] = []
    for op in epilogue.ops:
        leaf = op.name in ir.LEAVES
        known.append(op.name == "const" if leaf else all(known[a] for a in op.args))
    return tuple(known)


@functools.lru_cache(maxsize=1024)  # every tile asks
def columns(epilogue: ir.Epilogue) -> tuple[int, ...]:
    """The per-channel values that per-element ones (or outputs) read, in order.

    Hoisting the last value of each per-channel subexpression keeps a live BatchNorm's
    ``scale * rsqrt(var + eps)`` out of the elements' work.
    """
    used = live(epilogue)
    same = epilogue.per_channel()
    known = constant(epilogue)
    read = {a for i in used if not same[i] for a in epilogue.ops[i].args}
    read.update(output.value for output in epilogue.outputs)
    return tuple(i for i in sorted(read) if same[i] and not known[i])


@functools.lru_cache(maxsize=1024)  # every tile asks
def work(epilogue: ir.Epilogue) -> int:
    """Instructions per element, about: what ranks tiles, not what is exact."""
    same, known = epilogue.per_channel(), constant(epilogue)
    short = idioms(epilogue)
    total = 0
    for i in live(epilogue, short):
        name = epilogue.ops[i].name
        if i in short:
            total += short[i].cost
        elif not same[i] and not known[i] and name not in ir.LEAVES:
            total += _COSTS.get(name, 1)
    return total
