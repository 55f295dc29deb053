# SPDX-License-Identifier: Apache-2.0
"""An epilogue of two outputs, cut at the one that is stored on the way.

A kernel for all of it is not always the fastest: one that ends at the auxiliary output
has less to compute and store, and XLA computes the result from what that one stored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from . import ir


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The leading part of the epilogue ``whole``, which stores its auxiliary output.

    ``sides`` and ``vectors`` are those of the whole's that it reads, by position.
    """

    whole: ir.Epilogue
    epilogue: ir.Epilogue
    sides: tuple[int, ...]
    vectors: tuple[int, ...]

    @property
    def stored(self) -> ir.Output:
        """The auxiliary output of the whole, the result of the part."""
        (output,) = self.whole.auxiliary
        return output

    @property
    def rest(self) -> Iterator[tuple[int, ir.Op]]:
        """What computes the result from ``stored``: positions in the whole, and ops."""
        stop = self.stored.value
        needed = _needed(self.whole, self.whole.result, stop)
        return ((i, self.whole.ops[i]) for i in needed if i != stop)


def of(epilogue: ir.Epilogue) -> Part | None:
    """None without an auxiliary output, and where the rest reads the accumulator."""
    if len(epilogue.auxiliary) != 1:
        return None
    (output,) = epilogue.auxiliary
    part = Part(epilogue, *_ending_at(epilogue, output))
    return None if any(op.name == "acc" for _, op in part.rest) else part


def _needed(epilogue: ir.Epilogue, last: int, stop: int | None = None) -> list[int]:
    """The values that ``last`` is computed from, in order; of ``stop`` it alone."""
    found: set[int] = set()
    pending = [last]
    while pending:
        value = pending.pop()
        if value not in found:
            found.add(value)
            pending += [] if value == stop else epilogue.ops[value].args
    return sorted(found)


def _ending_at(
    epilogue: ir.Epilogue, output: ir.Output
) -> tuple[ir.Epilogue, tuple[int, ...], tuple[int, ...]]:
    """The epilogue of ``output`` alone, and which side inputs and vectors it reads."""
    needed = _needed(epilogue, output.value)
    place = {value: i for i, value in enumerate(needed)}
    read = [epilogue.ops[value] for value in needed]
    sides, vectors = (_indices(read, name) for name in ("side", "vector"))
    renamed = {"side": sides, "vector": vectors}
    ops = [
        dataclasses.replace(
            op,
            args=tuple(place[a] for a in op.args),
            attr=renamed[op.name].index(int(op.attr or 0))
            if op.name in renamed
            else op.attr,
        )
        for op in read
    ]
    made = ir.Epilogue(
        tuple(ops),
        place[output.value],
        output.dtype,
        vectors=tuple(epilogue.vectors[i] for i in vectors),
        sides=tuple(epilogue.sides[i] for i in sides),
    )
    return made, sides, vectors


def _indices(ops: Iterable[ir.Op], name: str) -> tuple[int, ...]:
    return tuple(sorted({int(op.attr or 0) for op in ops if op.name == name}))
