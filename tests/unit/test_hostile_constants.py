# SPDX-License-Identifier: Apache-2.0
"""Constants of every kind, as C++ and through JAX: the code compiles and is right.

Many in one TU, built by the host's compiler: functors need no CUDA.
"""

from __future__ import annotations

import ctypes
import math
import random
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_bolt
from jax_bolt._src import ir, paths
from jax_bolt._src.jit import codegen

F32 = np.finfo(np.float32)
TINY, LEAST = float(F32.tiny), float(F32.smallest_subnormal)
CONSTANTS = [
    *(0.0, 1.0, 0.1, 6.0, 1 / 3, 65504.0, 65520.0, 16777217.0, math.pi, 1e-5),
    *(float(F32.max), TINY, LEAST, TINY - LEAST, 1e-40, 2.0**-149, 2.0**126, 2.0**127),
    *(math.inf, math.nan),
]
CONSTANTS += [-value for value in CONSTANTS]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """The TU of a text, after our header of math, as a library."""
    compiler, include = shutil.which("g++") or shutil.which("c++"), paths.own_include()
    assert compiler is not None and include is not None
    folder = tmp_path_factory.mktemp("constants")

    def compiled(text: str) -> ctypes.CDLL:
        source = folder / f"{len(list(folder.iterdir()))}.cc"
        source.write_text(f'#include "jax_bolt/epilogue/math.hpp"\n{text}')
        library = source.with_suffix(".so")
        flags = "-std=c++17 -O0 -Wall -Wextra -Werror -Wno-unused-parameter -shared"
        flags += " -fPIC -ffp-contract=off"
        command = [compiler, *flags.split(), f"-I{include}", str(source)]
        subprocess.run([*command, "-o", str(library)], check=True, timeout=300)
        return ctypes.CDLL(str(library))

    return compiled


def test_a_literal_is_its_float_to_the_bit(compiled):
    rng = random.Random(0)
    values: list[float] = [*CONSTANTS, 1e39, -1e39, 1e308, 5e-324, 1e-46, -1e-46]
    values += [struct.unpack("<f", rng.randbytes(4))[0] for _ in range(900)]
    values += [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(200)]
    literals = ", ".join(codegen.literal(value) for value in values)
    library = compiled(f'extern "C" {{ float values[] = {{{literals}}}; }}\n')
    got = np.array((ctypes.c_float * len(values)).in_dll(library, "values"))
    with np.errstate(over="ignore"):
        want = np.array(values, np.float32)
    nan = np.isnan(want)
    assert nan.sum() > 2 and np.isnan(got[nan]).all()
    assert (got[~nan].view(np.uint32) == want[~nan].view(np.uint32)).all()


# --- Through JAX

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda y, c: y + c,
    "from": lambda y, c: c - y,
    "mul": lambda y, c: y * c,
    "div": lambda y, c: y / c,
    "max": lambda y, c: lax.max(y, jnp.full_like(y, c)),
    "greater": lambda y, c: jnp.where(y > c, y, c),
    "clamp": lambda y, c: lax.clamp(jnp.float32(-1.0), y, jnp.float32(c)),
}
REFERENCE: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "from": lambda y, c: c - y,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "greater": lambda y, c: np.where(y > c, y, c),
    "clamp": lambda y, c: np.minimum(np.maximum(np.float32(-1.0), y), c),
}
CASES = [(name, c) for name in OPERATIONS for c in CONSTANTS]
RUN = """
extern "C" void run_{i}(long n, float const* acc, float* out) {{
  float v[1] = {{}}, c[{columns}] = {{}}, s[1] = {{}};
  F{i}::columns(v, c);
  for (long j = 0; j < n; ++j) out[j] = F{i}::apply(acc[j], c, s);
}}
"""


def _all(y: Sequence[jax.Array]) -> list[jax.Array]:
    return [OPERATIONS[name](x, c) for x, (name, c) in zip(y, CASES, strict=True)]


@pytest.fixture(scope="module")
def epilogues() -> list[ir.Epilogue]:
    """Of a function with a product for every case, as the matcher reads it."""

    def fun(xs: Sequence[jax.Array], w: jax.Array) -> list[jax.Array]:
        return _all([x @ w for x in xs])

    like = jax.ShapeDtypeStruct((16, 16), jnp.float32)
    report = jax_bolt.explain(fun, [like] * len(CASES), like)
    assert len(report.sites) == len(CASES) and report.coverage == 1.0
    return [site.region.epilogue for site in report.sites if site.region is not None]


@pytest.fixture(scope="module")
def values(compiled, epilogues) -> tuple[np.ndarray, list[np.ndarray]]:
    """Accumulators, and what the functor of each case makes of them."""
    parts = []
    for i, epilogue in enumerate(epilogues):
        text = codegen.functor(epilogue, f"F{i}")
        columns = max(1, int(text.split("kColumns = ")[1].split(";")[0]))
        parts += [text, RUN.format(i=i, columns=columns)]
    library = compiled("\n".join(parts))
    rng = np.random.default_rng(0)
    acc = np.concatenate(
        [[0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan], rng.standard_normal(57)]
    ).astype(np.float32)
    found = []
    for i in range(len(epilogues)):
        out = np.empty_like(acc)
        pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (acc, out)]
        getattr(library, f"run_{i}")(ctypes.c_long(len(acc)), *pointers)
        found.append(out)
    return acc, found


def same(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Equal, both NaN, or apart by the rounding of a product with a reciprocal."""
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(got - want) <= 2 * np.spacing(np.abs(want)) + TINY
    return (got == want) | near | (np.isnan(got) & np.isnan(want))


def test_functors_against_numpy(values):
    acc, found = values
    for (name, c), got in zip(CASES, found, strict=True):
        with np.errstate(all="ignore"):
            want = REFERENCE[name](acc, np.float32(c))
        assert same(got, want).all(), (name, c, got[:8], want[:8])


def is_subnormal(value: float) -> bool:
    return 0 < abs(value) < TINY


def test_functors_against_jax(values):
    """But for subnormal constants and divisors of subnormal reciprocals.

    XLA takes subnormal numbers for zero on CPUs: inf / 3e38 is NaN there.
    """
    acc, found = values
    want = [np.asarray(y) for y in jax.jit(_all)([acc] * len(CASES))]
    compared = 0
    for (name, c), got, y in zip(CASES, found, want, strict=True):
        if is_subnormal(c) or (name == "div" and c and is_subnormal(1 / c)):
            continue
        compared += 1
        assert same(got, y).all(), (name, c, got[:8], y[:8])
    assert compared > 200


def test_two_zeros_are_two_constants(epilogues):
    texts = {e.text for e, (name, c) in zip(epilogues, CASES, strict=True) if c == 0.0}
    assert any("[0x0.0p+0]" in text for text in texts)
    assert any("[-0x0.0p+0]" in text for text in texts)
