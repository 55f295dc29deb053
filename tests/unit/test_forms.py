# SPDX-License-Identifier: Apache-2.0
"""Every form of a region computes the region."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jax_bolt._src import evaluate, forms, ir


def plain(problem):
    ops = (ir.Op("acc"),)
    return ir.Region(
        problem=problem, epilogue=ir.Epilogue(ops=ops, result=0, out_dtype="f32")
    )


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def conv_problem(**kw: Any):
    sizes: dict[str, Any] = {"n": 2, "h": 11, "w": 9, "c": 3, "k": 5, "r": 3, "s": 3}
    return ir.ConvProblem(**sizes | kw)


def check(problem, lhs, rhs, want_fun):
    """Every form, on operands rearranged for it, has the value of ``want_fun``."""
    found = forms.forms(plain(problem))
    assert found

    # One program: compiling takes nearly all of the time.
    @jax.jit
    def values(lhs, rhs):
        results = []
        for form in found:
            a, b = forms.prepare(form.name, problem, lhs, rhs)
            assert (a.size, b.size) == form.region.problem.operand_elements
            results.append(evaluate.evaluate(form.region, a, b, [], []))
        return want_fun(lhs, rhs).reshape(problem.rows, problem.channels), results

    want, results = values(lhs, rhs)
    for form, got in zip(found, results, strict=True):
        executed = form.region.problem
        assert (executed.rows, executed.channels) == (problem.rows, problem.channels)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=form.name)


CONVS = [
    conv_problem(dtype="f32", padding=(1, 1, 1, 1)),
    conv_problem(dtype="bf16", padding=(0, 2, 1, 0), dilation=(2, 1), c=8),
    conv_problem(dtype="f32", c=1, stride=(2, 2), padding=(0, 1, 0, 1), r=3, s=3),
    conv_problem(dtype="bf16", stride=(2, 2), padding=(3, 3, 3, 3), r=7, s=7),
    conv_problem(dtype="bf16", stride=(2, 2), padding=(2, 3, 2, 3), r=7, s=7),
    conv_problem(dtype="bf16", stride=(2, 2), padding=(1, 0, 0, 0), r=4, s=2),
    conv_problem(
        dtype="bf16", stride=(2, 2), h=12, w=8, r=2, s=5, padding=(0, 0, 5, 1)
    ),
    conv_problem(dtype="bf16", stride=(2, 1), h=12, w=8),
    conv_problem(dtype="bf16", r=1, s=1, k=8, c=8),
    conv_problem(dtype="bf16", r=1, s=1, k=5, c=6),
    conv_problem(dtype="f16", r=1, s=1, stride=(2, 2)),
    conv_problem(dtype="bf16", r=1, s=1, stride=(3, 2), c=8, k=16),
    conv_problem(dtype="bf16", c=8, k=8, groups=8, stride=(1, 2)),
    conv_problem(dtype="bf16", c=8, k=16, groups=8, padding=(1, 1, 1, 1)),
    conv_problem(dtype="bf16", c=64, k=128, groups=32, padding=(1, 1, 1, 1)),
    conv_problem(dtype="bf16", c=96, k=96, groups=4, stride=(2, 2)),
    conv_problem(dtype="f16", c=9, k=24, groups=3, r=1, s=1),
    conv_problem(dtype="bf16", c=128, k=128, groups=2),
]


@pytest.mark.parametrize("problem", CONVS, ids=lambda p: p.text)
def test_conv_forms(problem):
    x = random(0, problem.n, problem.h, problem.w, problem.c)
    w = random(1, problem.r, problem.s, problem.group_channels, problem.k)
    top, bottom, left, right = problem.padding

    def want(x, w):
        return lax.conv_general_dilated(
            x,
            w,
            problem.stride,
            ((top, bottom), (left, right)),
            rhs_dilation=problem.dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=problem.groups,
            precision="highest",
        )

    check(problem, x, w, want)


def test_stems_are_folded_exactly():
    """The ImageNet stem: 7x7, stride 2, C = 3 becomes 4x4, stride 1, C = 16."""
    problem = conv_problem(
        dtype="bf16", h=224, w=224, k=64, r=7, s=7, stride=(2, 2), padding=(3,) * 4
    )
    form = forms.forms(plain(problem))[0]
    assert form.name == "space_to_depth"
    folded = form.region.problem
    assert isinstance(folded, ir.ConvProblem)
    # With its padding in width written out: 2 blocks before, 1 after.
    assert (folded.h, folded.w, folded.c, folded.r, folded.s) == (112, 115, 16, 4, 4)
    assert (folded.p, folded.q) == (112, 112)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize(
    "layouts", [(a, b) for a in ("row", "col") for b in ("row", "col")]
)
@pytest.mark.parametrize("sizes", [(8, 16, 24, 1), (5, 7, 9, 3), (1, 1000, 12, 1)])
def test_gemm_forms(dtype, layouts, sizes):
    m, n, k, batch = sizes
    problem = ir.GemmProblem(
        m=m,
        n=n,
        k=k,
        batch=batch,
        dtype=dtype,
        a_layout=layouts[0],
        b_layout=layouts[1],
    )
    swapped = [layout == "col" for layout in layouts]

    def stored(x, swap):
        return x.swapaxes(1, 2) if swap else x

    def want(lhs, rhs):
        a, b = map(stored, (lhs, rhs), swapped)
        return jnp.matmul(a, b, precision="highest")

    lhs = stored(random(0, batch, m, k), swapped[0])
    rhs = stored(random(1, batch, k, n), swapped[1])
    check(problem, lhs, rhs, want)


def test_unaligned_channels_get_a_form_that_loads_16_bytes():
    problem = conv_problem(dtype="bf16", c=46, k=32, padding=(1, 1, 1, 1))
    hwio, krsc = forms.forms(plain(problem))
    assert hwio.region.problem == dataclasses.replace(problem, filter_layout="hwio")
    assert krsc.region.problem == dataclasses.replace(problem, c=48)
