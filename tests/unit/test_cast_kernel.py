# SPDX-License-Identifier: Apache-2.0
"""The native side of gathered casts, on a driver that casts on the host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import Build, program

from jax_bolt import _native
from jax_bolt._src import invoke
from jax_bolt._src.jit import codegen, compiler

BLOCK = 256 * 8 * 4  # elements
TABLE_BYTES = 128 * (8 + 8 + 8 + 4) + 8

Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def run(build: Build, tmp_path: Path) -> Run:
    driver = build("cuda.cc", "libcuda.so.1")
    path = tmp_path / "cast.cubin"

    def run(*programs: list[int], table: int = TABLE_BYTES, **env: str) -> Any:
        path.write_text(f"cast {table}")
        return program(driver, "cast.py", path, json.dumps(programs), **env)

    return run


def test_every_element_of_every_tensor_is_cast(run: Run) -> None:
    ragged = [1, 7, 8, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 3, 2]
    one, more, many, full = run(ragged, ragged[::-1], [3, BLOCK + 5] * 150, [9] * 128)
    blocks = 1 + 1 + 1 + 1 + 1 + 2 + 6 + 1
    programmatic = [6, 1, 0, 0]
    sizes = [blocks, 1, 1, 256, 1, 1, 0]
    assert one == {"launches": 1, "last": [*sizes, *programmatic]}
    assert more == one
    assert many["launches"] == 3 and many["last"][0] == (300 - 256) // 2 * 3
    assert full["launches"] == 1 and full["last"][0] == 128


def test_empty_tensors_are_passed_over(run: Run) -> None:
    some, none = run([0, 5, 0, BLOCK + 1, 0], [0, 0])
    assert some["launches"] == 1 and some["last"][0] == 3
    assert none["launches"] == 0


def test_before_hopper_a_launch_waits_for_the_one_ahead(run: Run) -> None:
    (seen,) = run([5], FAKE_CUDA_AMPERE="1")
    assert seen["last"] == [1, 1, 1, 256, 1, 1, 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"FAKE_CUDA_FAIL": "cuLibraryLoadFromFile"}, "cuLibraryLoadFromFile: CUDA_"),
        ({"FAKE_CUDA_FAIL": "cuLibraryGetKernel"}, "cuLibraryGetKernel of jax_bolt_ca"),
        ({"FAKE_CUDA_FAIL": "cuLaunchKernelEx"}, r"CUDA_ERROR_FAKE (a fake failure) ("),
        ({"table": 100}, f"jax_bolt_cast takes 100 bytes, not {TABLE_BYTES}"),
    ],
    ids=["load", "symbol", "launch", "table"],
)
def test_errors(run: Run, given: dict[str, Any], message: str) -> None:
    (seen,) = run([5], **given)
    assert "jax_bolt.launch: kernel casts: " in seen["error"]
    assert message in seen["error"]


@pytest.fixture(scope="module")
def target(build: Build) -> str:
    _native.load("module", str(build("kernel.cc", "kernel.so")))
    name = "jax_bolt_test.cast"
    jax.ffi.register_ffi_target(name, _native.host_handlers(), platform="cpu")
    return name


def test_a_kernel_of_regions_casts_nothing(target: str) -> None:
    call = jax.ffi.ffi_call(target, jax.ShapeDtypeStruct((3,), jnp.bfloat16))
    fun = jax.jit(lambda x: call(x, digest="module", kind=np.int64(invoke.CAST)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="is not a kernel that casts"):
        jax.block_until_ready(fun(np.ones(3, np.float32)))


def test_source() -> None:
    source = codegen.cast_source("float16")
    assert source.splitlines()[1:] == [
        '#include "jax_bolt/cast/cast.hpp"',
        "",
        "JAX_BOLT_CAST_KERNEL(__half)",
    ]
    assert compiler.artifact(source) == "cast"
    assert compiler.kernel(source) == "cast to float16"
