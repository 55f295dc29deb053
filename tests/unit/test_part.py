# SPDX-License-Identifier: Apache-2.0
"""Kernels that end at an auxiliary output, and what XLA computes after them."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases
from jax import lax
from test_lower import cuda_text, kernel, shape  # noqa: F401

from jax_bolt._src import arch, evaluate, forms, invoke, ir, part, plan, resolve
from jax_bolt._src.jit import codegen
from jax_bolt._src.tune import measure

HOPPER = arch.from_name("sm_90a")
BF16, F32 = jnp.bfloat16, jnp.float32


def preactivation(x, w, r, scale, offset, bias):
    """The next residual, and BatchNorm and relu of it."""
    total = cases.conv(x, w) + bias.astype(x.dtype)[None, None, None] + r
    y = total.astype(F32) * scale[None, None, None] + offset[None, None, None]
    return jax.nn.relu(y.astype(x.dtype)), total


def args(dtype=BF16, size=(2, 6, 5, 8)):
    vector = cases.shape(size[-1], dtype=F32)
    image = cases.shape(*size, dtype=dtype)
    filters = cases.shape(3, 3, size[-1], size[-1], dtype=dtype)
    return image, filters, image, vector, vector, vector


def site(fun=preactivation, given=None):
    return cases.Case("two", fun, args() if given is None else given).site()


def of(fun, given=None):
    return part.of(site(fun, given).region.epilogue)


def test_the_part_has_what_it_needs_alone():
    found = of(preactivation)
    assert found is not None
    whole = found.whole
    assert found.stored == whole.auxiliary[0]
    # The residual and the bias; scale and offset are read by the rest.
    assert found.sides == (0,) and len(found.vectors) == 1
    assert len(whole.vectors) == 3
    assert len(found.epilogue.ops) < len(whole.ops)
    assert found.epilogue.auxiliary == () and found.epilogue.out_dtype == "bf16"
    rest = [op.name for _, op in found.rest]
    assert rest.count("vector") == 2 and rest[-1] == "max" and "acc" not in rest


def test_the_part_renames_what_it_reads():
    vectors = (ir.Vector("f32"), ir.Vector("bf16", scalar=True), ir.Vector("f16"))
    ops = (
        *(ir.Op("vector", attr=0), ir.Op("acc"), ir.Op("vector", attr=2)),
        *(ir.Op("side", attr=1), ir.Op("add", (1, 2)), ir.Op("mul", (4, 3))),
        *(ir.Op("sub", (5, 0)), ir.Op("side", attr=0), ir.Op("add", (6, 7))),
    )
    stored = (ir.Output(5, "f32"),)
    found = part.of(ir.Epilogue(ops, 8, "bf16", vectors, ("bf16", "f16"), stored))
    assert found is not None
    assert (found.sides, found.vectors) == ((1,), (2,))
    assert found.epilogue.text == (
        "(f16[n])(f16){%0=acc();%1=vector[0]();%2=side[0]();%3=add(%0,%1);"
        "%4=mul(%3,%2);f32:%4}"
    )
    assert [position for position, _ in found.rest] == [0, 6, 7, 8]


def with_accumulator(x, w):
    y = x @ w
    z = jax.nn.relu(y)
    return z + y * y, z


SQUARE = cases.shape(8, 8)


@pytest.mark.parametrize(
    ("fun", "given"),
    [
        (with_accumulator, (SQUARE, SQUARE)),  # the rest reads more than is stored
        (lambda x, w: jax.nn.relu(x @ w), (SQUARE, SQUARE)),  # one output
    ],
)
def test_no_part(fun, given):
    found = site(fun, given)
    assert part.of(found.region.epilogue) is None
    assert all(form.part is None for form in forms.forms(found.region))


def test_forms_with_a_part_come_last():
    region = site().region
    found = forms.forms(region)
    names = [form.name for form in found]
    assert names == ["hwio", "krsc", "hwio+xla", "krsc+xla"]
    for whole, leading in zip(found[:2], found[2:], strict=True):
        assert leading.part is not None and whole.part is None
        assert leading.region.problem == whole.region.problem
        assert len(leading.region.epilogue.outputs) == 1
    candidates, _ = plan.candidates(region, HOPPER)
    parts = [candidate.form.part is not None for candidate in candidates]
    assert any(parts) and parts == sorted(parts)
    assert {c.form.name for c in candidates} == {"hwio", "hwio+xla"}
    last = candidates[-1]
    names = last.form.name, last.template.name, last.config.text
    assert plan.named(region, HOPPER, *names) == last
    assert "Auxiliary" not in codegen.functor(last.form.region.epilogue)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that are evaluated in float32, from the regions that they are given."""
    seen = []

    def launch(executable, a, b, sides, vectors):
        region = executable.form.region
        seen.append((len(sides), len(vectors), len(region.epilogue.outputs)))
        made = evaluate.outputs(region, a, b, sides, vectors)
        dtypes = [invoke.JAX_DTYPES[o.dtype] for o in region.epilogue.outputs]
        return [y.astype(d) for y, d in zip(made, dtypes, strict=True)]

    monkeypatch.setattr(invoke, "launch", launch)
    return seen


