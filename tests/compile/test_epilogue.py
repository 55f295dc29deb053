# SPDX-License-Identifier: Apache-2.0
"""Generated functors, compiled for the host and run: what they compute.

``math.hpp`` is tested one operation at a time against numpy in float64; functors of
many operations must then equal, bit for bit, their operations applied one by one.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from jax import lax
from scipy import special

from jax_bolt._src import ir, paths
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels.idioms import idioms

Array = np.ndarray
F32 = np.finfo(np.float32)

REFERENCE: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "floor": np.floor,
    "ceil": np.ceil,
    "round_even": np.rint,
    "round_away": lambda x: np.trunc(x + np.copysign(0.5, x)),
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "cbrt": np.cbrt,
    "sin": np.sin,
    "cos": np.cos,
    "tan": np.tan,
    "asin": np.arcsin,
    "acos": np.arccos,
    "atan": np.arctan,
    "sinh": np.sinh,
    "cosh": np.cosh,
    "tanh": np.tanh,
    "asinh": np.arcsinh,
    "acosh": np.arccosh,
    "atanh": np.arctanh,
    "logistic": special.expit,
    "erf": special.erf,
    "erfc": special.erfc,
    "erf_inv": special.erfinv,
    "square": np.square,
    "to_float": lambda x: x,
    "to_bf16": lambda x: x.astype(np.float32).astype(jnp.bfloat16).astype(float),
    "to_f16": lambda x: x.astype(np.float32).astype(np.float16).astype(float),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rem": np.fmod,
    "max": np.maximum,
    "min": np.minimum,
    "pow": np.power,
    "atan2": np.arctan2,
    "clamp": lambda lo, x, hi: np.minimum(np.maximum(x, lo), hi),
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
    "not": np.logical_not,
    "is_finite": np.isfinite,
    "select": lambda p, f, t: np.where(p != 0, t, f),
}
LOGICAL = ("and", "or", "xor", "not")
EXPONENTS = (-3, -1, 0, 1, 2, 3, 7, 30)
SPECIAL = np.array(
    [
        *(0.0, 1.0, 0.5, 2.5, 1e-3, 87.0, 104.0, 65519.0, 65520.0, 1e-7, 3.14159274),
        *(F32.max, F32.tiny, F32.smallest_subnormal, 0.99999994, 1.5, 1e10, np.inf),
    ],
    np.float32,
)
SPECIAL = np.concatenate([SPECIAL, -SPECIAL, [np.float32(np.nan)]])


# Compiling and running ----------------------------------------------------------------

RUN = """
extern "C" void run_{i}(long n, float const* acc, float const* vectors,
                        float const* sides, float* out) {{
  for (long j = 0; j < n; ++j) {{
    float v[{v}] = {{}}, c[{c}] = {{}}, s[{s}] = {{}};
    for (int k = 0; k < F{i}::kVectors; ++k) v[k] = vectors[k * n + j];
    for (int k = 0; k < F{i}::kSides; ++k) s[k] = sides[k * n + j];
    F{i}::columns(v, c);
    constexpr int kAuxiliary = jax_bolt::AuxiliaryOf<F{i}>::kCount;
    float others[jax_bolt::array_size(kAuxiliary)];
    out[j] = jax_bolt::apply<F{i}>(acc[j], c, s, others);
    for (int k = 0; k < kAuxiliary; ++k) out[(k + 1) * n + j] = others[k];
  }}
}}
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """epilogues -> a function (index, acc, vectors, sides) -> what they compute."""
    compiler = shutil.which("c++") or shutil.which("g++")
    include = paths.own_include()
    if compiler is None or include is None:
        pytest.fail("a host C++ compiler and cc/include are needed")
    folder = tmp_path_factory.mktemp("functors")

    def build(epilogues: Sequence[ir.Epilogue]):
        text = source(epilogues)
        library = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.so"
        if not library.exists():
            compile_host(compiler, include, text, library)
        module = ctypes.CDLL(str(library))
        return functools.partial(run, module)

    return build


def source(epilogues: Sequence[ir.Epilogue]) -> str:
    parts = ['#include "jax_bolt/epilogue/math.hpp"']
    for i, epilogue in enumerate(epilogues):
        text = codegen.functor(epilogue, f"F{i}")
        columns = int(text.split("kColumns = ")[1].split(";")[0])
        counts = (len(epilogue.vectors), columns, len(epilogue.sides))
        v, c, s = (max(1, count) for count in counts)
        parts += [text, RUN.format(i=i, v=v, c=c, s=s)]
    return "\n".join(parts)


