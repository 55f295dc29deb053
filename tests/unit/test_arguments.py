# SPDX-License-Identifier: Apache-2.0
"""Mistakes in calling ``optimize``, ``freeze`` and ``explain``: what is said."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_bolt
from jax_bolt._src import arguments

X = jnp.ones((4, 4))


def apply(variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
    """As Flax's: what a layer takes by name is among ``kwargs``."""
    y = args[0] @ variables["w"]
    y = jax.nn.relu(y) if kwargs.get("train") else y
    return y if mutable is False else (y, {name: y for name in mutable})


def notes(kind: type[Exception], call: Callable[[], Any]) -> str:
    """What we add to an error of that very kind."""
    with pytest.raises(kind) as caught:
        call()
    found = getattr(caught.value, "__notes__", [])
    return "\n".join(note for note in found if note.startswith("jax_bolt"))


VARIABLES = {"w": X}
BOOLEAN = jax.errors.TracerBoolConversionError


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax_bolt.optimize(apply)(VARIABLES, X, train=False),
        lambda: jax_bolt.optimize(apply, static_argnums=2)(VARIABLES, X, train=False),
        lambda: jax_bolt.optimize(apply).lower(VARIABLES, X, train=False),
        lambda: jax_bolt.explain(apply, VARIABLES, X, train=False),
    ],
)
def test_a_keyword_that_was_traced_is_noted(call):
    found = notes(BOOLEAN, call)
    assert found.count("\n") == 0, "once"
    assert "argument 'train' is False, which is traced as an array" in found
    assert "set it before: optimize(functools.partial(f, train=...))" in found


def test_what_was_traced_is_noted_of_frozen_functions_and_positions():
    frozen = jax_bolt.freeze(apply, VARIABLES)
    found = notes(BOOLEAN, lambda: frozen(X, train=True))
    assert "set it before: freeze(functools.partial(f, train=...))" in found
    # Of a mistake in a value it is no use to say what is frozen.
    assert "frozen already" not in found

    def choose(x: Any, flip: Any) -> Any:
        return -x if flip else x

    assert "static_argnums=1" in notes(
        BOOLEAN, lambda: jax_bolt.optimize(choose)(X, flip=True)
    )
    assert "argument 1 is True" in notes(
        BOOLEAN, lambda: jax_bolt.optimize(choose)(X, True)
    )
    reshape = jax_bolt.optimize(lambda x, **sizes: x.reshape(sizes["n"], -1))
    assert "argument 'n' is 2" in notes(TypeError, lambda: reshape(X, n=2))


def test_other_errors_have_no_such_note():
    fun = jax_bolt.optimize(lambda x, *, scale: len(3))  # type: ignore[arg-type]
    assert not notes(TypeError, lambda: fun(X, scale=2.0))
    branch = jax_bolt.optimize(lambda x, *, scale: x if x.sum() else scale)
    assert not notes(BOOLEAN, lambda: branch(X, scale=X))


def test_names_in_a_list_are_set_before():
    message = (
        r"argument 'mutable'\[0\] is 'stats' .*functools.partial\(f, mutable=...\)"
    )
    with pytest.raises(TypeError, match=message):
        jax_bolt.optimize(apply)(VARIABLES, X, mutable=["stats"])
    before = functools.partial(apply, mutable=["stats"])
    _, updates = jax_bolt.optimize(before)(VARIABLES, X)
    assert list(updates) == ["stats"]


# --- Freezing


def test_what_is_frozen_already_is_noted():
    again = jax_bolt.freeze(lambda w, x: x @ w, X)
    found = notes(TypeError, lambda: again(X, X))
    assert "frozen already, and not to be passed again: w = float32[4,4]" in found
    # Arguments the wrong way round are seen by what the first one is.
    wrong = jax_bolt.freeze(apply, X)
    found = notes(TypeError, lambda: wrong(VARIABLES))
    assert "jax_bolt.freeze(apply): frozen already" in found
    assert found.endswith("variables = float32[4,4]")

    def layers(variables: Any, x: Any) -> Any:
        return x.reshape(-1) @ variables["w"]

    once = jax_bolt.freeze(layers, VARIABLES)
    for call in (once, once.explain, once.lower):
        found = notes(AttributeError, lambda call=call: call(VARIABLES))
        assert "variables = {'w': float32[4,4]}" in found
    found = notes(TypeError, lambda: jax_bolt.freeze(lambda *a: a[0] @ a[1] + "", X)(X))
    assert "again: argument 0 = float32[4,4]" in found


@pytest.mark.parametrize("name", ["static_argnums", "donate_argnums"])
@pytest.mark.parametrize("position", [1, -2, 5, (0, 1)])
def test_positions_are_among_what_is_not_frozen(name, position):
    fun: Any = functools.partial(jax_bolt.freeze, lambda w, x: x @ w, X)
    message = rf"{name}=.*only 1 positional arguments are not frozen; positions begin"
    with pytest.raises(ValueError, match=message):
        fun(**{name: position})
    fun(**{name: 0})
    fun(**{name: -1})


