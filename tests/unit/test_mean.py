# SPDX-License-Identifier: Apache-2.0
"""Regions that end in the mean over an image: spellings, numbers, and refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from test_lower import cuda_text, kernel, shape  # noqa: F401
from test_pool import H200, equal_bits, h200  # noqa: F401
from test_pooled import calls, conv, executable, find, launched, site  # noqa: F401

import jax_bolt
from jax_bolt._src import (
    arch,
    compat,
    evaluate,
    floor,
    forms,
    ir,
    plan,
    region_text,
    resolve,
    rewrite,
)
from jax_bolt._src.codesign import variants
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import implicit_gemm_sm90
from jax_bolt._src.options import Options
from jax_bolt._src.tune import isolate, measure

HOPPER = arch.from_name("sm_90a")
F16, F32 = jnp.float16, jnp.float32
ADDED = ir.Epilogue(
    (ir.Op("acc"), ir.Op("side", attr=0), ir.Op("add", (0, 1))),
    2,
    "bf16",
    sides=("bf16",),
)
CONV = ir.ConvProblem(n=3, h=7, w=5, c=16, k=24, r=1, s=1, dtype="bf16")
MEAN = ir.Pool(window=(7, 5), operation="mean")
REGION = ir.Region(problem=CONV, epilogue=ADDED, pool=MEAN)


def test_sizes():
    assert REGION.stored_rows == 3 and MEAN.sizes(7, 5) == (1, 1)
    operands, pixels = 3 * 35 * 16 + 16 * 24, 3 * 35
    assert REGION.bytes_moved == 2 * (operands + pixels * 24 + 3 * 24)
    assert isolate._operands(REGION)["output_bytes"] == [2 * 3 * 24]
    assert isolate._operands(REGION)["sides"][0][1] == 2 * pixels * 24
    least = floor.floor(REGION, H200)
    assert least.bytes_moved == REGION.bytes_moved


def test_the_text_is_read_back():
    assert REGION.text.endswith("bf16:%2} mean[7x5 st1x1 pad0x0x0x0]")
    assert region_text.parse(REGION.text) == REGION
    assert MEAN.label == "mean7x5"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("mean[7x5", "mean[7x4"),  # a part of the image
        ("mean[7x5 st1x1", "mean[7x5 st7x5"),
        ("pad0x0x0x0", "pad1x0x0x0"),
        ("mean[", "sum["),
    ],
)
def test_what_is_no_mean(old, new):
    assert old in REGION.text
    with pytest.raises(ValueError):
        region_text.parse(REGION.text.replace(old, new))


def test_one_binary_for_all_sizes():
    """Sizes, the window's too, are in the recipe."""
    problem = dataclasses.replace(CONV, filter_layout="hwio")
    one = dataclasses.replace(REGION, problem=problem)
    other = ir.Region(
        problem=dataclasses.replace(problem, n=9, h=5, w=7),
        epilogue=ADDED,
        pool=ir.Pool(window=(5, 7), operation="mean"),
    )
    configs = [set(implicit_gemm_sm90.configs(r, HOPPER)) for r in (one, other)]
    assert configs[0] & configs[1]
    for config in configs[0] & configs[1]:
        first, second = (
            codegen.source(r, implicit_gemm_sm90, config, HOPPER) for r in (one, other)
        )
        assert first == second and "jax_bolt::implicit_gemm::MeanPool>)" in first


# --- Which regions end so


def last_block(x, w, residual, scale, offset, average=None):
    """As ResNet's last block ends, and what follows it."""
    y = conv(x, w).astype(F32) * scale[None, None, None] + offset[None, None, None]
    y = jax.nn.relu(y.astype(x.dtype) + residual)
    return (average or over_image)(y)


def over_image(y):
    return jnp.mean(y, axis=(1, 2))


def kept(y):
    return jnp.mean(y, axis=(1, 2), keepdims=True)


def as_flax_pools(y, padding: Any = "VALID"):
    """``nn.avg_pool`` over the whole image, and the reshape that follows it."""
    window = (1, *y.shape[1:3], 1)
    total = lax.reduce_window(y, 0.0, lax.add, window, window, padding)
    return (total / (y.shape[1] * y.shape[2])).reshape(y.shape[0], -1)


def wide(y):
    return jnp.mean(y.astype(F32), axis=(1, 2))


def block(dtype=jnp.bfloat16):
    """Arguments of ``last_block``."""
    images = (shape(3, 7, 5, 16, dtype=dtype), shape(1, 1, 16, 24, dtype=dtype))
    vectors = (shape(24, dtype=F32),) * 2
    return *images, shape(3, 7, 5, 24, dtype=dtype), *vectors


def ending(average):
    return lambda *args: last_block(*args, average=average)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, F16, F32], ids=str)
