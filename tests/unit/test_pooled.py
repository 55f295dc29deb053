# SPDX-License-Identifier: Apache-2.0
"""Regions that end in a maximum over windows: sizes, texts, numbers, and refusals."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_bolt._src import arch, base, evaluate, forms, invoke, ir, plan, region_text
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import conv_sm80, depthwise, implicit_gemm_sm90
from jax_bolt._src.tune import isolate

HOPPER = arch.from_name("sm_90a")
PLAIN = ir.Epilogue((ir.Op("acc"),), 0, "bf16")
POOL = ir.Pool(window=(3, 2), stride=(2, 1), padding=(1, 0, 1, 1))
CONV = ir.ConvProblem(
    n=2, h=9, w=8, c=16, k=24, r=3, s=3, padding=(1, 1, 1, 1), dtype="bf16"
)
REGION = ir.Region(problem=CONV, epilogue=PLAIN, pool=POOL)


def test_sizes():
    assert POOL.sizes(9, 8) == (4, 9)
    assert ir.Pool(window=(2, 2), stride=(2, 2)).sizes(9, 1) == (4, 0)
    assert REGION.stored_rows == 2 * 4 * 9
    operands = 2 * 9 * 8 * 16 + 9 * 16 * 24
    assert REGION.bytes_moved == 2 * (operands + 2 * 4 * 9 * 24)
    sides = dataclasses.replace(PLAIN, sides=("f32",))
    with_side = dataclasses.replace(REGION, epilogue=sides)
    assert with_side.bytes_moved == REGION.bytes_moved + 4 * 2 * 9 * 8 * 24


def test_the_text_is_read_back():
    assert REGION.text.endswith("bf16:%0} max[3x2 st2x1 pad1x0x1x1]")
    assert region_text.parse(REGION.text) == REGION
    plain = dataclasses.replace(REGION, pool=None)
    assert REGION.text.startswith(plain.text)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("max[", "min["),
        ("3x2", "3"),
        ("3x2", "1x2"),  # a window of padding alone
        ("st2x1", "st0x1"),
        ("pad1x0x1x1", "pad1x0x1"),
        ("pad1x0x1x1", "pad-1x0x1x1"),
        ("conv[bf16 n2h9w8c16 k24r3s3 st1x1 pad1x1x1x1 dil1x1]", "gemm[]"),
        (";bf16:%0}", ";bf16:%0,bf16:%0}"),  # of two outputs
    ],
)
def test_what_is_no_pool(old, new):
    assert old in REGION.text
    with pytest.raises(ValueError):
        region_text.parse(REGION.text.replace(old, new))


def test_a_pool_is_of_one_conv():
    gemm = ir.GemmProblem(m=8, n=8, k=8, dtype="bf16")
    with pytest.raises(ValueError, match="a conv's one result"):
        ir.Region(problem=gemm, epilogue=PLAIN, pool=POOL)
    two = dataclasses.replace(PLAIN, auxiliary=(ir.Output(0, "bf16"),))
    with pytest.raises(ValueError, match="a conv's one result"):
        dataclasses.replace(REGION, epilogue=two)
    second = ir.Region(problem=dataclasses.replace(gemm, m=72, k=24), epilogue=PLAIN)
    with pytest.raises(ValueError, match="does not pool"):
        ir.Chain(first=REGION, second=second, stored=True)


def test_what_it_computes():
    """Of the rounded result, NaN and what is below zero included."""
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.standard_normal(count), jnp.bfloat16)
        for count in CONV.operand_elements
    )
    a = a.at[1000].set(jnp.nan)
    (got,) = evaluate.outputs(REGION, a, b, [], [])
    (whole,) = evaluate.outputs(dataclasses.replace(REGION, pool=None), a, b, [], [])
    result = np.asarray(whole.astype(jnp.bfloat16), np.float32).reshape(2, 9, 8, 24)
    padded = np.full((2, 10, 10, 24), -np.inf, np.float32)
    padded[:, 1:, 1:9] = result
    want = np.stack(
        [
            np.stack(
                [padded[:, 2 * y : 2 * y + 3, x : x + 2].max((1, 2)) for x in range(9)],
                1,
            )
            for y in range(4)
        ],
        1,
    )
    assert np.isnan(want).any() and (want < 0).any()
    np.testing.assert_array_equal(
        np.asarray(got.astype(jnp.bfloat16), np.float32).reshape(want.shape), want
    )
    theirs = lax.reduce_window(
        jnp.asarray(result),
        -jnp.inf,
        lax.max,
        (1, *POOL.window, 1),
        (1, *POOL.stride, 1),
        ((0, 0), (1, 0), (1, 1), (0, 0)),
    )
    np.testing.assert_array_equal(theirs, want)


def test_outputs_have_the_pools_size():
    operands = isolate._operands(REGION)
    assert operands["output_bytes"] == [2 * 2 * 4 * 9 * 24]
    form = forms.Form("hwio", REGION)
    kernel = invoke.Executable("d" * 64, CONV, form, 0)
    assert kernel.form.region.stored_rows == 72


def test_only_the_implicit_gemm_pools():
    problem = dataclasses.replace(CONV, filter_layout="hwio")
    region = dataclasses.replace(REGION, problem=problem)
    found, _ = plan.candidates(region, HOPPER)
    assert {c.template.name for c in found} == {implicit_gemm_sm90.name}
    assert conv_sm80.supports(REGION, HOPPER) == "it does not pool"
    wide = dataclasses.replace(problem, groups=16, k=16)
    depths = dataclasses.replace(region, problem=wide)
    assert depthwise.supports(depths, HOPPER) == "it does not pool"
    # What times other kernels in a kernel's place knows no pool.
    assert base.plain(found[0]) is None


def test_the_source_names_the_window_and_no_size():
    problem = dataclasses.replace(CONV, filter_layout="hwio")
    one = dataclasses.replace(REGION, problem=problem)
    other = dataclasses.replace(one, problem=dataclasses.replace(problem, n=7, h=31))
    configs = [set(implicit_gemm_sm90.configs(r, HOPPER)) for r in (one, other)]
    for config in configs[0] & configs[1]:
        texts = {
            codegen.source(r, implicit_gemm_sm90, config, HOPPER) for r in (one, other)
        }
        assert len(texts) == 1
    config = implicit_gemm_sm90.configs(one, HOPPER)[0]
    text = codegen.source(one, implicit_gemm_sm90, config, HOPPER)
    assert "jax_bolt::implicit_gemm::MaxPool<3, 2, 2, 1>>)" in text
