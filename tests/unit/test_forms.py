# SPDX-License-Identifier: Apache-2.0
"""Every form of a region computes the region."""

import dataclasses

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
    return jax.random.normal(jax.random.key(seed), shape)


def conv_problem(**kw):
    return ir.ConvProblem(
        **{"n": 2, "h": 11, "w": 9, "c": 3, "k": 5, "r": 3, "s": 3} | kw
    )


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
]


@pytest.mark.parametrize("problem", CONVS, ids=lambda p: p.text)
def test_conv_forms(problem):
    x = random(0, problem.n, problem.h, problem.w, problem.c)
    w = random(1, problem.r, problem.s, problem.c, problem.k)
    top, bottom, left, right = problem.padding
    want = lax.conv_general_dilated(
        x,
        w,
        problem.stride,
        ((top, bottom), (left, right)),
        rhs_dilation=problem.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )
    found = forms.forms(plain(problem))
    assert found
    for form in found:
        a, b = forms.prepare(form.name, problem, x, w)
        executed = form.region.problem
        assert (executed.rows, executed.channels) == (problem.rows, problem.channels)
        assert (a.size, b.size) == executed.operand_elements
        got = evaluate.evaluate(form.region, a, b, [], [])
        np.testing.assert_allclose(
            got.reshape(want.shape), want, rtol=1e-4, atol=1e-4, err_msg=form.name
        )


def test_stems_are_folded_exactly():
    """The ImageNet stem: 7x7, stride 2, C = 3 becomes 4x4, stride 1, C = 16."""
    problem = conv_problem(
        dtype="bf16", h=224, w=224, k=64, r=7, s=7, stride=(2, 2), padding=(3,) * 4
    )
    form = forms.forms(plain(problem))[0]
    assert form.name == "space_to_depth"
    folded = form.region.problem
    assert (folded.h, folded.w, folded.c, folded.r, folded.s) == (112, 112, 16, 4, 4)
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
    a, b = random(0, batch, m, k), random(1, batch, k, n)
    want = jnp.matmul(a, b, precision="highest").reshape(batch * m, n)
    lhs = a if layouts[0] == "row" else a.swapaxes(1, 2)
    rhs = b if layouts[1] == "row" else b.swapaxes(1, 2)
    for form in forms.forms(plain(problem)):
        prepared = forms.prepare(form.name, problem, lhs, rhs)
        got = evaluate.evaluate(form.region, *prepared, [], [])
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4, err_msg=form.name)


def test_unaligned_channels_get_a_form_that_loads_16_bytes():
    problem = conv_problem(dtype="bf16", c=46, k=32, padding=(1, 1, 1, 1))
    (form,) = forms.forms(plain(problem))
    assert form.region.problem == dataclasses.replace(problem, c=48)