@pytest.mark.parametrize("average", [over_image, kept, as_flax_pools])
def test_a_region_ends_in_its_mean(average, dtype):
    (found,) = find(ending(average), *block(dtype))
    assert found.region.pool == MEAN
    assert found.region.epilogue.sides == (found.region.epilogue.out_dtype,)
    assert found.region.epilogue.out_dtype == found.region.problem.dtype
    assert found.label == "conv1x1+affine+add+relu+mean7x5"
    assert compat.aval_of(found.output).size == 3 * 24
    (apart,) = find(ending(average), *block(dtype), pools=False)
    assert apart.region.pool is None and apart.region.problem == found.region.problem
    assert set(apart.eqns) < set(found.eqns)


def test_a_mean_of_wider_results():
    """That is not rounded: the region's result is float32, as the mean is."""
    (found,) = find(ending(wide), *block())
    assert found.region.pool == MEAN and found.region.epilogue.out_dtype == "f32"
    assert found.region.epilogue.sides == ("bf16",)


def test_a_mean_that_is_read_in_float32_besides():
    def both(y):
        mean = jnp.mean(y.astype(F32), axis=(1, 2))
        return mean.astype(jnp.bfloat16), mean

    (found,) = find(ending(both), *block())
    assert found.region.pool == MEAN and found.region.epilogue.out_dtype == "f32"


def in_nchw(x, w, residual):
    layout = ("NCHW", "OIHW", "NCHW")
    y = jax.nn.relu(conv(x, w, layout=layout) + residual)
    return jnp.mean(y, axis=(2, 3))


NCHW = shape(3, 16, 7, 5), shape(24, 16, 1, 1), shape(3, 24, 7, 5)


def test_in_nchw():
    (found,) = find(in_nchw, *NCHW)
    assert found.region.pool == MEAN and found.result is None
    given = values(NCHW)
    equal_bits(jax.jit(jax_bolt.optimize(in_nchw))(*given), jax.jit(in_nchw)(*given))


IMAGE, FILTERS = shape(3, 7, 7, 16), shape(3, 3, 16, 16)


def returned(x, w):
    y = conv(x, w)
    return over_image(y), y


def gated(x, w):
    """Squeeze and excite: the result is needed as a whole."""
    y = conv(x, w)
    return y * jax.nn.sigmoid(kept(y))


def with_variance(x, w):
    y = conv(x, w).astype(F32)
    mean = jnp.mean(y, axis=(1, 2))
    return mean, jnp.mean(jnp.square(y), axis=(1, 2)) - jnp.square(mean)


def of_rows(x, w):
    return jnp.mean(conv(x, w), axis=1)


def of_channels(x, w):
    return jnp.mean(conv(x, w), axis=(1, 2, 3))


def total_of(x, w):
    return jnp.sum(conv(x, w).astype(F32), axis=(1, 2))


def other_count(x, w):
    return total_of(x, w) / 48


def count_over_total(x, w):
    return 49 / total_of(x, w)


def total_is_read(x, w):
    total = total_of(x, w)
    return total / 49, total


def padded(x, w):
    return as_flax_pools(conv(x, w), padding=((0, 0), (1, 0), (0, 0), (0, 0)))


@pytest.mark.parametrize(
    "fun",
    [
        *(returned, gated, with_variance, of_rows, of_channels, total_of, other_count),
        *(count_over_total, total_is_read, padded),
        lambda x, w: over_image((x.reshape(-1, 16) @ w[0, 0]).reshape(x.shape)),
    ],
)
def test_no_region_ends_so(fun):
    found = find(fun, IMAGE, FILTERS)
    assert found and all(each.region.pool is None for each in found)


def test_it_can_be_disabled():
    with jax.numpy_rank_promotion("allow"):
        program = jax.make_jaxpr(last_block)(*block())
    mean = ["reduce_sum", "div", "convert_element_type"]
    for disable, names in (((), []), (("pool",), mean)):
        done = rewrite.rewrite(program, Options(disable=disable)).program
        found = [eqn.primitive.name for eqn in done.jaxpr.eqns]
        assert found == ["bolt_call", *names]


# --- What it means


def values(given, seed=1):
    keys = jax.random.split(jax.random.key(seed), len(given))
    return [
        jax.random.normal(key, a.shape, F32).astype(a.dtype)
        for key, a in zip(keys, given, strict=True)
    ]


@pytest.mark.parametrize("average", [over_image, kept, as_flax_pools, wide])
def test_it_is_the_users_equations(average):
    fun, given = ending(average), values(block())
    given[0] = given[0].at[0, 4, 3, 1].set(jnp.nan)
    with jax.numpy_rank_promotion("allow"):
        equal_bits(jax.jit(jax_bolt.optimize(fun))(*given), jax.jit(fun)(*given))

        def loss(fun):
            def of_filters(w, x, *rest):
                return fun(x, w, *rest).astype(F32).sum()

            return jax.jit(jax.grad(of_filters))

        x, w, *rest = values(block())
        equal_bits(loss(jax_bolt.optimize(fun))(w, x, *rest), loss(fun)(w, x, *rest))


