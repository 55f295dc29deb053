# SPDX-License-Identifier: Apache-2.0
"""What the sm80 templates take, and what they suggest."""

from __future__ import annotations

import dataclasses

import pytest

from jax_bolt._src import arch, ir
from jax_bolt._src.kernels import conv_sm80, gemm_sm80, tiles

SM80, SM86, SM90A = (arch.from_name(n) for n in ("sm_80", "sm_86", "sm_90a"))
IDENTITY = ir.Epilogue((ir.Op("acc"),), 0, "bf16")
GEMM = ir.GemmProblem(m=512, n=256, k=128, dtype="bf16")
CONV = ir.ConvProblem(
    n=32, h=56, w=56, c=64, k=64, r=3, s=3, padding=(1, 1, 1, 1), dtype="bf16"
)


def region(problem: ir.Problem, epilogue=IDENTITY, **changes) -> ir.Region:
    return ir.Region(problem=dataclasses.replace(problem, **changes), epilogue=epilogue)


def arguments(template, region: ir.Region, index: int = 0) -> list[str]:
    config = template.configs(region, SM80)[index]
    text = template.instantiate(region, config, SM80)
    return text.partition("<")[2].rstrip(">").split(", ")


@pytest.mark.parametrize(
    ("template", "asked", "words"),
    [
        (gemm_sm80, region(CONV), "not a matrix product"),
        (conv_sm80, region(GEMM), "not a conv"),
        (gemm_sm80, region(GEMM, k=127), "A's rows of 127"),
        (gemm_sm80, region(GEMM, n=127), "B's rows of 127"),
        (gemm_sm80, region(GEMM, m=0), "empty"),
        (gemm_sm80, region(GEMM, batch=65536), "batch 65536"),
        (conv_sm80, region(CONV, c=3), "3 input channels"),
        (conv_sm80, region(CONV, padding=(-1, 0, 0, 0)), "negative padding"),
        (conv_sm80, region(CONV, r=57, padding=(0, 0, 1, 1)), "empty"),
        (conv_sm80, region(CONV, r=33), "33x3 filter"),
        (conv_sm80, region(CONV, h=2**20, w=2**10), "2^31"),
    ],
)
def test_refusals_have_a_reason(template, asked, words):
    reason = template.supports(asked, SM80)
    assert reason is not None and words in reason


def test_too_many_operands_are_refused():
    many = ir.Epilogue((ir.Op("acc"),), 0, "bf16", (ir.Vector("f32"),) * 9)
    assert "9 per-channel inputs" in str(gemm_sm80.supports(region(GEMM, many), SM80))
    three = ir.Epilogue((ir.Op("acc"),), 0, "bf16", (), ("bf16",) * 3)
    assert "3 side inputs" in str(conv_sm80.supports(region(CONV, three), SM80))


@pytest.mark.parametrize(
    ("template", "problem"), [(gemm_sm80, GEMM), (conv_sm80, CONV)]
)
def test_turing_is_refused(template, problem):
    assert "sm_75" in template.supports(region(problem), arch.from_name("sm_75"))


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("device", [SM80, SM86, SM90A], ids=lambda a: a.name)
@pytest.mark.parametrize(
    ("template", "problem"), [(gemm_sm80, GEMM), (conv_sm80, CONV)]
)
def test_candidates_are_few_distinct_and_fit(template, problem, device, dtype):
    asked = region(problem, dtype=dtype)
    assert template.supports(asked, device) is None
    configs = template.configs(asked, device)
    assert len(set(configs)) == len(configs)
    assert (2 if device is SM90A else 3) <= len(configs) <= 6
    table = tiles.of_item(template._TILES, ir.ITEM_BYTES[dtype])
    fitting = {
        (t.shape, t.warp, t.stages)
        for t in table
        if tiles.fits(t, dtype, IDENTITY, device)
    }
    assert {(c["tile"], c["warp"], c["stages"]) for c in configs} <= fitting


@pytest.mark.parametrize(
    ("changes", "alignments"),
    [
        ({}, ["8", "8", "8"]),
        ({"k": 20}, ["4", "8", "8"]),
        ({"n": 250}, ["8", "2", "2"]),
        ({"n": 250, "b_layout": "col"}, ["8", "8", "2"]),
        ({"m": 36, "a_layout": "col"}, ["4", "8", "8"]),
        ({"dtype": "f32"}, ["4", "4", "8"]),
        ({"dtype": "f32", "k": 33, "n": 31, "m": 7}, ["1", "1", "1"]),
    ],
)
def test_gemm_alignments_are_those_of_the_contiguous_extents(changes, alignments):
    assert arguments(gemm_sm80, region(GEMM, **changes))[4:7] == alignments


def test_gemm_layouts():
    got = arguments(gemm_sm80, region(GEMM, a_layout="col", b_layout="col"))
    assert got[2:4] == ["cutlass::layout::ColumnMajor"] * 2


@pytest.mark.parametrize(
    ("c", "r", "few"),
    [(64, 3, {"0"}), (8, 3, {"8"}), (16, 4, {"16"}), (24, 3, {"0"}), (8, 40, {"8"})],
)
def test_few_channels_run_densely(c, r, few):
    asked = region(CONV, c=c, r=r, s=r, padding=(r // 2,) * 4)
    assert conv_sm80.supports(asked, SM80) is None
    configs = conv_sm80.configs(asked, SM80)
    assert {str(config["few_channels"]) for config in configs} == few


def test_few_channels_fill_no_more_than_a_tile():
    (dense,) = {conv_sm80._depth(CONV, 64, 0)}
    assert dense == 9 * 64
    stem = dataclasses.replace(CONV, c=8, r=7, s=7)
    assert conv_sm80._depth(stem, 64, 8) == 448  # 7 * 7 * 8 = 392
    assert conv_sm80._depth(stem, 64, 0) == 49 * 64


def test_small_problems_get_small_tiles_and_large_ones_large():
    def area(problem: ir.GemmProblem) -> int:
        tile = gemm_sm80.configs(region(problem), SM80)[0]["tile"]
        m, n, _ = map(int, str(tile).split("x"))
        return m * n

    small = dataclasses.replace(GEMM, m=32, n=512, k=2048)
    large = dataclasses.replace(GEMM, m=8192, n=8192, k=2048)
    assert area(small) == 64 * 64 and area(large) == 256 * 128