def compile_host(compiler: str, include: Path, text: str, library: Path) -> None:
    file = library.with_suffix(".cc")
    file.write_text(text)
    flags = "-std=c++17 -O1 -Wall -Wextra -Werror -shared -fPIC -ffp-contract=off"
    # The compiler would round a folded cosh(1.0f) better than libm does.
    flags += " -fno-builtin"
    # A folded comparison of equal names is what a random program asks for.
    flags += " -Wno-tautological-compare -Wno-unused-parameter"
    subprocess.run(
        [compiler, *flags.split(), f"-I{include}", str(file), "-o", str(library)],
        check=True,
        timeout=300,
    )


def run(
    module: ctypes.CDLL,
    index: int,
    acc: Array,
    vectors: Sequence[Array] = (),
    sides: Sequence[Array] = (),
    auxiliary: int = 0,
) -> Array:
    """The result, or rows of all outputs where there are others."""
    n = len(acc)
    inputs = [np.stack([*many, acc]).astype(np.float32) for many in (vectors, sides)]
    out = np.full((1 + auxiliary, n), 12345, np.float32)
    pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (acc, *inputs, out)]
    getattr(module, f"run_{index}")(ctypes.c_long(n), *pointers)
    return out if auxiliary else out[0]


def single(name: str, attr: int | None = None) -> ir.Epilogue:
    """One operation, on side inputs."""
    arity = ir.ARITHMETIC[name][0]
    dtypes = ["f32"] * arity
    if name in LOGICAL or name == "to_float":
        dtypes = ["bool"] * arity
    if name == "select":
        dtypes[0] = "bool"
    ops = [ir.Op("side", attr=k) for k in range(arity)]
    ops.append(ir.Op(name, tuple(range(arity)), attr))
    return ir.Epilogue(tuple(ops), arity, "f32", (), tuple(dtypes))  # pyright: ignore


SINGLES: list[tuple[str, int | None]] = [
    *((name, None) for name in ir.ARITHMETIC if name != "integer_pow"),
    *(("integer_pow", n) for n in EXPONENTS),
]


# Of what is approximated by more; math.hpp says so.
ULPS = {"erfc": 70}

# One operation at a time --------------------------------------------------------------


def arguments(name: str) -> list[Array]:
    """Every combination of special values, and random ones of many sizes."""
    epilogue = single(name, 1 if name == "integer_pow" else None)
    rng = np.random.default_rng(0)
    arity = len(epilogue.sides)
    grid = np.meshgrid(*[SPECIAL] * arity, indexing="ij")
    found = []
    for dtype, values in zip(epilogue.sides, grid, strict=True):
        sizes = rng.choice([0.1, 1.0, 10.0, 1e4], 4000)
        random = (rng.standard_normal(4000) * sizes).astype(np.float32)
        values = np.concatenate([values.ravel(), random])
        found.append((values > 0).astype(np.float32) if dtype == "bool" else values)
    return found


def test_every_operation_has_a_reference():
    assert set(REFERENCE) | {"integer_pow"} == set(ir.ARITHMETIC)


@pytest.fixture(scope="module")
def singles(build):
    return build([single(name, attr) for name, attr in SINGLES])


@pytest.mark.parametrize("index", range(len(SINGLES)), ids=lambda i: str(SINGLES[i]))
def test_operation_against_numpy(singles, index):
    name, attr = SINGLES[index]
    args = arguments(name)
    got = singles(index, args[0], sides=args)
    with np.errstate(all="ignore"):
        if name == "integer_pow":
            # Its intermediate products overflow, and JAX's do at the same places.
            want = np.asarray(lax.integer_pow(jnp.asarray(args[0]), attr))
            flushed = np.abs(args[0]) < F32.tiny  # XLA on CPU flushes subnormals
            got, want = got[~flushed], want[~flushed].astype(float)
        else:
            want = REFERENCE[name](*[a.astype(float) for a in args])
        want = want.astype(np.float32)
        bound = ULPS.get(name, 4) * np.spacing(np.abs(want)) + F32.tiny
        near = np.abs(got - want) <= bound
        same = (got == want) | near | (np.isnan(got) & np.isnan(want))
    wrong = np.flatnonzero(~same)[:5]
    cases = [([a[i] for a in args], got[i], want[i]) for i in wrong]
    assert same.all(), cases


