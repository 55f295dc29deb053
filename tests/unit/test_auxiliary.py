# SPDX-License-Identifier: Apache-2.0
"""Programs whose regions store more than their result: what becomes of them."""

from __future__ import annotations

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases
from jax import lax
from test_lower import cuda_text, kernel  # noqa: F401

import jax_bolt
from jax_bolt._src import ir, options, rewrite
from jax_bolt._src.primitive import bolt_call_p

F32 = jnp.float32


# A pre-activation ResNet (v2) --------------------------------------------------------


def convolve(x: Any, w: Any, stride: int, nchw: bool) -> Any:
    form = ("NCHW", "OIHW", "NCHW") if nchw else ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=form)


def norm_relu(x: Any, p: Any, nchw: bool) -> Any:
    """BatchNorm with stored statistics, and relu."""
    mean, var, scale, offset = p
    if nchw:
        mean, var, scale, offset = (v[:, None, None] for v in p)
    y = (x.astype(F32) - mean) * (lax.rsqrt(var + 1e-5) * scale) + offset
    return jax.nn.relu(y.astype(x.dtype))


def resnet_v2(params: Any, x: Any, *, nchw: bool = False) -> Any:
    x = convolve(x, params["stem"], 1, nchw)
    for block in params["blocks"]:
        y = norm_relu(x, block["norm_0"], nchw)
        stride = 2 if "shortcut" in block else 1
        kept = convolve(y, block["shortcut"], stride, nchw) if stride > 1 else x
        y = convolve(y, block["conv_0"], stride, nchw)
        y = norm_relu(y, block["norm_1"], nchw)
        x = convolve(y, block["conv_1"], 1, nchw) + kept
    x = norm_relu(x, params["norm"], nchw)
    return x.mean((2, 3) if nchw else (1, 2)) @ params["dense"]


def parameters(dtype: Any = F32, nchw: bool = False) -> tuple[Any, Any]:
    """Of three blocks, of which the second halves the image; and an image."""
    rng = np.random.default_rng(0)

    def filters(size: int, inputs: int, outputs: int) -> Any:
        w = rng.standard_normal((size, size, inputs, outputs))
        w = w / (size * inputs**0.5)
        return jnp.asarray(w.transpose(3, 2, 0, 1) if nchw else w, dtype)

    def norm(channels: int) -> Any:
        return [jnp.asarray(rng.uniform(0.5, 1.5, channels), F32) for _ in range(4)]

    blocks = []
    for inputs, outputs in ((8, 8), (8, 16), (16, 16)):
        block = {"norm_0": norm(inputs), "conv_0": filters(3, inputs, outputs)}
        block |= {"norm_1": norm(outputs), "conv_1": filters(3, outputs, outputs)}
        if inputs != outputs:
            block["shortcut"] = filters(1, inputs, outputs)
        blocks.append(block)
    made = {"stem": filters(3, 8, 8), "blocks": blocks, "norm": norm(16)}
    made["dense"] = jnp.asarray(rng.standard_normal((16, 8)), dtype)
    x = rng.standard_normal((2, 8, 8, 8))
    return made, jnp.asarray(x.transpose(0, 3, 1, 2) if nchw else x, dtype)