def test_what_it_computes():
    """The mean of the results, those that are not finite too."""
    rng = np.random.default_rng(0)
    a, b = (
        jnp.asarray(rng.standard_normal(count), jnp.bfloat16)
        for count in CONV.operand_elements
    )
    a = a.at[1000].set(jnp.nan)
    side = jnp.asarray(rng.standard_normal(3 * 35 * 24), jnp.bfloat16)
    (got,) = evaluate.outputs(REGION, a, b, [side], [])
    whole = dataclasses.replace(REGION, pool=None)
    (results,) = evaluate.outputs(whole, a, b, [side], [])
    want = np.asarray(results).reshape(3, 35, 24).mean(1)
    assert np.isnan(want).any() and not np.isnan(want).all()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_as_a_site_of_its_own():
    alone = variants.site(dataclasses.replace(REGION, problem=CONV), "alone")
    assert alone.out_avals[0].shape == (3, 1, 1, 24)
    operands = values(alone.in_avals)
    assert operands[2].shape == (3, 7, 5, 24)
    (got,) = compat.jaxpr_as_fun(alone.reference)(*operands)
    (truth,) = measure.truth(alone, operands)
    exact = np.asarray(truth).reshape(got.shape)
    np.testing.assert_allclose(np.asarray(got, np.float32), exact, atol=0.02)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, F32], ids=str)
@pytest.mark.parametrize("average", [over_image, kept])
def test_every_form_gives_the_same(launched, average, dtype):  # noqa: F811
    found = site(ending(average), *block(dtype))
    operands = values(found.in_avals)
    (truth,) = measure.truth(found, operands)
    inside = "krsc" if dtype == F32 else "hwio"
    names = [form.name for form in forms.forms(found.region)]
    assert names[0] == inside and all(name.endswith("+xla") for name in names[1:])
    for form in forms.forms(found.region):
        run = measure.kernel_function(found, executable(found, form.name))
        (got,) = jax.jit(run)(*operands)
        assert got.shape == found.out_avals[0].shape and got.dtype == dtype
        exact = np.asarray(truth).reshape(got.shape)
        error = np.linalg.norm(np.asarray(got, np.float32) - exact)
        assert error <= 0.01 * np.linalg.norm(exact)
    candidates, _ = plan.candidates(found.region, HOPPER)
    kinds = {c.form.name for c in candidates}
    assert inside in kinds and any(name.endswith("+xla") for name in kinds)
    assert {c.template.name for c in candidates} == {implicit_gemm_sm90.name}


def test_large_images_are_left_to_xla():
    problem = dataclasses.replace(CONV, h=112, w=112)
    window = ir.Pool(window=(112, 112), operation="mean")
    region = dataclasses.replace(REGION, problem=problem, pool=window)
    found, _ = plan.candidates(region, HOPPER)
    assert found and all(c.form.ends_on_xla for c in found)
    made = plan.heuristic(region, H200)
    assert isinstance(made, plan.Plan) and made.candidate.form.pool == window


def test_unmeasured_a_small_mean_is_the_kernels():
    problem = ir.ConvProblem(n=32, h=7, w=7, c=512, k=2048, r=1, s=1, dtype="bf16")
    window = ir.Pool(window=(7, 7), operation="mean")
    region = ir.Region(problem=problem, epilogue=ADDED, pool=window)
    made = plan.heuristic(region, H200)
    assert isinstance(made, plan.Plan) and made.candidate.form.name == "hwio"
    apart = dataclasses.replace(region, pool=None)
    with_mean, without = (plan.estimate(r, H200) for r in (region, apart))
    assert with_mean is not None and without is not None
    assert floor.floor(region, H200).time_us < with_mean < 1.3 * without


# --- What XLA is given


def net(x, w, residual, scale, offset, dense):
    return last_block(x, w, residual, scale, offset) @ dense


NET = (*block(), shape(24, 16))


def test_it_and_the_last_product_are_one_call(kernel):  # noqa: F811
    with jax.numpy_rank_promotion("allow"):
        (call,) = calls(cuda_text(net, *NET))
        assert "kind = 3" in call
        (call,) = calls(cuda_text(ending(kept), *block()))
    assert "tensor<3x24xbf16>" in call or "tensor<3x1x1x24xbf16>" in call


@pytest.mark.parametrize("average", [over_image, kept])
def test_a_mean_after_its_kernel_ends_a_sequence(kernel, h200, average, monkeypatch):  # noqa: F811
    before = resolve.resolve

    def found(each, *rest):
        if each.region.pool is None:
            return before(each, *rest)
        return None, executable(each, "pixels+xla")

    monkeypatch.setattr(resolve, "resolve", found)

    def then(*args):
        *given, dense = args
        return last_block(*given, average=average).reshape(3, 24) @ dense

    with jax.numpy_rank_promotion("allow"):
        text = cuda_text(then, *NET)
    first, second = calls(text)
    # The conv's own result, of 35 pixels an image.
    assert "-> tensor<105x24xbf16>" in first
    assert "stablehlo.reduce" in text and "tensor<3x16xbf16>" in second