# Operations on a value y (the first), and what they are.
IDIOMS: dict[str, tuple[list[ir.Op], Callable[[Array], Array]]] = {
    "logistic": (
        [ir.Op("const", attr=3.0), ir.Op("mul", (0, 1)), ir.Op("logistic", (2,))],
        lambda y: special.expit(3 * y),
    ),
    "silu": (
        [ir.Op("logistic", (0,)), ir.Op("mul", (0, 1))],
        lambda y: y * special.expit(y),
    ),
    "gelu": (
        [
            *(ir.Op("const", attr=0.5), ir.Op("mul", (0, 1)), ir.Op("neg", (0,))),
            *(ir.Op("const", attr=0.75), ir.Op("mul", (3, 4)), ir.Op("erfc", (5,))),
            ir.Op("mul", (2, 6)),
        ],
        lambda y: 0.5 * y * special.erfc(-0.75 * y),
    ),
    "gelu of erf": (
        [
            *(ir.Op("const", attr=1.25), ir.Op("div", (0, 1)), ir.Op("erf", (2,))),
            *(ir.Op("const", attr=1.0), ir.Op("add", (4, 3)), ir.Op("mul", (0, 5))),
            *(ir.Op("const", attr=0.5), ir.Op("mul", (6, 7))),
        ],
        lambda y: 0.5 * y * special.erfc(-0.8 * y),
    ),
    "gelu of tanh": (
        [
            *(ir.Op("const", attr=0.75), ir.Op("mul", (0, 1)), ir.Op("tanh", (2,))),
            *(ir.Op("const", attr=1.0), ir.Op("add", (3, 4))),
            *(ir.Op("const", attr=0.5), ir.Op("mul", (5, 6)), ir.Op("mul", (0, 7))),
        ],
        lambda y: y * special.expit(1.5 * y),
    ),
}


# Of erfc's short forms: how good they are below which argument, and beyond it.
SHORT = {"bf16": (6e-4, 3.2, 2e-8), "f16": (1.2e-4, 3.6, 1e-9)}


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("name", IDIOMS)
def test_idioms_of_narrow_results(build, name, dtype):
    """As math.hpp says; NaN and the limits are what they are."""
    ops, reference = IDIOMS[name]
    made = ir.Epilogue((ir.Op("acc"), *ops), len(ops), dtype, (), ())
    plain = codegen.functor(dataclasses.replace(made, out_dtype="f32"))
    assert ("erfc_" in codegen.functor(made)) == ("erf" in plain)
    assert ("logistic_" in codegen.functor(made)) == ("erf" not in plain)
    assert "erfc_" not in plain and "logistic_" not in plain
    x = np.concatenate([np.linspace(-40, 40, 400_001, dtype=np.float32), SPECIAL])
    got = build([made])(0, x)
    with np.errstate(all="ignore"):
        want = reference(x.astype(float))
        rounded = want.astype(np.float32)
    if "erf" not in plain:
        np.testing.assert_allclose(got, rounded, rtol=1e-5, atol=float(F32.tiny))
        return
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    rtol, limit, atol = SHORT[dtype]
    near = x * -(0.75 if name == "gelu" else 0.8) < limit
    np.testing.assert_allclose(got[near], rounded[near], rtol=rtol)
    beyond = ~near & np.isfinite(x)
    assert beyond.any()
    off = np.abs(got[beyond] - want[beyond])
    assert (off <= 0.5 * np.abs(x[beyond]) * atol).all()


def narrow_epilogue(rng: np.random.Generator) -> ir.Epilogue:
    """Sums and products of what has short forms, with constants of any usual size."""
    ops = [ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("side", attr=0)]
    values = [1.0, 1.0, 0.5, 0.7, -1.4, 3.0, 1e-3, 1e3]
    ops += [ir.Op("const", attr=float(v)) for v in rng.choice(values, 3)]
    names = ["neg", "mul", "mul", "mul", "add", "tanh", "erf", "erfc", "logistic"]
    for _ in range(rng.integers(4, 12)):
        name = str(rng.choice(names))
        # Of the latest values more than of others, so that there are idioms.
        first = rng.choice([0, max(0, len(ops) - 4)], ir.ARITHMETIC[name][0])
        ops.append(ir.Op(name, tuple(int(rng.integers(f, len(ops))) for f in first)))
    place = int(rng.integers(len(ops)))
    others = (ir.Output(place, "bf16"),) * int(rng.integers(2))
    vectors = (ir.Vector("f32"),)
    return ir.Epilogue(tuple(ops), len(ops) - 1, "bf16", vectors, ("bf16",), others)


def test_narrow_results_are_near_wide_ones(build):
    """Within bfloat16's spacing of the largest value, and of each as a rule."""
    rng = np.random.default_rng(2)
    programs = [narrow_epilogue(rng) for _ in range(250)]
    wide = [
        dataclasses.replace(
            program,
            out_dtype="f32",
            auxiliary=tuple(ir.Output(o.value, "f32") for o in program.auxiliary),
        )
        for program in programs
    ]
    assert sum(map(bool, map(idioms, programs))) > 50
    short, plain = build(programs), build(wide)
    for index, program in enumerate(programs):
        acc, vector, side = rng.standard_normal((3, 500)).astype(np.float32) * 2
        arrays = acc, [vector], [side]
        got = short(index, *arrays, len(program.auxiliary))
        want = plain(index, *arrays, len(program.auxiliary))
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))
        some = np.isfinite(want)
        scale = np.abs(want[some]).max(initial=0.0)
        error = np.abs(got - want)[some]
        assert (error <= 2.0**-8 * scale).all(), program.text
        assert np.median(error) <= 2.0**-10 * np.median(np.abs(want[some]))


