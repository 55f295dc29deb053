# SPDX-License-Identifier: Apache-2.0
"""The sm80 kernels through nvcc, and their index arithmetic on the CPU."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from pathlib import Path

import on_cpu
import pytest

from jax_bolt._src import arch, ir, options
from jax_bolt._src.jit import codegen, compiler, toolchain
from jax_bolt._src.kernels import conv_sm80, gemm_sm80
from jax_bolt._src.kernels.template import Template

AMPERE = arch.from_name("sm_80")
HOPPER = arch.from_name("sm_90a")
OK, WRONG_KIND, UNSUPPORTED, MISALIGNED = 0, -1, -2, -4
# relu((acc * scale) + side)
EPILOGUE = ir.Epilogue(
    ops=(
        ir.Op("acc"),
        ir.Op("vector", attr=0),
        ir.Op("mul", (0, 1)),
        ir.Op("side", attr=0),
        ir.Op("add", (2, 3)),
        ir.Op("const", attr=0.0),
        ir.Op("max", (4, 5)),
    ),
    result=6,
    out_dtype="bf16",
    vectors=(ir.Vector("f32"),),
    sides=("bf16",),
)
STORING = dataclasses.replace(EPILOGUE, auxiliary=(ir.Output(4, "f32"),))
GEMM = ir.GemmProblem(m=6272, n=1024, k=256, dtype="bf16")
CONV = ir.ConvProblem(
    n=32, h=28, w=28, c=128, k=128, r=3, s=3, padding=(1, 1, 1, 1), dtype="bf16"
)


class Problem(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("num_dims", ctypes.c_int32),
        ("dims", ctypes.c_int64 * 16),
    )


class Buffers(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_void_p * count)
        for name, count in (
            *(("abd", 3), ("auxiliary", 1), ("sides", 2)),
            *(("vectors", 8), ("workspace", 1)),
        )
    )


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """(template, region, arch) -> the heuristic's kernel, compiled once."""
    known: dict[tuple[str, str], Path] = {}

    def build(template: Template, region: ir.Region, device: arch.GpuArch) -> Path:
        config = template.configs(region, device)[0]
        source = codegen.source(region, template, config, device)
        key = (source, device.name)
        if key not in known:
            found = toolchain.find(options.current())
            folder = tmp_path_factory.mktemp(template.name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NVCC_APPEND_FLAGS", "-Xptxas=-v")
                known[key] = compiler.compile(found, source, device, folder)
        return known[key]

    return build


@pytest.fixture(scope="module")
def gemm(build) -> Path:
    return build(gemm_sm80, ir.Region(problem=GEMM, epilogue=STORING), AMPERE)


@pytest.fixture(scope="module")
def conv(build) -> Path:
    return build(conv_sm80, ir.Region(problem=CONV, epilogue=EPILOGUE), HOPPER)


def conv_dims(**changes: int) -> tuple[int, ...]:
    dims = dict(n=32, h=28, w=28, c=128, k=128, r=3, s=3, p=28, q=28)
    dims |= dict(stride_h=1, stride_w=1, top=1, left=1, dilation_h=1, dilation_w=1)
    return tuple((dims | changes).values())


@pytest.mark.parametrize("which", ["gemm", "conv"])
def test_ptxas_spills_nothing(request, which):
    log = (request.getfixturevalue(which).parent / compiler.LOG).read_text()
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills and set(spills) == {("0", "0")}


@pytest.mark.parametrize(
    ("which", "kind", "dims", "status"),
    [
        ("gemm", 0, (6272, 1024, 256, 1), OK),
        ("gemm", 0, (1, 8, 8, 65535), OK),
        ("gemm", 0, (2**31 - 1025, 8, 8, 1), OK),
        ("gemm", 0, (2**31 - 1, 8, 8, 1), UNSUPPORTED),
        ("gemm", 0, (2**30, 2**20, 8, 1), UNSUPPORTED),  # too many tiles
        ("gemm", 0, (8, 8, 8, 65536), UNSUPPORTED),
        ("gemm", 0, (8, 12, 8, 1), UNSUPPORTED),  # N is B's and D's row
        ("gemm", 0, (8, 8, 12, 1), UNSUPPORTED),  # K is A's row
        ("gemm", 0, (8, 8, 0, 1), UNSUPPORTED),
        ("gemm", 1, conv_dims(), WRONG_KIND),
        ("conv", 1, conv_dims(), OK),
        ("conv", 1, conv_dims(n=10**6), OK),  # several launches
        ("conv", 1, conv_dims(stride_h=2, p=14, dilation_w=3, left=0), OK),
        ("conv", 1, conv_dims(h=2**15, w=2**15), UNSUPPORTED),  # one image above 2^31
        ("conv", 1, conv_dims(h=2**62, w=2**62), UNSUPPORTED),
        ("conv", 1, conv_dims(r=33), UNSUPPORTED),
        ("conv", 1, conv_dims(c=132), UNSUPPORTED),
        ("conv", 1, conv_dims(k=132), UNSUPPORTED),
        ("conv", 1, conv_dims(left=-1), UNSUPPORTED),
        ("conv", 1, conv_dims(n=0), UNSUPPORTED),
        ("conv", 0, (8, 8, 8, 1), WRONG_KIND),
    ],
)
def test_check(request, which, kind, dims, status):
    library = ctypes.CDLL(str(request.getfixturevalue(which)))
    assert (
        library.jax_bolt_check(ctypes.byref(Problem(kind, len(dims), dims))) == status
    )


def test_no_workspace_and_readable_errors(gemm):
    library = ctypes.CDLL(str(gemm))
    library.jax_bolt_workspace_bytes.restype = ctypes.c_int64
    library.jax_bolt_error_string.restype = ctypes.c_char_p
    problem = Problem(0, 4, (6272, 1024, 256, 1))
    device = (ctypes.c_int32 * 2)(0, 132)
    assert library.jax_bolt_workspace_bytes(ctypes.byref(problem), device) == 0
    assert b"aligned" in library.jax_bolt_error_string(MISALIGNED)
    assert b"invalid argument" in library.jax_bolt_error_string(1)


@pytest.mark.parametrize("slot", ["a", "b", "d", "auxiliary", "side"])
def test_misaligned_buffers_are_refused_before_any_launch(gemm, slot):
    library = ctypes.CDLL(str(gemm))
    pointers = dict.fromkeys(("a", "b", "d", "auxiliary", "side"), 1 << 20)
    pointers[slot] += 8
    a, b, d, auxiliary, side = pointers.values()
    buffers = Buffers((a, b, d), (auxiliary,), (side, 0))
    problem = Problem(0, 4, (64, 64, 64, 1))
    device = (ctypes.c_int32 * 2)(0, 132)
    status = library.jax_bolt_launch(
        ctypes.byref(problem), ctypes.byref(buffers), device, None
    )
    assert status == MISALIGNED


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (gemm_sm80, ir.GemmProblem(m=66, n=34, k=70, dtype="f16", a_layout="col")),
        (gemm_sm80, ir.GemmProblem(m=33, n=35, k=37, dtype="f32", b_layout="col")),
        (conv_sm80, ir.ConvProblem(n=1, h=9, w=9, c=8, k=12, r=7, s=7, dtype="bf16")),
        (conv_sm80, ir.ConvProblem(n=1, h=9, w=9, c=6, k=31, r=3, s=3, dtype="f16")),
        (conv_sm80, ir.ConvProblem(n=1, h=9, w=9, c=33, k=31, r=3, s=3, dtype="f32")),
    ],
    ids=lambda value: getattr(value, "text", None),
)
def test_other_dtypes_layouts_and_alignments_compile(build, template, problem):
    region = ir.Region(problem=problem, epilogue=EPILOGUE)
    assert template.supports(region, AMPERE) is None
    assert build(template, region, AMPERE).is_file()


def test_indices_on_the_cpu(tmp_path):
    found = toolchain.find(options.current())
    source = Path(__file__).with_name("sm80_indices.cpp")
    printed = on_cpu.output_of(source, found, tmp_path)
    wrong = [line for line in printed.splitlines() if ": 0 errors" not in line]
    assert not wrong and len(printed.splitlines()) == 18
