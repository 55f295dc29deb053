# SPDX-License-Identifier: Apache-2.0
"""The activation in an epilogue, and the epilogue with another one in its place.

An activation is known by its form, not by its name: a value that depends on one
earlier value and constants alone, and not linearly. A constant factor ahead of it is
none of its own; one after it is, as the sixth of a hard_swish.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import jax

from .. import ir, options, rewrite
from ..arguments import short
from ..elementwise import DTYPES, Builder
from ..kernels import hoist

_LINEAR = frozenset("neg add sub mul div to_float to_bf16 to_f16".split())
_JAX_NAMES = {ours: name for name, ours in DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """The values ``inner`` make of ``entry``; the last of them is ``exit``."""

    entry: int
    exit: int
    inner: frozenset[int]


def find(epilogue: ir.Epilogue) -> Segment | None:
    """The last activation of ``epilogue``; None where there is none to take out.

    There is none where something else reads a value inside of it.
    """
    live, same = hoist.live(epilogue), epilogue.per_channel()
    for exit in sorted(live, reverse=True):
        if same[exit] or epilogue.ops[exit].name in ir.LEAVES:
            continue
        segment = _ending_at(epilogue, exit)
        if segment is not None:
            return None if _leaks(epilogue, segment, live) else segment
    return None


def _ending_at(epilogue: ir.Epilogue, exit: int) -> Segment | None:
    """The longest segment that ends at ``exit`` and begins with what is not linear."""
    constant = hoist.constant(epilogue)

    def read(values: Iterable[int]) -> set[int]:
        return {a for v in values for a in epilogue.ops[v].args if not constant[a]}

    inner = {exit}
    step: list[int] = [exit]  # since the last value that everything depends on
    pending = read([exit])
    found = None
    while pending:
        value = max(pending)
        if len(pending) == 1:
            if any(_bends(epilogue.ops[v], constant) for v in step):
                found = Segment(value, exit, frozenset(inner))
            step = []
        if epilogue.ops[value].name in ir.LEAVES:
            break
        pending.remove(value)
        pending |= read([value])
        inner.add(value)
        step.append(value)
    return found


def _bends(op: ir.Op, constant: tuple[bool, ...]) -> bool:
    """Whether an operation is not linear in what it reads."""
    if op.name not in _LINEAR:
        return True
    if op.name == "div":
        return not constant[op.args[1]]
    return op.name == "mul" and not any(constant[a] for a in op.args)


def _leaks(epilogue: ir.Epilogue, segment: Segment, live: frozenset[int]) -> bool:
    hidden = segment.inner - {segment.exit}
    read = {a for v in live - segment.inner for a in epilogue.ops[v].args}
    return bool(hidden & (read | {output.value for output in epilogue.outputs}))


def replaced(
    epilogue: ir.Epilogue, segment: Segment, activation: ir.Epilogue
) -> ir.Epilogue:
    """``epilogue`` with ``activation``, a function of its ``acc``, in its place."""
    builder = Builder()
    builder.vectors, builder.sides = list(epilogue.vectors), list(epilogue.sides)
    new: dict[int, int] = {}
    live = _live_without(epilogue, segment)
    for index, op in enumerate(epilogue.ops):
        if index == segment.exit:
            new[index] = _spliced(builder, activation, new[segment.entry])
        elif index in live:
            args = (new[a] for a in op.args)
            new[index] = builder.op(op.name, *args, attr=op.attr)
    outputs = (ir.Output(new[o.value], o.dtype) for o in epilogue.outputs)
    return builder.epilogue(tuple(outputs))


def _live_without(epilogue: ir.Epilogue, segment: Segment) -> set[int]:
    """What is needed where the segment's exit needs its entry alone."""
    live: set[int] = set()
    pending = [output.value for output in epilogue.outputs]
    while pending:
        value = pending.pop()
        if value in live:
            continue
        live.add(value)
        at_exit = value == segment.exit
        pending.extend([segment.entry] if at_exit else epilogue.ops[value].args)
    return live


def taken(epilogue: ir.Epilogue, segment: Segment) -> ir.Epilogue:
    """What the segment makes of its entry, as an epilogue of ``acc``."""
    constant = hoist.constant(epilogue)
    needed, pending = set(segment.inner), [*segment.inner]
    while pending:
        more = {a for a in epilogue.ops[pending.pop()].args if constant[a]} - needed
        needed |= more
        pending += more
    builder = Builder()
    new = {segment.entry: 0}
    for index in sorted(needed):
        op = epilogue.ops[index]
        new[index] = builder.op(op.name, *(new[a] for a in op.args), attr=op.attr)
    return builder.epilogue([ir.Output(new[segment.exit], epilogue.out_dtype)])


def appended(epilogue: ir.Epilogue, activation: ir.Epilogue) -> ir.Epilogue:
    """``activation``, a function of its ``acc``, of the result of ``epilogue``."""
    builder = Builder()
    builder.vectors, builder.sides = list(epilogue.vectors), list(epilogue.sides)
    new: list[int] = []
    for op in epilogue.ops:
        new.append(builder.op(op.name, *(new[a] for a in op.args), attr=op.attr))
    result = _spliced(builder, activation, new[epilogue.result])
    stored = [ir.Output(result, epilogue.out_dtype)]
    stored += [ir.Output(new[o.value], o.dtype) for o in epilogue.auxiliary]
    return builder.epilogue(stored)


def _spliced(builder: Builder, activation: ir.Epilogue, entry: int) -> int:
    new: list[int] = []
    for op in activation.ops:
        if op.name == "acc":
            new.append(entry)
        else:
            args = (new[a] for a in op.args)
            new.append(builder.op(op.name, *args, attr=op.attr))
    return new[activation.result]


def names(given: Iterable[str] | str) -> tuple[str, ...]:
    """The names in ``given``, a string with commas between them or several names.

    Raises TypeError on what is no name.
    """
    if isinstance(given, str):
        given = given.split(",")
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    for name in found:
        if not isinstance(name, str):
            called = getattr(name, "__name__", "")
            fix = f"; write {called!r}" if hasattr(jax.nn, called) else ""
            raise TypeError(
                "activations are names of functions of jax.nn, such as 'relu', not "
                f"{called or short(name)} of type {type(name).__name__}{fix}"
            )
    return tuple(filter(None, map(str.strip, found)))


@functools.cache
def named(name: str, dtype: ir.DType) -> ir.Epilogue:
    """``jax.nn``'s function ``name`` of values of ``dtype``: an epilogue of ``acc``.

    Raises ValueError where there is none, or it is no function of single values.
    """
    fun = getattr(jax.nn, name, None)
    problem = f"{name!r} is no activation: name functions of jax.nn, such as relu"
    if name.startswith("_") or not callable(fun):
        raise ValueError(problem)
    like = jax.ShapeDtypeStruct((16, 16), _JAX_NAMES[dtype])
    try:
        program = jax.make_jaxpr(lambda x, w: fun(x @ w))(like, like)
    except Exception as error:  # it takes other arguments
        raise ValueError(problem) from error
    # None of what disables a kernel changes what a function is.
    done = rewrite.rewrite(program, options.Options())
    if len(done.program.jaxpr.eqns) != 1 or len(done.family.sites) != 1:
        raise ValueError(problem)
    epilogue = done.family.sites[0].region.epilogue
    if epilogue.vectors or epilogue.sides or len(epilogue.outputs) != 1:
        raise ValueError(problem)
    return epilogue
