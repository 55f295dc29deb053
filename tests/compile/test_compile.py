# SPDX-License-Identifier: Apache-2.0
"""The compiler and the store with the real nvcc, on the smallest kernel there is."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from jax_bolt._src import arch, options, paths
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import compiler, store, toolchain

SOURCE = Path(__file__).with_name("fill.cu").read_text()
CUBIN_SOURCE = """
struct Params {
  struct alignas(64) { unsigned long long opaque[16]; } map;
  float* d;
  int value;
};
#define JAX_BOLT_DEVICE_KERNEL(Type) \\
  extern "C" __global__ void jax_bolt_kernel(const __grid_constant__ Type p) { \\
    p.d[threadIdx.x] = static_cast<float>(p.value); \\
  }
JAX_BOLT_DEVICE_KERNEL(Params)
"""


class Problem(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 16),
    )


@pytest.fixture
def kernels(cache_dir) -> store.Store:
    return store.Store(paths.kernel_root(options.current()))


def build(kernels: store.Store, source: str, name: str) -> store.Result:
    found = toolchain.find(options.current())
    (result,) = kernels.build(found, [source], arch.from_name(name)).values()
    return result


@pytest.mark.parametrize("name", ["sm_80", "sm_90a"])
def test_a_kernel_with_the_abi_is_built_and_opens(kernels, name):
    binary = build(kernels, SOURCE, name)
    assert isinstance(binary, Path), binary
    module = ctypes.CDLL(str(binary))
    assert module.jax_bolt_abi_version() == int(
        toolchain.find(options.current()).abi_version
    )
    problem = Problem(0, 4, (7, 8, 9, 1))
    assert module.jax_bolt_check(ctypes.byref(problem)) == 0
    module.jax_bolt_workspace_bytes.restype = ctypes.c_int64
    assert module.jax_bolt_workspace_bytes(ctypes.byref(problem), None) == 28
    for inner in ("_Z6hiddenv", "cudaMalloc"):
        assert not hasattr(module, inner), "only the ABI may be seen from outside"
    assert name in (binary.parent / "build.log").read_text()


def test_what_nvcc_refuses_is_an_error_with_its_log(kernels):
    result = build(kernels, SOURCE + "static_assert(sizeof(int) == 5);\n", "sm_90a")
    assert isinstance(result, CompileError)
    line = SOURCE.count("\n") + 1
    assert f"source.cu({line}): error: static assertion failed" in result.log
    assert kernels.entries() == []


def test_paths_with_commas_and_spaces(tmp_path):
    out = tmp_path / "a, b"
    out.mkdir()
    found = toolchain.find(options.current())
    binary = compiler.compile(found, SOURCE, arch.from_name("sm_80"), out)
    assert ctypes.CDLL(str(binary)).jax_bolt_abi_version() == int(found.abi_version)


def test_a_cubin_holds_its_one_kernel(kernels):
    binary = build(kernels, CUBIN_SOURCE, "sm_90a")
    assert isinstance(binary, Path), binary
    assert binary.name == "kernel.cubin"
    data = binary.read_bytes()
    assert data.startswith(b"\x7fELF")
    assert b".text.jax_bolt_kernel\0" in data
    log = (binary.parent / "build.log").read_text()
    assert "0 bytes spill stores" in log and "Used" in log


def test_every_template_compiles_as_it_is_indexed(kernels):
    source = Path(__file__).parents[2] / "cc" / "all_kernels.cu"
    assert isinstance(build(kernels, source.read_text(), "sm_90a"), Path)