@pytest.mark.parametrize("name", ["max", "min"])
def test_max_and_min_order_zeros(singles, name):
    zeros = np.array([0.0, -0.0], np.float32)
    index = SINGLES.index((name, None))
    got = singles(index, zeros, sides=[zeros, zeros[::-1]])
    assert np.signbit(got).tolist() == [name == "min"] * 2


# Whole functors -----------------------------------------------------------------------


@st.composite
def epilogues(draw) -> ir.Epilogue:
    """Well-kinded programs of any operations on any inputs."""
    dtypes = st.sampled_from(["f32", "bf16", "f16", "bool"])
    vectors = draw(
        st.lists(st.builds(ir.Vector, dtypes, st.booleans()), max_size=4).map(tuple)
    )
    sides = draw(st.lists(dtypes, max_size=2).map(tuple))
    ops = [ir.Op("acc")]
    ops += [ir.Op("vector", attr=k) for k in range(len(vectors))]
    ops += [ir.Op("side", attr=k) for k in range(len(sides))]
    constants = st.floats(width=32) | st.sampled_from([1e39, -1e39, 1e-46, 0.5])
    ops += [
        ir.Op("const", attr=draw(constants)) for _ in range(draw(st.integers(1, 3)))
    ]
    kinds = list(ir.Epilogue(tuple(ops), 0, "f32", vectors, sides).kinds())

    def pick(kind: str) -> int | None:
        these = [i for i, k in enumerate(kinds) if k == kind]
        return draw(st.sampled_from(these)) if these else None

    for _ in range(draw(st.integers(0, 12))):
        name = draw(st.sampled_from(list(ir.ARITHMETIC)))
        arity, result = ir.ARITHMETIC[name]
        of_bools = name in LOGICAL or name == "to_float"
        wanted = ["bool" if of_bools else "float"] * arity
        if name == "select":
            wanted[0] = "bool"
        args = [pick(kind) for kind in wanted]
        if any(a is None for a in args):
            continue
        attr = draw(st.sampled_from(EXPONENTS)) if name == "integer_pow" else None
        ops.append(ir.Op(name, tuple(a for a in args if a is not None), attr))
        kinds.append(result)
    place = st.integers(0, len(ops) - 1)
    result = draw(place | st.just(len(ops) - 1))
    auxiliary = draw(st.lists(st.builds(ir.Output, place, st.just("f32")), max_size=2))
    return ir.Epilogue(tuple(ops), result, "f32", vectors, sides, tuple(auxiliary))


def one_by_one(singles, epilogue: ir.Epilogue, acc, vectors, sides) -> Array:
    """Every operation of the program by the functor that has only that one; all
    outputs."""
    values: list[Array] = []
    for op in epilogue.ops:
        k = op.attr if isinstance(op.attr, int) else 0
        if op.name == "acc":
            values.append(acc)
        elif op.name == "vector":
            values.append(vectors[k])
        elif op.name == "side":
            values.append(sides[k])
        elif op.name == "const":
            with np.errstate(over="ignore"):
                values.append(np.full_like(acc, op.attr))
        else:
            index = SINGLES.index((op.name, None if op.attr is None else k))
            args = [values[a] for a in op.args]
            values.append(singles(index, args[0], sides=args))
    return np.stack([values[output.value] for output in epilogue.outputs])


@settings(
    max_examples=3,
    phases=[Phase.generate],  # shrinking compiles again and again, for minutes
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)
@given(programs=st.lists(epilogues(), min_size=40, max_size=40))
def test_a_functor_is_its_operations_one_by_one(build, singles, programs):
    compiled = build(programs)
    rng = np.random.default_rng(1)
    for index, epilogue in enumerate(programs):

        def values(dtype: str) -> Array:
            random = rng.standard_normal(200).astype(np.float32) * 4
            found = np.concatenate([rng.permutation(SPECIAL), random])
            return (found > 0).astype(np.float32) if dtype == "bool" else found

        acc = values("f32")
        vectors = [values(v.dtype) for v in epilogue.vectors]
        sides = [values(dtype) for dtype in epilogue.sides]
        got = compiled(index, acc, vectors, sides, len(epilogue.auxiliary))
        want = one_by_one(singles, epilogue, acc, vectors, sides)
        got = got.reshape(want.shape)
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        if not same.all():
            pytest.fail(f"{epilogue.text}: {got[~same][:5]}, not {want[~same][:5]}")