@pytest.fixture
def promoting():
    """Users' code is not held to what ours is."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def rewritten(fun: Any, *args: Any) -> rewrite.Rewritten:
    return rewrite.rewrite(jax.make_jaxpr(fun)(*args), options.Options())


@pytest.mark.parametrize("nchw", [False, True])
def test_norms_before_convs_are_in_the_convs_before_those(promoting, nchw):
    done = rewritten(functools.partial(resnet_v2, nchw=nchw), *parameters(nchw=nchw))
    convs = [s.region.epilogue for s in done.family.sites if "conv" in s.label]
    # Sums (and the stem) that a shortcut reads raw are stored, too; the second block's
    # shortcut is a conv, which reads what the norm made of them.
    assert [len(e.outputs) for e in convs] == [2, 1, 1, 1, 1, 2, 1, 1]
    assert sum("bn" in s.label for s in done.family.sites) == 7
    left = {eqn.primitive.name for eqn in done.program.jaxpr.eqns}
    assert "bolt_sequence" in left
    assert left <= {"bolt_sequence", "bolt_call", "transpose", "reduce_sum", "div"}


@pytest.mark.parametrize("nchw", [False, True])
def test_it_means_the_same_under_every_transform(promoting, nchw):
    args = parameters(nchw=nchw)
    model = functools.partial(resnet_v2, nchw=nchw)
    fun = jax_bolt.optimize(model)

    def check(transform: Any) -> None:
        want, got = transform(model), transform(fun)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
        jax.tree.map(close, got, want)

    check(lambda f: f(*args))
    check(lambda f: jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1))(*args))
    check(lambda f: jax.jvp(lambda x: f(args[0], x), args[1:], args[1:]))
    check(lambda f: jax.vmap(lambda x: f(args[0], x))(jnp.stack([args[1]] * 2)))
    check(lambda f: jax.jit(jax.checkpoint(lambda x: f(args[0], x)))(args[1]))
    if not nchw:
        frozen = jax_bolt.freeze(model, args[0])
        check(lambda f: frozen(args[1]) if f is fun else f(*args))


def test_bfloat16_rounds_what_is_stored(promoting):
    args = parameters(jnp.bfloat16)
    got, want = jax_bolt.optimize(resnet_v2)(*args), jax.jit(resnet_v2)(*args)
    assert got.dtype == want.dtype == jnp.bfloat16
    got, want = (np.asarray(y, np.float32) for y in (got, want))
    assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)


# Small programs ----------------------------------------------------------------------

SQUARE = cases.shape(8, 8)


def both(x: Any, w: Any, r: Any) -> Any:
    total = x @ w + r
    return jax.nn.relu(total), total


def values(count: int = 3) -> list[Any]:
    keys = jax.random.split(jax.random.key(0), count)
    return [jax.random.normal(key, (8, 8)) for key in keys]


def test_a_reader_of_what_is_stored_may_come_first():
    """The call goes before it, and what the call reads before that."""

    def fun(x, w, r):
        total = x @ w
        ordered = jnp.sort(total, axis=0)
        return ordered, jax.nn.relu(total + jnp.cumsum(r, axis=0)) + total, total

    done = rewritten(fun, *values())
    names = [eqn.primitive.name for eqn in done.program.jaxpr.eqns]
    assert names == ["cumsum", "bolt_call", "sort"]
    got, want = jax_bolt.optimize(fun)(*values()), fun(*values())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


def test_effects_keep_their_order(capfd):
    def fun(x, w, r):
        total = x @ w
        jax.debug.print("first {}", total[0, 0] * 0, ordered=True)
        result = jax.nn.relu(total + r)
        jax.debug.print("second {}", result[0, 0] * 0, ordered=True)
        return result, total

    assert [len(s.out_avals) for s in rewritten(fun, *values()).family.sites] == [2]
    jax.block_until_ready(jax_bolt.optimize(fun)(*values()))
    jax.effects_barrier()
    assert capfd.readouterr().out.split() == ["first", "0.0", "second", "0.0"]


def test_a_loops_carry_and_what_it_collects():
    def fun(x, w, r):
        return lax.scan(lambda c, _: both(c, w, r), x, None, length=3)

    done = rewritten(fun, *values())
    (site,) = done.family.sites
    assert len(site.region.epilogue.outputs) == 2
    got, want = jax_bolt.optimize(fun)(*values()), fun(*values())
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), got, want)


@pytest.mark.parametrize(
    ("read", "ops"), [(0, ["max"]), (1, ["add"]), (slice(None), ["max", "add"])]
)
def test_what_nothing_reads_is_not_stored(kernel, read, ops):  # noqa: F811
    fun = jax_bolt.optimize(lambda *args: both(*args))
    args = [SQUARE] * 3

    def some(*given: Any) -> Any:
        return fun(*given)[read]

    (site,) = [
        eqn.params["site"]
        for eqn in jax.jit(some).trace(*args).jaxpr.eqns[0].params["jaxpr"].eqns
        if eqn.primitive is bolt_call_p
    ]
    assert len(site.region.epilogue.outputs) == 2
    text = jax.jit(some).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert f"outputs = {len(ops)} : i64" in text
    kept = [s for s in text.splitlines() if "custom_call @jax_bolt.launch" in s]
    assert len(kept) == 1 and kept[0].count("tensor<8x8xbf16>") == 3 + len(ops)
    # Each has a region of its own, which is tuned with the others.
    family = jax.make_jaxpr(some)(*args).jaxpr.eqns[0].params["jaxpr"].eqns
    regions = {s.region for eqn in family for s in eqn.params["family"].sites}
    found = [
        [r.epilogue.ops[o.value].name for o in r.epilogue.outputs] for r in regions
    ]
    assert ops in found


def test_the_call_has_a_result_for_each(kernel):  # noqa: F811
    text = cuda_text(both, *[SQUARE] * 3)
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    assert "outputs = 2" in call
    assert "(tensor<8x8xbf16>, tensor<8x8xbf16>, tensor<128xui8>)" in call


def test_a_sequence_reads_what_was_stored_in_it(kernel):  # noqa: F811
    def fun(x, w, r):
        activated, total = both(x, w, r)
        return both(activated, w, total)

    text = cuda_text(fun, *[SQUARE] * 3)
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    # An arena of 128 bytes for each of two values and of two workspaces.
    assert "(tensor<8x8xbf16>, tensor<8x8xbf16>, tensor<768xui8>)" in call
    (numbers,) = re.findall(r"program = dense<\[(.*?)\]>", call)
    assert numbers.startswith("2, 2,")


def test_the_report_says_so():
    report = jax_bolt.explain(both, *[SQUARE] * 3, arch="sm_90a")
    (site,) = report.sites
    assert site.epilogue == "dot+add+relu+aux"
    assert isinstance(site.region, ir.Region)
    assert site.region.text.endswith("bf16:%4,bf16:%2}")
    assert site.kernel.startswith("implicit_gemm_sm90")
    older = jax_bolt.explain(both, *[SQUARE] * 3, arch="sm_80")
    assert older.sites[0].kernel.startswith("gemm_sm80")


def test_what_a_backward_pass_needs_is_stored(promoting):
    def loss(weights, x):
        for w in weights:
            x = jax.nn.relu(x @ w + 1.0)
        return jnp.sin(x).sum()

    x, *weights = values(4)
    grad = jax.grad(loss)
    stored = [
        len(site.region.epilogue.outputs)
        for site in rewritten(grad, weights, x).family.sites
    ]
    assert stored.count(2) >= 2
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, jax_bolt.optimize(grad)(weights, x), grad(weights, x))


def test_it_can_be_turned_off():
    disabled = options.Options(disable=("auxiliary",))
    done = rewrite.rewrite(jax.make_jaxpr(both)(*values()), disabled)
    (site,) = done.family.sites
    assert len(site.region.epilogue.outputs) == 1


def test_the_report_names_what_xla_does_before():
    """Where no region can: on the image, or on a concatenation."""

    def fun(image, w, skip):
        x = (image - 0.5).astype(jnp.bfloat16) * jnp.bfloat16(4)
        x = x @ w
        x = jnp.concatenate([x, skip], axis=1)
        x = jax.nn.relu(x).reshape(2, 4, 16)
        return jax.nn.relu(x @ jnp.ones((16, 8), jnp.bfloat16)) @ w

    args = cases.shape(8, 8, dtype=F32), SQUARE, SQUARE
    first, second, third = jax_bolt.explain(fun, *args, arch="sm_90a").sites
    assert first.prologue == "sub, convert_element_type, mul"
    assert second.prologue == "relu"
    assert third.prologue == ""
