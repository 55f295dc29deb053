# SPDX-License-Identifier: Apache-2.0
"""Regions that end in a maximum over windows: sizes, texts, numbers, and refusals."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_lower import cuda_text, kernel, shape  # noqa: F401
from test_pool import H200, equal_bits, h200, pooled, windows  # noqa: F401

import jax_bolt
from jax_bolt._src import (
    arch,
    base,
    canonicalize,
    compat,
    evaluate,
    floor,
    forms,
    invoke,
    ir,
    match,
    plan,
    pool,
    region_text,
    resolve,
    rewrite,
)
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import conv_sm80, depthwise, implicit_gemm_sm90
from jax_bolt._src.options import Options
from jax_bolt._src.tune import isolate, measure

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


# --- Which regions end so


def conv(x, w, stride=1, layout=("NHWC", "HWIO", "NHWC")):
    strides = (stride, stride)
    return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=layout)


def stem(x, w, scale, offset):
    """As ResNet begins."""
    y = conv(x, w, 2).astype(jnp.float32) * scale[None, None, None]
    y = (y + offset[None, None, None]).astype(x.dtype)
    return pooled(jax.nn.relu(y), padding=((1, 1), (1, 1)))


F32 = jnp.float32
STEM = (
    shape(2, 36, 34, 3),
    shape(7, 7, 3, 16),
    *(shape(16, dtype=F32) for _ in range(2)),
)


def find(fun, *args, **kw):
    with jax.numpy_rank_promotion("allow"):
        program = canonicalize.inline_calls(jax.make_jaxpr(fun)(*args))
    found, refused = match.find_regions(program.jaxpr, **kw)
    assert not refused
    return found


def test_a_region_ends_in_its_pool():
    (found,) = find(stem, *STEM)
    assert found.region.pool == ir.Pool(
        window=(3, 3), stride=(2, 2), padding=(1, 1, 1, 1)
    )
    assert found.label == "conv7x7+affine+relu+max3x3/2"
    assert compat.aval_of(found.output).shape == (2, 9, 9, 16)
    assert found.result is None and found.region.stored_rows == 2 * 9 * 9
    (apart,) = find(stem, *STEM, pools=False)
    assert apart.region == dataclasses.replace(found.region, pool=None)
    assert apart.eqns == found.eqns[:-1]


IMAGE, FILTERS = shape(2, 12, 12, 16), shape(3, 3, 16, 16)


def returned(x, w):
    y = conv(x, w)
    return pooled(y), y


def twice(x, w):
    y = conv(x, w)
    return pooled(y) + pooled(y, (2, 2))


def inside_a_body(x, w):
    y = conv(x, w)
    return lax.cond(y.sum() > 0, lambda y: pooled(y), lambda y: pooled(-y), y)


def over_channels(x, w):
    y = conv(x, w)
    return lax.reduce_window(
        y, np.array(-np.inf, y.dtype), lax.max, (1, 2, 2, 2), (1, 2, 2, 2), "VALID"
    )


def dilated(x, w):
    y = conv(x, w)
    sizes = (1, 2, 2, 1), (1, 2, 2, 1)
    return lax.reduce_window(
        y,
        np.array(-np.inf, y.dtype),
        lax.max,
        *sizes,
        "VALID",
        window_dilation=(1, 2, 2, 1),
    )


def all_padding(x, w):
    return pooled(conv(x, w), (2, 2), padding=((2, 0), (0, 0)))


def from_nchw(x, w):
    y = conv(x, w, layout=("NHWC", "HWIO", "NCHW"))
    return lax.reduce_window(
        y, np.array(-np.inf, y.dtype), lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID"
    )


@pytest.mark.parametrize(
    "fun",
    [
        returned,
        twice,
        inside_a_body,
        over_channels,
        dilated,
        all_padding,
        from_nchw,
        lambda x, w: pooled(conv(x, w) + x),  # a side input
        lambda x, w: pooled(conv(x, w).astype(F32)),
        lambda x, w: pooled(conv(x, w), operation="min"),
        lambda x, w: pooled(conv(x, w), (5, 5)),
        lambda x, w: pooled(conv(x, w), (20, 1), padding="VALID"),  # nothing is left
        lambda x, w: pooled((x.reshape(-1, 16) @ w[0, 0]).reshape(x.shape)),
        lambda x, w: jax.grad(lambda w: pooled(conv(x, w)).astype(F32).sum())(w),
    ],
)
def test_no_region_ends_so(fun):
    found = find(fun, IMAGE, FILTERS)
    assert found and all(each.region.pool is None for each in found)


def test_it_can_be_disabled():
    with jax.numpy_rank_promotion("allow"):
        program = jax.make_jaxpr(stem)(*STEM)
    for disable, names in (
        ((), ["bolt_call"]),
        (("pool",), ["bolt_call", "reduce_window_max"]),
    ):
        done = rewrite.rewrite(program, Options(disable=disable)).program
        assert [eqn.primitive.name for eqn in done.jaxpr.eqns] == names


# --- What it means


def values(given, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(given))
    return [
        jax.random.normal(key, a.shape, F32).astype(a.dtype)
        for key, a in zip(keys, given, strict=True)
    ]


def test_it_is_the_users_equations():
    x, *rest = values(STEM)
    x = x.at[0, 4, 5, 1].set(jnp.nan)
    with jax.numpy_rank_promotion("allow"):
        for wrap in (jax.jit, lambda fun: jax.jit(jax.vmap(fun, (0, *(None,) * 3)))):
            given = x if wrap is jax.jit else jnp.stack([x, -x])
            got = wrap(jax_bolt.optimize(stem))(given, *rest)
            equal_bits(got, wrap(stem)(given, *rest))

        def loss(fun):
            def of_filters(w):
                return fun(values(STEM)[0], w, *rest[1:]).astype(F32).sum()

            return jax.jit(jax.grad(of_filters))

        equal_bits(loss(jax_bolt.optimize(stem))(rest[0]), loss(stem)(rest[0]))


def site(fun, *args):
    with jax.numpy_rank_promotion("allow"):
        done = rewrite.rewrite(jax.make_jaxpr(fun)(*args), Options())
    (found,) = done.family.sites
    return found


def pointwise(x, w):
    return pooled(jax.nn.relu(conv(x, w)), (2, 2), padding="VALID")


POINTWISE = shape(2, 12, 12, 16), shape(1, 1, 16, 24)


def executable(found, name):
    form = forms.form(found.region, name)
    assert form is not None, name
    return invoke.Executable("d" * 64, found.region.problem, form, 0)


def test_forms_pool_in_the_kernel_or_after_it():
    found = site(stem, *STEM).region
    names = [form.name for form in forms.forms(found)]
    whole = ["space_to_depth", "hwio", "krsc"]
    assert names == [*whole, *(f"{name}+xla" for name in whole)]
    for form in forms.forms(found):
        after = form.name.endswith("+xla")
        assert form.ends_on_xla == after and form.part is None
        assert form.pool == (found.pool if after else None)
        assert form.region.pool == (None if after else found.pool)
    names = [form.name for form in forms.forms(site(pointwise, *POINTWISE).region)]
    assert names == ["hwio", "pixels+xla"]
    candidates, _ = plan.candidates(found, HOPPER)
    assert {c.form.name for c in candidates} == {
        *("space_to_depth", "hwio", "space_to_depth+xla", "hwio+xla")
    }
    for c in (candidates[0], candidates[-1]):
        named = plan.named(found, HOPPER, c.form.name, c.template.name, c.config.text)
        assert named == c
    # Where no kernel pools, XLA does it after one that does not.
    others, _ = plan.candidates(found, arch.from_name("sm_80"))
    assert others and all(c.form.ends_on_xla for c in others)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that are evaluated in float32, from the regions that they are given."""

    def launch(executable, a, b, sides, vectors):
        region = executable.form.region
        (made,) = evaluate.outputs(region, a, b, sides, vectors)
        return [made.astype(invoke.JAX_DTYPES[region.epilogue.out_dtype])]

    monkeypatch.setattr(invoke, "launch", launch)


