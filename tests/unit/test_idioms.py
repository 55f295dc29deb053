# SPDX-License-Identifier: Apache-2.0
"""Which operations one short function does together, and which it must not."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jax_bolt._src import ir, options, program
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import hoist
from jax_bolt._src.kernels.idioms import Idiom, idioms
from jax_bolt._src.primitive import SiteInfo


def epilogue(activation, dtype=jnp.bfloat16) -> ir.Epilogue:
    """Of a product with a bias and an activation in JAX."""
    shapes = (64, 128), (128, 256), (1, 256)
    args = tuple(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)

    def layer(x, w, b):
        return activation(x @ w + b)

    traced, _ = program.trace(layer, (), args, {}, options.Options())
    (site,) = traced.roots
    assert isinstance(site, SiteInfo)
    return site.region.epilogue


def last(found: ir.Epilogue) -> Idiom:
    return idioms(found)[found.result]


@pytest.mark.parametrize(
    "activation, function, scale, factor",
    [
        (lambda y: jax.nn.gelu(y, approximate=False), "erfc_bf16", -(0.5**0.5), 0.5),
        (lambda y: 0.5 * y * (1 + jax.lax.erf(y / 1.5)), "erfc_bf16", -1 / 1.5, 0.5),
        (lambda y: y * (1 + jnp.tanh(2 * y)), "logistic_narrow", 4.0, 2.0),
        (lambda y: jax.nn.sigmoid(1.5 * y) * y, "logistic_narrow", 1.5, 1.0),
        (jax.nn.silu, "logistic_narrow", 1.0, 1.0),
    ],
)
def test_an_activation_is_one_function(activation, function, scale, factor):
    found = epilogue(activation)
    idiom = last(found)
    assert idiom.function == function
    assert idiom.scale == pytest.approx(scale, rel=5e-3)  # bfloat16's constants
    assert idiom.factor == pytest.approx(factor)
    assert idiom.times == idiom.operand == 2  # acc, vector, and their sum
    # The bias is added, and that is all.
    assert codegen.functor(found).count("float const x") == 2
    # In the machine code: a GELU of ten instructions, a SiLU of five.
    cost = 10 if function == "erfc_bf16" else 5 + (factor != 1.0)
    assert hoist.work(found) == 1 + cost


def test_the_default_gelu():
    """It is x times a logistic of a cubic."""
    text = codegen.functor(epilogue(jax.nn.gelu))
    assert "logistic_narrow" in text and "tanh" not in text


def test_float16_has_its_own_polynomial():
    found = epilogue(lambda y: jax.nn.gelu(y, approximate=False), jnp.float16)
    assert last(found).function == "erfc_f16"


def test_wide_results_are_computed_as_written():
    found = epilogue(jax.nn.silu)
    wide = dataclasses.replace(found, out_dtype="f32")
    stored = dataclasses.replace(found, auxiliary=(ir.Output(2, "f32"),))
    assert idioms(found)
    assert not idioms(wide) and not idioms(stored)


ACC, SIGMOID, TANH = ir.Op("acc"), ir.Op("logistic", (0,)), ir.Op("tanh", (0,))


def of(*ops: ir.Op, **more) -> ir.Epilogue:
    return ir.Epilogue(ops, len(ops) - 1, "bf16", (), (), **more)


def test_a_value_that_others_read_is_computed_once():
    square = of(ACC, SIGMOID, ir.Op("mul", (1, 1)))
    assert list(idioms(square)) == [1]
    shared = of(ACC, SIGMOID, ir.Op("mul", (0, 1)), ir.Op("add", (1, 2)))
    assert list(idioms(shared)) == [1]
    stored = of(ACC, SIGMOID, ir.Op("mul", (0, 1)), auxiliary=(ir.Output(1, "bf16"),))
    assert list(idioms(stored)) == [1]
    # What nothing stored needs reads nothing.
    unread = of(ACC, SIGMOID, ir.Op("neg", (1,)), ir.Op("mul", (0, 1)))
    assert last(unread).times == 0


def test_one_product_is_taken_in():
    found = of(ACC, SIGMOID, ir.Op("mul", (0, 1)), ir.Op("mul", (0, 2)))
    assert idioms(found)[2].times == 0
    assert 3 not in idioms(found)


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf"), 1e-38, 3e38])
def test_a_factor_that_could_overflow_is_not_taken_in(factor):
    scaled = of(ACC, ir.Op("const", attr=factor), ir.Op("mul", (0, 1)))
    into = of(*scaled.ops, ir.Op("logistic", (2,)))
    assert last(into) == Idiom("logistic_narrow", 2, 1.0)
    out = of(ACC, ir.Op("const", attr=factor), SIGMOID, ir.Op("mul", (2, 1)))
    assert out.result not in idioms(out)


@pytest.mark.parametrize("scale, short", [(3.0, True), (2000.0, False), (1e-3, False)])
def test_a_gelu_of_what_is_scaled(scale, short):
    """The scale goes into a polynomial of the 13th degree."""
    found = epilogue(lambda y: scale * y * jax.lax.erfc(-scale * y), jnp.float16)
    assert bool(idioms(found)) == short


@pytest.mark.parametrize(
    "ops",
    [
        [ir.Op("erfc", (0,))],
        [ir.Op("exp", (0,)), ir.Op("erfc", (0,)), ir.Op("mul", (1, 2))],
        [ir.Op("erfc", (0,)), ir.Op("log", (1,))],
        [ir.Op("const", attr=1.0), ir.Op("erf", (0,)), ir.Op("add", (1, 2))],
    ],
)
def test_an_erfc_that_is_no_gelu_is_right_where_it_is_tiny(ops):
    assert not idioms(of(ACC, *ops))


def test_only_one_more_than_tanh():
    two = of(ACC, ir.Op("const", attr=2.0), TANH, ir.Op("add", (2, 1)))
    assert not idioms(two)
    assert not idioms(of(ACC, TANH))


def test_what_is_the_same_for_a_channel_is_left_as_it_is():
    ops = (ACC, ir.Op("vector", attr=0), ir.Op("logistic", (1,)), ir.Op("mul", (0, 2)))
    found = ir.Epilogue(ops, 3, "bf16", (ir.Vector("f32", False),), ())
    assert not idioms(found)
    assert hoist.columns(found) == (2,)