def test_positions_of_any_number_of_arguments():
    for frozen in (
        jax_bolt.freeze(apply, VARIABLES, static_argnums=5),
        jax_bolt.freeze(jax_bolt.optimize(apply, static_argnums=2), VARIABLES),
    ):
        np.testing.assert_array_equal(frozen(X), apply(VARIABLES, X))


def test_nothing_to_freeze():
    nothing = jax_bolt.freeze(apply)
    for call in (nothing, nothing.lower, nothing.explain):
        with pytest.raises(
            ValueError, match=r"freeze\(fun, \*arrays\): nothing to free"
        ):
            call(VARIABLES, X)
    # But what a function closes over is frozen as well.
    frozen = jax_bolt.freeze(lambda x: apply(VARIABLES, x))
    np.testing.assert_array_equal(frozen(X), X @ X)


# --- Functions


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda f: jax_bolt.optimize(f), "optimize(fun)"),
        (lambda f: jax_bolt.optimize()(f), "optimize(fun)"),
        (lambda f: jax_bolt.freeze(f, X), "freeze(fun, *arrays)"),
        (lambda f: jax_bolt.explain(f, X), "explain(fun, *args)"),
        (lambda f: jax_bolt.tune(f, X), "tune(fun, *args)"),
        (lambda f: jax_bolt.advise(f, X), "advise(fun, *args)"),
    ],
)
def test_what_is_no_function_is_cut_short(call, said):
    many = {f"layer_{i}": {"kernel": np.ones((64, 64))} for i in range(50)}
    for bad in (many, jnp.ones((64, 64)), "x" * 1000, [many] * 50):
        with pytest.raises(
            TypeError, match="takes a function of arrays, got"
        ) as caught:
            call(bad)
        message = str(caught.value)
        assert f"; call {said}" in message and len(message) < 250
        assert "1." not in message, "no array's numbers"


def test_a_value_in_at_most_a_line():
    assert arguments.short(np.ones((2, 3), np.int8)) == "int8[2,3]"
    assert arguments.short(jax.ShapeDtypeStruct((), jnp.bfloat16)) == "bfloat16[]"
    assert "\n" not in arguments.short("a\nb") and len(arguments.short("x" * 999)) < 101


class Module:
    """What a linen module looks like from outside."""

    scope = None

    def init(self, key: Any) -> Any:
        return VARIABLES

    def apply(self, variables: Any, x: Any) -> Any:
        return x @ variables["w"]

    def __call__(self, x: Any) -> Any:
        return x @ X

    def __repr__(self) -> str:
        return "Net(\n    # attributes\n    features = 8\n)"


@pytest.mark.parametrize(
    "call",
    [
        jax_bolt.optimize,
        lambda net: jax_bolt.freeze(net, VARIABLES),
        lambda net: jax_bolt.explain(net, VARIABLES, X),
    ],
)
def test_a_module_is_no_function(call):
    message = r"got Net\( # .*, a module; pass net.apply, whose first argument"
    with pytest.raises(TypeError, match=message):
        call(Module())
    with pytest.raises(TypeError, match=r"pass Module\(\.\.\.\).apply"):
        call(Module)
    net = Module()
    np.testing.assert_array_equal(jax_bolt.optimize(net.apply)(VARIABLES, X), X @ X)
    # Bound to its variables it is one.
    net.scope = object()  # type: ignore[assignment]
    np.testing.assert_array_equal(jax_bolt.optimize(net)(X), X @ X)


def test_a_linen_module_is_one():
    nn = pytest.importorskip("flax.linen")
    with pytest.raises(TypeError, match=r"a module; pass net.apply"):
        jax_bolt.optimize(nn.Dense(3))
    assert not arguments.is_module(nn.Dense(3).apply)
    for fun in (jnp.tanh, jax.jit(jnp.tanh), functools.partial(jnp.dot, X)):
        assert not arguments.is_module(fun)


# --- What jax.jit takes besides


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("static_argnames", r"static_argnums=\.\.\..*functools\.partial\(f, name="),
        ("donate_argnames", r"donate_argnums=\.\.\."),
        ("in_shardings", r"jax\.jit\(jax_bolt\.optimize\(f\), in_shardings=\.\.\.\)"),
        ("keep_unused", r"jax\.jit\(jax_bolt\.optimize\(f\), keep_unused=\.\.\.\)"),
    ],
)
def test_what_jit_takes_and_optimize_does_not(name, instead):
    with pytest.raises(TypeError, match=f"^optimize does not take {name}; .*{instead}"):
        functools.partial(jax_bolt.optimize, **{name: "x"})(apply)
    with pytest.raises(TypeError, match=f"^freeze does not take {name}; "):
        functools.partial(jax_bolt.freeze, **{name: "x"})(apply, VARIABLES)
    if name != "keep_unused":
        explain: Any = functools.partial(jax_bolt.explain, **{name: "x"})
        with pytest.raises(TypeError, match=f"^explain does not take {name}; "):
            explain(apply, VARIABLES, X)


def test_a_functions_own_keywords_are_its_own():
    report = jax_bolt.explain(lambda x, *, device: x @ device, X, device=X)
    assert len(report.sites) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        jax_bolt.optimize(apply, colour="red")  # type: ignore[call-arg]