@pytest.mark.parametrize(
    ("fun", "args"), [(stem, STEM), (pointwise, POINTWISE)], ids=["stem", "1x1"]
)
def test_every_form_gives_the_same(launched, fun, args):
    found = site(fun, *args)
    operands = values(found.in_avals)
    (truth,) = measure.truth(found, operands)
    wanted = None
    for form in forms.forms(found.region):
        run = measure.kernel_function(found, executable(found, form.name))
        (got,) = jax.jit(run)(*operands)
        assert got.shape == found.out_avals[0].shape and got.dtype == jnp.bfloat16
        exact = np.asarray(truth).reshape(got.shape)
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error <= 0.01 * np.linalg.norm(exact)
        wanted = got if wanted is None else wanted
        # Sums in another order may be rounded to the next number.
        np.testing.assert_allclose(
            *(np.asarray(y, np.float32) for y in (got, wanted)), rtol=0.02, atol=0.05
        )


def test_what_xla_pools_is_what_it_would_have(h200):  # noqa: F811
    def apply(x):
        return pool.apply(
            ir.Pool(window=(3, 3), stride=(2, 2), padding=(0, 1, 0, 1)), x
        )

    (x,) = values([shape(2, 9, 8, 4)])
    equal_bits(apply(x), pooled(x, padding=((0, 1), (0, 1))))
    assert len(windows(cuda_text(apply, shape(32, 112, 112, 64)))) == 2


