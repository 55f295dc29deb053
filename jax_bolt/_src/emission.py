# SPDX-License-Identifier: Apache-2.0
"""A region's equations → its epilogue, side inputs and per-channel inputs.

Per-channel inputs are followed inwards, through broadcasts and the arithmetic on them,
as far as only the region reads them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import elementwise, ir
from .compat import JaxprEqn, Literal, Var, aval_of
from .elementwise import NotElementwise
from .frame import Frame
from .graph import Graph
from .roots import Root
from .views import Repeated, View


class Emission:
    """Writes the epilogue of ``inside``, a set of equations, the ``root``'s among them.

    ``frames`` are those of the region's values; equations of ``taken`` belong to other
    regions.
    """

    def __init__(
        self,
        graph: Graph,
        root: int,
        problem: Root,
        frames: Mapping[Var, Frame],
        inside: set[int],
        taken: set[int],
    ):
        self.graph = graph
        self.root = root
        self.problem = problem
        self.frames = frames
        self.inside = inside
        self.taken = taken
        self.builder = elementwise.Builder()
        self.values: dict[Any, int] = {graph.eqns[root].outvars[0]: 0}
        self.per_channel: dict[Any, int] = {}
        # One tensor read in two frames is two side inputs.
        self.full: dict[tuple[Any, Frame], int] = {}
        self.absorbed: set[int] = set()
        self.vectors: list[Var] = []
        self.sides: list[Var] = []
        self._frames: list[Frame] = []

    def views(self) -> list[View | None]:
        """How side inputs and vectors are rearranged."""
        times = self.problem.frame.repeats
        vectors = [
            Repeated(tuple(aval_of(v).shape), times)
            if times > 1 and aval_of(v).size > 1
            else None
            for v in self.vectors
        ]
        return [*(frame.view for frame in self._frames), *vectors]

    def equation(self, index: int) -> None:
        eqn = self.graph.eqns[index]
        frame = self.frames[eqn.outvars[0]]
        if is_view(eqn):
            self.values[eqn.outvars[0]] = self.values[eqn.invars[0]]
            return
        args = [self._operand(atom, frame) for atom in eqn.invars]
        results = elementwise.emit(self.builder, eqn, args)
        self.values.update(zip(eqn.outvars, results, strict=True))

    def _operand(self, atom: Any, frame: Frame) -> int:
        if isinstance(atom, Literal):
            return elementwise.literal(self.builder, atom)
        if atom in self.values:
            return self.values[atom]
        source = self._through_shapes(atom, frame)
        if source is not None:
            return self._channel_value(source, frame)
        if (atom, frame) not in self.full:
            if frame.moves and not self.problem.shares_layout:
                raise NotElementwise("a side input that would be rearranged")
            self.sides.append(atom)
            self._frames.append(frame)
            self.full[atom, frame] = self.builder.side(elementwise.dtype_of(atom))
        return self.full[atom, frame]

    def _through_shapes(self, atom: Any, frame: Frame) -> Any | None:
        """The per-channel value that ``atom`` spreads, or None for a full tensor."""
        path: list[int] = []
        while True:
            if isinstance(atom, Literal):
                break
            index = self.graph.producer.get(atom)
            if index is None:
                break
            eqn = self.graph.eqns[index]
            if eqn.primitive.name not in elementwise.SHAPE_ONLY:
                break
            if not frame.spreads(eqn):
                break
            path.append(index)
            atom = eqn.invars[0]
        if not isinstance(atom, Literal):
            if not frame.is_per_channel(tuple(atom.aval.shape)):
                return None
        self.absorbed.update(path)
        return atom

    def _channel_value(self, atom: Any, frame: Frame) -> int:
        """Emits a per-channel value, following the arithmetic it comes from."""
        if isinstance(atom, Literal):
            return elementwise.literal(self.builder, atom)
        if atom in self.per_channel:
            return self.per_channel[atom]
        index = self.graph.producer.get(atom)
        if index is not None and self._absorbs(index, frame):
            eqn = self.graph.eqns[index]
            sources = [self._through_shapes(v, frame) for v in eqn.invars]
            if all(source is not None for source in sources):
                self.absorbed.add(index)  # first: its operands' users must be inside
                args = [self._channel_value(source, frame) for source in sources]
                results = elementwise.emit(self.builder, eqn, args)
                self.per_channel.update(zip(eqn.outvars, results, strict=True))
                return self.per_channel[atom]
        self.vectors.append(atom)
        scalar = atom.aval.size == 1
        value = self.builder.vector(elementwise.dtype_of(atom), scalar)
        self.per_channel[atom] = value
        return value

    def _absorbs(self, index: int, frame: Frame) -> bool:
        """Elementwise, used by this region alone, and all its operands per channel."""
        eqn = self.graph.eqns[index]
        if eqn.effects or index in self.taken or len(eqn.outvars) != 1:
            return False
        if not elementwise.supported(eqn):
            return False
        if not frame.is_per_channel(tuple(aval_of(eqn.outvars[0]).shape)):
            return False
        # The root reads its operands as tensors, whatever else they are.
        inside = (self.inside | self.absorbed) - {self.root}
        return self.graph.used_only_in(eqn.outvars[0], inside) and all(
            (isinstance(v, Literal) and not aval_of(v).shape)
            or (isinstance(v, Var) and is_input(v, frame))
            for v in eqn.invars
        )


def is_view(eqn: JaxprEqn) -> bool:
    """Whether it changes the shape of a value or the order of its axes alone."""
    return eqn.primitive.name in (*elementwise.SHAPE_ONLY, "transpose")


def label(root: str, epilogue: ir.Epilogue, callees: Sequence[str]) -> str:
    """A short name: ``conv3x3+bn+add+relu``, ``+aux`` with an auxiliary output."""
    steps: list[str] = []
    per_channel = epilogue.per_channel()
    names = [op.name for op in epilogue.ops]
    if "rsqrt" in [n for n, same in zip(names, per_channel, strict=True) if same]:
        steps.append("bn")
    elif epilogue.vectors:
        binary = [
            op.name
            for op, same in zip(epilogue.ops, per_channel, strict=True)
            if not same and any(per_channel[a] for a in op.args)
        ]
        steps.append("bias" if binary[:1] == ["add"] else "affine")
    steps += ["add" if "side" in names else "", *callees]
    if not callees:
        known = ("max", "tanh", "logistic", "erf", "exp", "clamp")
        steps += ["relu" if n == "max" else n for n in known if n in names][:1]
    steps += ["aux"] * len(epilogue.auxiliary)
    return "+".join([root, *(s for s in steps if s)])


def is_input(atom: Any, frame: Frame) -> bool:
    """Whether a value from outside can be an epilogue input."""
    try:
        elementwise.dtype_of(atom)
    except NotElementwise:
        return False
    if isinstance(atom, Literal):
        return not aval_of(atom).shape
    shape = tuple(atom.aval.shape)
    return shape == frame.shape or frame.is_per_channel(shape)
