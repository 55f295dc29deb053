# SPDX-License-Identifier: Apache-2.0
"""The Hopper GEMM through nvcc, and its epilogue's device code on the CPU."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import on_cpu
import pytest

from jax_bolt._src import arch, ir, options
from jax_bolt._src.jit import codegen, compiler, toolchain
from jax_bolt._src.kernels import gemm_sm90

HOPPER = arch.from_name("sm_90a")
OK, WRONG_KIND, UNSUPPORTED = 0, -1, -2
EXPORTS = "abi_version check workspace_bytes launch error_string".split()


class Problem(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 16),
    )


def batch_norm_region() -> ir.Region:
    """relu((acc - mean) * (rsqrt(var + eps) * scale) + bias + side)."""
    acc, mean, variance, scale, bias, side, eps, zero = range(8)
    ops = (
        ir.Op("acc"),
        *(ir.Op("vector", attr=i) for i in range(4)),
        ir.Op("side", attr=0),
        ir.Op("const", attr=1e-5),
        ir.Op("const", attr=0.0),
        ir.Op("add", (variance, eps)),  # 8
        ir.Op("rsqrt", (8,)),
        ir.Op("mul", (9, scale)),  # 10
        ir.Op("sub", (acc, mean)),
        ir.Op("mul", (11, 10)),
        ir.Op("add", (12, bias)),
        ir.Op("add", (13, side)),
        ir.Op("max", (14, zero)),
    )
    return ir.Region(
        problem=ir.GemmProblem(m=6272, n=1024, k=256, dtype="bf16"),
        epilogue=ir.Epilogue(
            ops, len(ops) - 1, "bf16", (ir.Vector("f32"),) * 4, ("bf16",)
        ),
    )


@pytest.fixture(scope="module")
def found() -> toolchain.Toolchain:
    return toolchain.find(options.current())


@pytest.fixture(scope="module")
def module(found, tmp_path_factory) -> Path:
    """The best config for a BatchNorm region, compiled once for all tests here."""
    region = batch_norm_region()
    config = gemm_sm90.configs(region, HOPPER)[0]
    source = codegen.source(region, gemm_sm90, config, HOPPER)
    assert "kColumns = 3" in source, "scale * rsqrt(var + eps) is one column"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
        return compiler.compile(
            found, source, HOPPER, tmp_path_factory.mktemp("gemm_sm90")
        )


def test_ptxas_neither_spills_nor_serialises(module):
    log = (module.parent / compiler.LOG).read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills, "ptxas said nothing of spills"
    assert set(spills) == {("0", "0")}
    assert "C7510" not in log


def test_the_module_exports_the_abi(module):
    library = ctypes.CDLL(str(module))
    assert all(hasattr(library, f"jax_bolt_{name}") for name in EXPORTS)


@pytest.mark.parametrize(
    ("kind", "dims", "status"),
    [
        (0, (6272, 1024, 256, 1), OK),
        (0, (1, 8, 8, 1), OK),
        (0, (2**31 - 2**13, 64, 8, 1), OK),
        (0, (129, 136, 72, 3), OK),
        (0, (128, 129, 64, 1), UNSUPPORTED),  # N is B's, D's and the side's row
        (0, (128, 128, 65, 1), UNSUPPORTED),  # K is A's row
        (0, (128, 128, 0, 1), UNSUPPORTED),
        (0, (2**31, 128, 64, 1), UNSUPPORTED),
        (0, (2**30, 2**20, 64, 1), UNSUPPORTED),  # too many tiles
        (1, (1,) * 15, WRONG_KIND),
    ],
)
def test_check_agrees_with_supports(module, kind, dims, status):
    library = ctypes.CDLL(str(module))
    problem = Problem(kind, len(dims), dims)
    assert library.jax_bolt_check(ctypes.byref(problem)) == status
    if kind == 0:
        m, n, k, batch = dims
        region = ir.Region(
            problem=ir.GemmProblem(m=m, n=n, k=k, batch=batch, dtype="bf16"),
            epilogue=batch_norm_region().epilogue,
        )
        assert (gemm_sm90.supports(region, HOPPER) is None) == (status == OK)


def test_no_workspace(module):
    library = ctypes.CDLL(str(module))
    library.jax_bolt_workspace_bytes.restype = ctypes.c_int64
    problem = Problem(0, 4, (6272, 1024, 256, 1))
    device = (ctypes.c_int32 * 2)(0, 132)
    assert library.jax_bolt_workspace_bytes(ctypes.byref(problem), device) == 0


def test_every_element_gets_its_channel(found, tmp_path):
    """The epilogue node's own device code, run on the CPU for whole CTA tiles."""
    source = Path(__file__).with_name("epilogue_sm90.cpp")
    printed = on_cpu.output_of(source, found, tmp_path)
    assert printed.count("0 errors") == 4
