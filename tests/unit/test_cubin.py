# SPDX-License-Identifier: Apache-2.0
"""The native module's cubins and launch recipes, on a driver that takes notes."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import FAKES, Build
from test_recipe import COLUMNS, MAP, RECIPE

from jax_bolt import _native
from jax_bolt._src.kernels import recipe
from jax_bolt._src.kernels.recipe import Recipe, TensorMap

GEMM, DIMS = 0, [4, 3, 5, 1]
BYTES = RECIPE.parameter_bytes
# a, b, outputs, sides, vectors, workspace
SET = [0x1000, 0x2000, [0x3000], [0x4000, 0x5000], [0x100 * i for i in range(1, 9)], 0]
ENCODED = list(RECIPE.encode())

Call = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def cubin(tmp_path: Path) -> Callable[[int], str]:
    def write(parameter_bytes: int) -> str:
        path = tmp_path / f"of{parameter_bytes}.cubin"
        path.write_text(f"cubin {parameter_bytes}")
        return str(path)

    return write


@pytest.fixture
def call(build: Build) -> Call:
    driver = build("cuda.cc", "libcuda.so.1")

    def run(*calls: list[Any], **env: str) -> list[dict[str, Any]]:
        script = str(FAKES / "cubin.py")
        command = [sys.executable, script, _native.__file__, json.dumps(calls)]
        env |= {"LD_LIBRARY_PATH": str(driver.parent), "PYTHONPATH": str(FAKES.parent)}
        done = subprocess.run(
            command, env=os.environ | env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def launch(call: Call, cubin: Any) -> Callable[..., dict[str, Any]]:
    """One launch of a recipe on a fresh kernel."""

    def run(given: Recipe, buffers: Any = SET, **env: str) -> dict[str, Any]:
        path = cubin(given.parameter_bytes)
        run = ["run", "k", GEMM, DIMS, buffers, 0, list(given.encode())]
        return call(["load", "k", path], run, **env)[1]

    return run


def map_of(address: int) -> tuple[int, ...]:
    """What the fake driver makes of MAP: all it was given."""
    packed = [0, 0]
    for i, values in enumerate((MAP.box, MAP.steps)):
        for value in values:
            packed[i] = packed[i] << 12 | value
    return (
        *(address + MAP.offset, 6, 4, 3),  # FLOAT16, rank, SWIZZLE_128B
        *(64, 8, 7, 5, 0),
        *(128, 1024, 7168, 0),
        *packed,
        0 << 16 | 3 << 8 | 0,  # no interleave, L2_256B, zeros
    )


def test_the_parameters_are_maps_pointers_and_ints(launch: Any) -> None:
    seen = launch(RECIPE)
    assert seen["value"] is None
    words = struct.unpack("<16Q4Q2i", bytes.fromhex(seen["parameters"]))
    assert words[:16] == map_of(0x1000)
    assert words[16:20] == (0, 0x3000, 0x5000, 0x800)
    assert words[20:] == (5, -6)


def test_the_launch(launch: Any) -> None:
    seen = launch(RECIPE)
    size = [132, 1, 1, 384, 1, 1, 100_000]
    cluster, programmatic = [4, 2, 1, 1], [6, 1, 0, 0]
    assert seen["launch"] == [*size, *cluster, *programmatic]
    assert seen["attributes"] == [1, 100_000]


def test_a_launch_without_attributes(launch: Any) -> None:
    plain = dataclasses.replace(RECIPE, cluster=1, programmatic=False, smem_bytes=0)
    seen = launch(plain)
    assert seen["launch"] == [132, 1, 1, 384, 1, 1, 0]
    assert seen["attributes"] == [0, 0]


@pytest.mark.parametrize(
    ("dtype", "swizzle", "want"),
    [("bf16", 64, (9, 2)), ("f32", 32, (7, 1)), ("tf32", 128, (11, 3))],
)
def test_types_and_swizzles(launch: Any, dtype: Any, swizzle: int, want: Any) -> None:
    number = recipe.DTYPES.index(dtype)
    tensor = TensorMap(recipe.vector(0), number, (64,), (), (8,), (1,), swizzle)
    seen = launch(Recipe(32, 1, maps=(tensor,)))
    words = struct.unpack("<16Q", bytes.fromhex(seen["parameters"]))
    assert words[:5] == (0x100, want[0], 1, want[1], 64)
    launch(Recipe(32, 1, maps=(dataclasses.replace(tensor, swizzle=0),)))


def test_im2col_mode(launch: Any) -> None:
    seen = launch(Recipe(32, 1, maps=(COLUMNS,)))
    words = struct.unpack("<16Q", bytes.fromhex(seen["parameters"]))
    assert words[:4] == (0x1000, 9, 4, 3)  # BFLOAT16, rank, SWIZZLE_128B
    assert words[4:8] == COLUMNS.dims and words[9:12] == COLUMNS.strides
    assert words[12] == 0xFFFF0100
    channels_and_pixels = 64 << 36 | 32 << 24 | 1 << 12 | 1
    assert words[13:15] == (channels_and_pixels, 1 << 36 | 2 << 24 | 2 << 12 | 1)


def test_maps_are_encoded_once_and_given_each_calls_address(
    call: Call, cubin: Any
) -> None:
    runs = []
    for i in range(1, 4):
        a, *rest = SET
        assert isinstance(a, int)
        runs.append(["run", "k", GEMM, DIMS, [i * a, *rest], 0, ENCODED])
    seen = call(["load", "k", cubin(BYTES)], *runs)[1:]
    assert [s["encodes"] for s in seen] == [1, 1, 1]
    assert [s["replaces"] for s in seen] == [1, 2, 3]
    for i, s in enumerate(seen, 1):
        raw = bytes.fromhex(s["parameters"])
        assert struct.unpack_from("<16Q", raw) == map_of(0x1000 * i)


def test_recipes_of_one_kernel_are_kept_apart(call: Call, cubin: Any) -> None:
    less = dataclasses.replace(RECIPE, smem_bytes=50_000, grid=4)
    more = dataclasses.replace(RECIPE, smem_bytes=200_000)
    runs = [
        ["run", "k", GEMM, DIMS, SET, 0, list(given.encode())]
        for given in (RECIPE, less, more, RECIPE)
    ]
    seen = call(["load", "k", cubin(BYTES)], *runs)[1:]
    assert [s["encodes"] for s in seen] == [1, 2, 3, 3]
    # Shared memory is a property of the kernel: it is never taken away again.
    allowed = [[1, 100_000], [1, 100_000], [2, 200_000], [2, 200_000]]
    assert [s["attributes"] for s in seen] == allowed
    assert [s["launch"][0] for s in seen] == [132, 4, 132, 132]


def test_many_threads(call: Call, cubin: Any) -> None:
    at_once = ["at once", "run", "k", GEMM, DIMS, SET, 0, ENCODED]
    again = ["run", "k", GEMM, DIMS, SET, 0, ENCODED]
    first, second = call(["load", "k", cubin(BYTES)], at_once, again)[1:]
    assert first["replaces"] == 16
    assert second["encodes"] == first["encodes"]
    assert second["attributes"] == [1, 100_000]


def test_profile(call: Call, cubin: Any) -> None:
    sets = [[a, *SET[1:]] for a in (0x1000, 0x7000)]
    profile = ["profile", "k", GEMM, DIMS, sets, 0, 3, ENCODED]
    seen = call(["load", "k", cubin(BYTES)], profile)[1]
    assert seen["value"] == pytest.approx([132.0] * 3)  # captured into a graph
    assert seen["encodes"] == 1


def test_the_workspace_is_the_recipes(call: Call, cubin: Any) -> None:
    given = dataclasses.replace(RECIPE, workspace_bytes=4096).encode()
    asked = ["workspace_bytes", "k", GEMM, DIMS, 0, 132]
    seen = call(["load", "k", cubin(BYTES)], asked, [*asked, list(given)])
    assert [answer["value"] for answer in seen[1:]] == [0, 4096]


def test_a_prologue_is_launched_first(call: Call, cubin: Any) -> None:
    prologue = Recipe(64, 3, pointers=(recipe.A, recipe.D), ints=(7,))
    both = list(dataclasses.replace(RECIPE, prologue=prologue).encode())
    run = ["run", "k", GEMM, DIMS, SET, 0, both]
    profile = ["profile", "k", GEMM, DIMS, [SET], 0, 3, both]
    _, seen, profiled = call(["load", "k", cubin(BYTES)], run, profile)
    assert profiled["value"] == pytest.approx([135.0] * 3)
    # The last launch is the kernel's.
    assert seen["launch"][0] == 132
    words = struct.unpack("<16Q4Q2i", bytes.fromhex(seen["parameters"]))
    assert words[:16] == map_of(0x1000)


# --- What is refused


def _with_map(tensor: TensorMap) -> tuple[int, ...]:
    return dataclasses.replace(RECIPE, maps=(tensor,)).encode()


def changed(index: int, value: int) -> list[int]:
    return [*ENCODED[:index], value, *ENCODED[index + 1 :]]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ([], "it is a cubin, and the call has no launch recipe"),
        ([4, 384], "it ends before the grid"),
        (changed(0, 1), "the version is 1, not from 4 to 4"),
        (changed(1, 0), "threads is 0"),
        (changed(2, 2**40), "the grid is 1099511627776"),
        (changed(2, 131), "the cluster does not divide the grid"),
        (changed(3, 16), "the cluster is 16, not from 1 to 8"),
        (changed(4, -1), "shared memory is -1"),
        (changed(5, 2), "programmatic is 2"),
        (changed(6, -1), "the workspace is -1"),
        (changed(7, 2), "prologue is 2"),
        (changed(7, 1), "it ends before the version"),
        (
            list(dataclasses.replace(RECIPE, prologue=Recipe(0x20, 1, 1, 64)).encode()),
            "a prologue has no shared memory",
        ),
        (changed(34, 8), "a map's offset is not a multiple of 16"),
        (changed(8, 33), "the number of maps is 33"),
        (changed(8, 2), "it has 46 numbers, which is not what it says"),
        (changed(10, 2**62), "the number of ints is"),
        (ENCODED[:-1], "it has 45 numbers"),
        ([*ENCODED, 0], "it has 47 numbers"),
        (changed(11, -1), "a map's operand is -1"),
        (changed(12, 4), "a map's dtype is 4"),
        (changed(13, 6), "a map's rank is 6"),
        (changed(14, 0), "a map's dim is 0"),
        (changed(19, 8), "a map's stride is not a multiple of 16"),
        (changed(23, 257), "a map's box is 257"),
        (changed(28, 9), "a map's step is 9"),
        (changed(33, 96), "a map's swizzle is 96"),
        (changed(35, 2), "a map's mode is 2"),
        (changed(36, -129), "a map's corner is -129"),
        (changed(39, 128), "a map's corner is 128"),
        (
            [*_with_map(COLUMNS)[:13], 5, *_with_map(COLUMNS)[14:]],
            "a map in im2col mode has four dims",
        ),
        (changed(40, 20), "a pointer's operand is 20"),
        (changed(44, 2**31), "an int is 2147483648"),
        (
            list(Recipe(32, 1, ints=(0,) * 64).encode()),
            f"its parameters take {BYTES} bytes, and the launch recipe has 256",
        ),
    ],
)
def test_bad_recipes(call: Call, cubin: Any, numbers: list[int], message: str) -> None:
    _, check, run = call(
        ["load", "k", cubin(BYTES)],
        ["check", "k", GEMM, DIMS, numbers],
        ["run", "k", GEMM, DIMS, SET, 0, numbers],
        FAKE_CUDA_ACTIVE="1",
    )
    assert message in check["value"]
    assert run["error"] == f"RuntimeError: check: {check['value']}"
    assert run["encodes"] == 0 and run["launch"] == []


def test_too_many_parameters(call: Call, cubin: Any) -> None:
    numbers = [4, 32, 1, 1, 0, 0, 0, 0, 31, 0, 1024, *MAP.numbers * 31, *[0] * 1024]
    check = ["check", "k", GEMM, DIMS, numbers]
    seen = call(["load", "k", cubin(0)], check)[1]
    assert "more than 4096 bytes of parameters" in seen["value"]


def test_a_padded_struct(call: Call, cubin: Any) -> None:
    check = ["check", "k", GEMM, DIMS, ENCODED]
    for size, fits in ((256, True), (BYTES + 128, False), (BYTES - 4, False)):
        seen = call(["load", "k", cubin(size)], check, FAKE_CUDA_ACTIVE="1")[1]
        assert (seen["value"] is None) == fits


def test_a_thread_without_a_context_loads_kernels(call: Call, cubin: Any) -> None:
    """The number of parameters is then unknown, and no context is made to know it."""
    check = ["check", "k", GEMM, DIMS, ENCODED]
    loaded, checked = call(["load", "k", cubin(BYTES - 4)], check)
    assert loaded.get("error") is None and checked["value"] is None


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, 0x1008, r"a buffer is not aligned to 16 bytes, as TMA needs (status -4)"),
        (2, [0x3004], r"a buffer is not aligned to 16 bytes, as TMA needs (status -4)"),
        (3, [0x4000], r"names an operand that the call does not have (status -3)"),
        (0, 0, r"names an operand that the call does not have (status -3)"),
    ],
)
def test_bad_buffers(launch: Any, place: int, value: Any, message: str) -> None:
    seen = launch(RECIPE, [*SET[:place], value, *SET[place + 1 :]])
    assert seen["error"].startswith("RuntimeError: launch: ")
    assert seen["error"].endswith(message)
    assert seen["launch"] == []


@pytest.mark.parametrize(
    "failing",
    [
        "cuTensorMapEncodeTiled",
        "cuTensorMapReplaceAddress",
        "cuKernelSetAttribute",
        "cuLaunchKernelEx",
    ],
)
def test_the_drivers_own_errors(launch: Any, failing: str) -> None:
    error = launch(RECIPE, FAKE_CUDA_FAIL=failing)["error"]
    text = "launch: CUDA_ERROR_FAKE (a fake failure) (status 719)"
    assert error == f"RuntimeError: {text}"


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cuInit", "cuInit: CUDA_ERROR_FAKE (a fake failure)"),
        ("cuLibraryLoadFromFile", "cuLibraryLoadFromFile: CUDA_ERROR_FAKE"),
        ("cuLibraryGetKernel", "cuLibraryGetKernel of jax_bolt_kernel: CUDA_"),
        ("cuKernelGetParamInfo", "cuKernelGetParamInfo: CUDA_ERROR_FAKE"),
    ],
)
def test_cubins_that_do_not_load(
    call: Call, cubin: Any, failing: str, message: str
) -> None:
    path = cubin(BYTES)
    load, loaded = call(["load", "k", path], ["is_loaded", "k"], FAKE_CUDA_FAIL=failing)
    start = f"RuntimeError: cannot load kernel module {path}: {message}"
    assert load["error"].startswith(start)
    assert loaded["value"] is False


def test_a_cubin_without_a_driver(cubin: Any) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a CUDA driver")
    with pytest.raises(RuntimeError, match=r"of8\.cubin: no CUDA driver"):
        _native.load("nowhere", cubin(8))


# --- Modules, and the custom call's attribute


@pytest.fixture(scope="module")
def target(build: Build) -> str:
    _native.load("module", str(build("kernel.cc", "kernel.so")))
    name = "jax_bolt_test.recipe"
    jax.ffi.register_ffi_target(name, _native.host_handlers(), platform="cpu")
    return name


def test_a_module_takes_no_recipe(target: str) -> None:
    message = "it is a module, which takes no launch recipe"
    assert _native.check("module", GEMM, DIMS, []) is None
    assert _native.check("module", GEMM, DIMS, ENCODED) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], None),
        (np.array([], np.int64), None),
        (np.array(ENCODED, np.int64), "module, which takes no launch recipe"),
        (np.array([1], np.int32), "attribute recipe: "),
        ("text", "attribute recipe: "),
    ],
)
def test_the_attribute(target: str, given: Any, message: str | None) -> None:
    attributes = {} if isinstance(given, list) else {"recipe": given}
    out = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    call = jax.ffi.ffi_call(target, out)
    dims = np.array(DIMS, np.int64)

    def fun(a: Any, b: Any) -> Any:
        kind = sides = np.int64(0)
        return call(
            a, b, digest="module", kind=kind, dims=dims, sides=sides, **attributes
        )

    a, b = np.ones((4, 5), np.float32), np.ones((5, 3), np.float32)
    if message is None:
        np.testing.assert_array_equal(jax.jit(fun)(a, b), np.full((4, 3), 5))
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=message):
            jax.block_until_ready(jax.jit(fun)(a, b))