# --- What XLA is given


def calls(text):
    return [line for line in text.splitlines() if "@jax_bolt.launch" in line]


def net(x, w, scale, offset, v):
    """A stem, and two convs after it."""
    y = stem(x, w, scale, offset)
    return jax.nn.relu(conv(jax.nn.relu(conv(y, v)), v))


@pytest.fixture
def after(kernel, h200, monkeypatch):  # noqa: F811
    """For what pools a kernel that leaves it to XLA."""
    before = resolve.resolve

    def found(each, *rest):
        if each.region.pool is None:
            return before(each, *rest)
        return None, executable(each, "hwio+xla")

    monkeypatch.setattr(resolve, "resolve", found)


def text_of(fun, *args):
    with jax.numpy_rank_promotion("allow"):
        return cuda_text(fun, *args)


NET = (*STEM, shape(3, 3, 16, 16))


def test_a_kernel_that_pools_is_one_of_a_sequence(kernel):  # noqa: F811
    text = text_of(net, *NET)
    (call,) = calls(text)
    assert "kind = 3" in call and not windows(text)
    (call,) = calls(text_of(stem, *STEM))
    assert "tensor<162x16xbf16>" in call or "tensor<2x9x9x16xbf16>" in call


def test_a_pool_after_its_kernel_ends_a_sequence(after):
    text = text_of(net, *NET)
    first, second = calls(text)
    # As without it: the stem's own result, of 18 rows and 17 columns.
    assert "kind = 3" in first and "-> tensor<612x16xbf16>" in first
    assert "kind = 3" in second
    assert len(windows(text)) == 1
    alone = text_of(stem, *STEM)
    (call,) = calls(alone)
    assert len(windows(alone)) == 1 and "tensor<612x16xbf16>" in call


def test_unmeasured_what_is_estimated_to_be_faster_runs():
    """Windows that overlap much, of a conv that is bound by products."""
    heavy = dataclasses.replace(CONV, n=32, h=28, w=28, c=512, k=512)
    for size, stride, name in ((3, 1, "hwio+xla"), (2, 2, "hwio")):
        window = ir.Pool(window=(size, size), stride=(stride, stride))
        region = ir.Region(problem=heavy, epilogue=PLAIN, pool=window)
        made = plan.heuristic(region, H200)
        assert isinstance(made, plan.Plan) and made.candidate.form.name == name
        estimate = plan.estimate(region, H200)
        assert estimate is not None and estimate > floor.floor(region, H200).time_us
