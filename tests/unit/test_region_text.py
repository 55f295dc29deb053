# SPDX-License-Identifier: Apache-2.0
"""Texts of regions are read back."""

from __future__ import annotations

import dataclasses
import math

import pytest
import region_cases

from jax_bolt._src import ir, region_text

CONV = ir.ConvProblem(n=1, h=9, w=8, c=7, k=6, r=5, s=4, dtype="f16")


@pytest.mark.parametrize("case", region_cases.GEMMS + region_cases.CONVS, ids=str)
def test_what_is_written_is_read(case):
    region = case.site().region
    assert region_text.parse(region.text) == region


def test_all_that_a_problem_can_be():
    ops = (
        ir.Op("acc"),
        ir.Op("const", attr=math.inf),
        ir.Op("const", attr=-0.1),
        ir.Op("vector", attr=0),
        ir.Op("integer_pow", (0,), attr=-3),
        ir.Op("clamp", (1, 4, 2)),
    )
    vectors = (ir.Vector("f32", scalar=True), ir.Vector("bf16"))
    epilogue = ir.Epilogue(ops, 5, "f16", vectors, ("bf16", "bool"))
    problems = (
        ir.GemmProblem(m=1, n=20, k=300, batch=4, dtype="f32", b_layout="col"),
        ir.ConvProblem(
            **dict.fromkeys("nhwckrs", 3),
            stride=(1, 2),
            padding=(-1, 2, 30, 4),
            dilation=(2, 1),
            dtype="f16",
            filter_layout="hwio",
        ),
        dataclasses.replace(CONV, groups=8, c=8, k=16),
        dataclasses.replace(CONV, groups=4, c=4, filter_layout="hwio"),
    )
    for problem in problems:
        region = ir.Region(problem=problem, epilogue=epilogue)
        assert region_text.parse(region.text) == region
        if isinstance(problem, ir.ConvProblem):
            pool = ir.Pool(window=(3, 2), stride=(2, 1), padding=(2, 0, 1, 0))
            region = dataclasses.replace(region, pool=pool)
            assert region_text.parse(region.text) == region
    nan = dataclasses.replace(epilogue, ops=(ir.Op("const", attr=math.nan), *ops))
    text = ir.Region(problem=problems[0], epilogue=nan).text
    assert region_text.parse(text).text == text


GOOD = "gemm[bf16 row,row m8n8k8] ()(){%0=acc();bf16:%0}"


@pytest.mark.parametrize(
    "old, new",
    [
        ("gemm", "germ"),
        ("bf16 row", "f64 row"),
        ("m8", "m08"),
        ("m8", ""),
        ("acc", "ack"),
        ("acc()", "acc(%0)"),
        ("%0=", "%1="),
        (":%0", ":%1"),
        ("()(", "(bf16)("),
        (";bf16:%0}", ""),
        ("}", "} "),
    ],
)
def test_what_is_no_region(old, new):
    region_text.parse(GOOD)
    with pytest.raises(ValueError):
        region_text.parse(GOOD.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("st1x1", "st1"),
        ("st1x1", "st1x1x1"),
        ("st1x1", "st0x1"),
        ("dil1x1", "dil1x0"),
        ("dil1x1", "dil1x1 g0"),
        ("dil1x1", "dil1x1 g2"),
        ("pad0x0x0x0", "pad0x0"),
        ("0x1.8000000000000p+0", "0x1p99999"),
        ("0x1.8000000000000p+0", "nothing"),
    ],
)
def test_what_is_no_conv(old, new):
    problem = ir.ConvProblem(n=3, h=3, w=3, c=3, k=3, r=3, s=3, dtype="f16")
    ops = (ir.Op("acc"), ir.Op("const", attr=1.5))
    text = ir.Region(problem=problem, epilogue=ir.Epilogue(ops, 1, "f16")).text
    assert region_text.parse(text) and old in text
    with pytest.raises(ValueError):
        region_text.parse(text.replace(old, new))