def executable(site, name):
    form = forms.form(site.region, name)
    assert form is not None
    return invoke.Executable("d" * 64, site.region.problem, form, 0)


def nchw(x, w, r, scale, offset, bias):
    """The same in NCHW, as in models ported from PyTorch."""
    y = lax.conv_general_dilated(
        *(x, w, (1, 1), "SAME"), dimension_numbers=("NCHW", "OIHW", "NCHW")
    )
    total = y + bias.astype(x.dtype)[None, :, None, None] + r
    y = total.astype(F32) * scale[:, None, None] + offset[:, None, None]
    return jax.nn.relu(y.astype(x.dtype)), total


def values(given):
    keys = jax.random.split(jax.random.key(1), len(given))
    return [
        jax.random.normal(key, a.shape, F32).astype(a.dtype)
        for key, a in zip(keys, given, strict=True)
    ]


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_part_and_rest_are_the_region(launched, layout, dtype):
    image, filters, _, *vectors = args(dtype)
    fun = preactivation
    if layout == "NCHW":
        fun = nchw
        image = cases.shape(2, 8, 6, 5, dtype=dtype)
        filters = cases.shape(8, 8, 3, 3, dtype=dtype)
    with jax.numpy_rank_promotion("allow"):
        found = site(fun, (image, filters, image, *vectors))
        operands = values(found.in_avals)
        truth = measure.truth(found, operands)
        run = measure.kernel_function(found, executable(found, "hwio+xla"))
        got = jax.jit(run)(*operands)
        plain = jax.jit(measure.reference_fun(found.reference))(*operands)
    assert launched == [(1, 1, 1)]
    assert [y.dtype for y in got] == [y.dtype for y in plain]
    assert [y.shape for y in got] == [y.shape for y in plain]
    for ours, theirs, exact in zip(got, plain, truth, strict=True):
        exact = np.asarray(exact).reshape(ours.shape)
        errors = [
            np.linalg.norm(np.asarray(y, np.float32) - exact) for y in (ours, theirs)
        ]
        assert errors[0] <= 1.25 * errors[1] + 1e-6 * np.linalg.norm(exact)
        assert np.linalg.norm(exact) > 1


@pytest.fixture
def parts(kernel, monkeypatch):  # noqa: F811
    """For sites of two outputs a kernel for their part, for others one as before."""
    before = resolve.resolve

    def found(site, *rest):
        if len(site.region.epilogue.outputs) == 1:
            return before(site, *rest)
        (name, *_) = (f.name for f in forms.forms(site.region) if f.part is not None)
        made = executable(site, name)
        return None, made

    monkeypatch.setattr(resolve, "resolve", found)


def calls(text):
    return re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)


def test_the_rest_is_xlas(parts):
    text = cuda_text(preactivation, *args())
    (call,) = calls(text)
    assert "outputs = 1" in call and "sides = 1" in call
    assert "stablehlo.convolution" not in text
    assert text.count("stablehlo.maximum") == 1


def blocks(x, w, r, scale, offset, bias):
    y = cases.conv(cases.conv(x, w), w)
    y, total = preactivation(y, w, r, scale, offset, bias)
    y = cases.conv(cases.conv(y, w), w)
    return y + total


def test_a_sequence_ends_before_it_and_goes_on_after_it(parts):
    text = cuda_text(blocks, *args())
    found = calls(text)
    # Two kernels, the one that ends early, and two more.
    assert len(found) == 3
    assert ["kind = 3" in call for call in found] == [True, False, True]


def test_it_is_one_call_with_the_whole(kernel):  # noqa: F811
    (call,) = calls(cuda_text(blocks, *args()))
    assert "kind = 3" in call
