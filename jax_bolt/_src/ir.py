# SPDX-License-Identifier: Apache-2.0
"""What a kernel computes: a problem, an epilogue, and the two together as a region.

Everything here is frozen, hashable and has a canonical text (``.text``), which is
what the tuning database, the kernel store and the generated C++ are keyed by. No
JAX, no architecture, no device.

A region computes, for every output element at flat row ``i`` and channel ``j``::

    d[i, j] = epilogue(acc[i, j], vector_0[j], ..., side_0[i, j], ...)

where ``acc`` is the f32 accumulator of the root. The epilogue is a straight-line
program over f32 (and bool) values, so any elementwise expression has a place in it.
A value on the way may be stored as well: an auxiliary output. Of a conv's result a
maximum over windows of its rows and columns, or the mean over all of them, may be
stored instead: a pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

DType: TypeAlias = Literal["bf16", "f16", "f32", "bool"]
ITEM_BYTES: dict[str, int] = {"bf16": 2, "f16": 2, "f32": 4, "bool": 1}

# A root's channel axis flattens to N (gemm) or K (conv); rows are everything else.
Layout: TypeAlias = Literal["row", "col"]
FilterLayout: TypeAlias = Literal["krsc", "hwio"]

# name -> (number of arguments, kind of result)
ARITHMETIC: dict[str, tuple[int, str]] = {
    **{
        name: (1, "float")
        for name in (
            "neg abs sign floor ceil round_even round_away exp exp2 expm1 log log1p "
            "sqrt rsqrt cbrt sin cos tan asin acos atan sinh cosh tanh asinh acosh "
            "atanh logistic erf erfc erf_inv square to_float to_bf16 to_f16"
        ).split()
    },
    **{name: (2, "float") for name in "add sub mul div rem max min pow atan2".split()},
    # to_bf16 and to_f16 round a per-channel value as the user's cast does; casts of
    # full-size values are not kept (XLA does not keep them either: excess precision).
    "clamp": (3, "float"),  # lo, x, hi
    "integer_pow": (1, "float"),  # attr: the exponent
    **{name: (2, "bool") for name in "eq ne lt le gt ge and or xor".split()},
    "not": (1, "bool"),
    "is_finite": (1, "bool"),
    "select": (3, "float"),  # predicate, value where false, value where true
}
# What a region has at most; the C ABI carries more, for chains (``kernels.recipe``).
MAX_VECTORS = 8
MAX_SIDES = 2
MAX_AUXILIARY = 1
MAX_WINDOW = 16  # results in a window of a pool, over which a kernel's loop is unrolled

LEAVES = ("acc", "vector", "side", "const")


@dataclasses.dataclass(frozen=True, slots=True)
class Op:
    """One value of an epilogue.

    ``name`` is a leaf (``acc``; ``vector``/``side`` with ``attr`` = its index;
    ``const`` with ``attr`` = its f32 value) or a key of ``ARITHMETIC``; ``args`` are
    positions of earlier values.
    """

    name: str
    args: tuple[int, ...] = ()
    attr: float | int | None = None

    def is_per_channel(self, earlier: Sequence[bool]) -> bool:
        """Whether it is the same in all rows, given which earlier values are."""
        if self.name in LEAVES:
            return self.name in ("vector", "const")
        return all(earlier[a] for a in self.args)

    @property
    def text(self) -> str:
        args = ",".join(f"%{a}" for a in self.args)
        attr = "" if self.attr is None else f"[{_number(self.attr)}]"
        return f"{self.name}{attr}({args})"


@dataclasses.dataclass(frozen=True, slots=True)
class Vector:
    """A per-channel input of N (or K) elements, or one scalar for all channels."""

    dtype: DType
    scalar: bool = False

    @property
    def text(self) -> str:
        return f"{self.dtype}{'[]' if self.scalar else '[n]'}"


@dataclasses.dataclass(frozen=True, slots=True)
class Output:
    """A value that is stored, by its position, and what it is rounded to."""

    value: int
    dtype: DType

    @property
    def text(self) -> str:
        return f"{self.dtype}:%{self.value}"


@dataclasses.dataclass(frozen=True, slots=True)
class Epilogue:
    """A straight-line elementwise program from the accumulator to the output.

    ``ops[result]`` is the value stored, rounded to ``out_dtype``. The values of
    ``auxiliary`` are stored besides, each in a tensor of its own.
    """

    ops: tuple[Op, ...]
    result: int
    out_dtype: DType
    vectors: tuple[Vector, ...] = ()
    sides: tuple[DType, ...] = ()
    auxiliary: tuple[Output, ...] = ()

    def __post_init__(self) -> None:
        for i, op in enumerate(self.ops):
            if op.name not in LEAVES and op.name not in ARITHMETIC:
                raise ValueError(f"unknown epilogue operation {op.name!r}")
            if op.name in ARITHMETIC and len(op.args) != ARITHMETIC[op.name][0]:
                raise ValueError(f"{op.name} takes {ARITHMETIC[op.name][0]} arguments")
            if any(not 0 <= a < i for a in op.args):
                raise ValueError(f"%{i} = {op.text} reads a later value")
        for output in self.outputs:
            if not 0 <= output.value < len(self.ops):
                raise ValueError(f"result %{output.value} is not one of the operations")

    @property
    def text(self) -> str:
        body = ";".join(f"%{i}={op.text}" for i, op in enumerate(self.ops))
        vectors = ",".join(v.text for v in self.vectors)
        sides = ",".join(self.sides)
        outputs = ",".join(output.text for output in self.outputs)
        return f"({vectors})({sides}){{{body};{outputs}}}"

    @property
    def outputs(self) -> tuple[Output, ...]:
        """Everything that is stored, the result first."""
        return (Output(self.result, self.out_dtype), *self.auxiliary)

    @property
    def tensors(self) -> tuple[DType, ...]:
        """The dtypes of what is full-size: the outputs, then the side inputs."""
        return (*(output.dtype for output in self.outputs), *self.sides)

    def kinds(self) -> tuple[str, ...]:
        """``"float"`` or ``"bool"`` for every value."""
        kinds: list[str] = []
        for op in self.ops:
            if op.name == "vector":
                dtype = self.vectors[int(op.attr or 0)].dtype
                kinds.append("bool" if dtype == "bool" else "float")
            elif op.name == "side":
                dtype = self.sides[int(op.attr or 0)]
                kinds.append("bool" if dtype == "bool" else "float")
            elif op.name in LEAVES:
                kinds.append("float")
            elif op.name == "select":
                kinds.append(kinds[op.args[1]])
            else:
                kinds.append(ARITHMETIC[op.name][1])
        return tuple(kinds)

    def per_channel(self) -> tuple[bool, ...]:
        """For every value, whether it is the same in all rows (no acc, no side)."""
        same: list[bool] = []
        for op in self.ops:
            same.append(op.is_per_channel(same))
        return tuple(same)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GemmProblem:
    """D[l] = A[l] @ B[l]: A is M by K, B is K by N, ``batch`` of each.

    ``a_layout`` "row" means A is stored [M, K], "col" [K, M]; ``b_layout`` "row" means
    B is stored [K, N], "col" [N, K]. D and the side inputs are stored [batch, M, N].
    """

    m: int
    n: int
    k: int
    batch: int = 1
    dtype: DType
    a_layout: Layout = "row"
    b_layout: Layout = "row"

    @property
    def text(self) -> str:
        batch = f"b{self.batch}" if self.batch > 1 else ""
        return (
            f"gemm[{self.dtype} {self.a_layout},{self.b_layout} "
            f"{batch}m{self.m}n{self.n}k{self.k}]"
        )

    @property
    def rows(self) -> int:
        return self.batch * self.m

    @property
    def channels(self) -> int:
        return self.n

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k

    @property
    def operand_elements(self) -> tuple[int, int]:
        return self.batch * self.m * self.k, self.batch * self.k * self.n


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConvProblem:
    """2-D fprop: x is N H W C, y is N P Q K, all packed.

    ``padding`` is (top, bottom, left, right); ``stride`` and ``dilation`` are (h, w).
    The filter is stored K R S C, or R S C K where ``filter_layout`` is "hwio"; its C is
    that of one of ``groups``, of which output channels read their own input channels
    only.
    """

    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    dtype: DType
    filter_layout: FilterLayout = "krsc"
    groups: int = 1

    @property
    def p(self) -> int:
        reach = self.dilation[0] * (self.r - 1) + 1
        return (self.h + self.padding[0] + self.padding[1] - reach) // self.stride[
            0
        ] + 1

    @property
    def q(self) -> int:
        reach = self.dilation[1] * (self.s - 1) + 1
        return (self.w + self.padding[2] + self.padding[3] - reach) // self.stride[
            1
        ] + 1

    @property
    def text(self) -> str:
        return (
            f"conv[{self.dtype} n{self.n}h{self.h}w{self.w}c{self.c} "
            f"k{self.k}r{self.r}s{self.s} st{_dims(self.stride)} "
            f"pad{_dims(self.padding)} dil{_dims(self.dilation)}"
            f"{f' g{self.groups}' if self.groups > 1 else ''}"
            f"{' hwio' if self.filter_layout == 'hwio' else ''}]"
        )

    @property
    def rows(self) -> int:
        return self.n * self.p * self.q

    @property
    def channels(self) -> int:
        return self.k

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.k * self.r * self.s * self.group_channels

    @property
    def operand_elements(self) -> tuple[int, int]:
        taps = self.r * self.s
        return (
            self.n * self.h * self.w * self.c,
            self.k * taps * self.group_channels,
        )

    @property
    def group_channels(self) -> int:
        """Input channels that an output channel reads."""
        return self.c // self.groups

    @property
    def is_depthwise(self) -> bool:
        """Every output channel reads one of several input channels."""
        return self.groups > 1 and self.groups == self.c

    @property
    def is_gemm(self) -> bool:
        """A 1x1, stride 1, unpadded conv is a matrix product over its pixels."""
        return (
            self.groups == self.r == self.s == 1
            and self.stride == (1, 1)
            and self.padding == (0, 0, 0, 0)
        )


Problem: TypeAlias = GemmProblem | ConvProblem


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A maximum over windows of a conv's rows and columns, each (h, w), or a mean.

    ``padding`` is (top, bottom, left, right): a window leaves out what lies beyond the
    image, and always has some of it. The one window of a mean is the image.

    Raises ValueError for a window that may have none.
    """

    window: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    operation: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        r, s = self.window
        top, bottom, left, right = self.padding
        if min(*self.window, *self.stride) < 1 or min(self.padding) < 0:
            raise ValueError(f"{self.text} has a size below its least")
        if max(top, bottom) >= r or max(left, right) >= s:
            raise ValueError(f"{self.text} has windows of padding alone")
        if self.is_mean and ({*self.stride}, {*self.padding}) != ({1}, {0}):
            raise ValueError(f"{self.text} is a mean of more than one window")

    @property
    def is_mean(self) -> bool:
        return self.operation == "mean"

    @property
    def label(self) -> str:
        """Such as "max3x3/2" and "mean7x7"."""
        down, right = self.stride
        strides = f"{down}" if down == right else _dims(self.stride)
        window = f"{self.operation}{_dims(self.window)}"
        return window if strides == "1" else f"{window}/{strides}"

    def sizes(self, p: int, q: int) -> tuple[int, int]:
        """Rows and columns of what ``p`` rows and ``q`` columns become."""
        top, bottom, left, right = self.padding
        rows = (p + top + bottom - self.window[0]) // self.stride[0] + 1
        cols = (q + left + right - self.window[1]) // self.stride[1] + 1
        return max(rows, 0), max(cols, 0)

    @property
    def text(self) -> str:
        stride, padding = _dims(self.stride), _dims(self.padding)
        return f"{self.operation}[{_dims(self.window)} st{stride} pad{padding}]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A root and its epilogue: what one kernel computes.

    With a ``pool``, that of the result, rounded to its ``out_dtype``, is stored in the
    result's place, in the same dtype.

    Raises ValueError for a pool of anything but a conv's one result, and for a mean of
    a part of it.
    """

    problem: Problem
    epilogue: Epilogue
    pool: Pool | None = None

    def __post_init__(self) -> None:
        if self.pool is None:
            return
        if not isinstance(self.problem, ConvProblem) or self.epilogue.auxiliary:
            raise ValueError(f"{self.text}: a pool is of a conv's one result")
        p = self.problem
        if self.pool.is_mean and self.pool.window != (p.p, p.q):
            raise ValueError(f"{self.text}: a mean is of all rows and columns")

    @property
    def text(self) -> str:
        pool = "" if self.pool is None else f" {self.pool.text}"
        return f"{self.problem.text} {self.epilogue.text}{pool}"

    @property
    def dtype(self) -> DType:
        """Of the operands."""
        return self.problem.dtype

    @property
    def flops(self) -> int:
        return self.problem.flops

    @property
    def bytes_moved(self) -> int:
        """Least bytes through device memory: every operand and output once."""
        a, b = self.problem.operand_elements
        read = self.problem.rows * sum(ITEM_BYTES[d] for d in self.epilogue.sides)
        stored = sum(ITEM_BYTES[output.dtype] for output in self.epilogue.outputs)
        full = (read + self.stored_rows * stored) * self.problem.channels
        return (a + b) * ITEM_BYTES[self.problem.dtype] + full

    @property
    def stored_rows(self) -> int:
        """Rows of every output; side inputs have the problem's."""
        if self.pool is None or isinstance(self.problem, GemmProblem):
            return self.problem.rows
        return self.problem.n * math.prod(
            self.pool.sizes(self.problem.p, self.problem.q)
        )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Two regions back to back in one kernel (Bolt, section 3.1.1).

    The result of ``first``, rounded to its ``out_dtype``, is the left operand of
    ``second``, a product over its channels; or its side input of index ``side``: a
    shortcut's product, merged into the one it is added to. With ``stored`` it is an
    output as well: it is needed elsewhere. ``first`` may be such a merged pair itself,
    and the product over its channels follows.

    Raises ValueError where ``second`` does not read what ``first`` makes.
    """

    first: Region | Chain
    second: Region
    stored: bool
    side: int | None = None

    def __post_init__(self) -> None:
        if any(region.pool is not None for region in self.regions):
            raise ValueError(f"{self.text}: a region of a chain does not pool")
        inner = self.first
        if isinstance(inner, Chain) and (
            self.side is not None or inner.side is None or inner.stored
        ):
            raise ValueError(f"{self.text}: only a merged pair begins a chain")
        made, read = self.made.problem, self.second.problem
        if self.side is not None:
            sides = self.second.epilogue.sides
            if (made.rows, made.channels) != (read.rows, read.channels):
                raise ValueError(f"{read.text} is not added to {made.text}")
            if sides[self.side : self.side + 1] != (self.made.epilogue.out_dtype,):
                raise ValueError(f"{self.second.text} has no such side {self.side}")
            return
        if not (isinstance(read, GemmProblem) or read.is_gemm):
            raise ValueError(f"{read.text} is not a product over channels")
        k = read.k if isinstance(read, GemmProblem) else read.c
        if (made.rows, made.channels) != (read.rows, k):
            raise ValueError(f"{read.text} does not read the result of {made.text}")
        if self.made.epilogue.out_dtype != read.dtype:
            raise ValueError(
                f"a result of {self.made.epilogue.out_dtype} is read as {read.dtype}"
            )

    @property
    def regions(self) -> tuple[Region, ...]:
        """All of them, in the order in which a kernel runs them."""
        first = self.first
        return (*(first.regions if isinstance(first, Chain) else (first,)), self.second)

    @property
    def made(self) -> Region:
        """The region whose result is between ``first`` and ``second``."""
        return self.regions[-2]

    @property
    def joints(self) -> tuple[int | None, ...]:
        """Of each region but the first, which side input the one before it makes; None
        for its left operand."""
        inner = self.first.joints if isinstance(self.first, Chain) else ()
        return (*inner, self.side)

    @property
    def text(self) -> str:
        joint = "stored" if self.stored else "kept"
        if self.side is not None:
            joint += f" side{self.side}"
        return f"{self.first.text} -{joint}-> {self.second.text}"

    @property
    def dtype(self) -> DType:
        """Of the second product's operands, the result between among them."""
        return self.second.problem.dtype

    @property
    def flops(self) -> int:
        return self.first.flops + self.second.flops

    @property
    def bytes_moved(self) -> int:
        """Least bytes through device memory; the result between is never read."""
        item = ITEM_BYTES[self.made.epilogue.out_dtype]
        between = self.made.problem.rows * self.made.problem.channels * item
        apart = self.first.bytes_moved + self.second.bytes_moved
        return apart - between * (1 if self.stored else 2)


# What one kernel computes.
Work: TypeAlias = Region | Chain


def needed(
    wanted: Iterable[int], args: Callable[[int], Iterable[int]]
) -> frozenset[int]:
    """``wanted``, and all that these are computed from by each value's ``args``."""
    found: set[int] = set()
    pending = list(wanted)
    while pending:
        i = pending.pop()
        if i not in found:
            found.add(i)
            pending.extend(args(i))
    return frozenset(found)


def _number(value: float | int) -> str:
    return str(value) if isinstance(value, int) else float(value).hex()


def _dims(values: tuple[int, ...]) -> str:
    return "x".join(map(str, values))
