# SPDX-License-Identifier: Apache-2.0
"""Frames and views: where a kernel's rows and channels are in a user's value."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jax_bolt._src import frame, views
from jax_bolt._src.frame import Frame


def equation(fun: Any, *shape: int) -> Any:
    (eqn,) = jax.make_jaxpr(fun)(jnp.zeros(shape)).jaxpr.eqns
    return eqn


def kernels(value: np.ndarray, of: Frame, channels: int) -> np.ndarray:
    """The value as the kernel has it."""
    if of.view is not None:
        value = np.asarray(of.view.there(jnp.asarray(value)))
    return value.reshape(-1, channels)


@pytest.mark.parametrize(
    ("one", "other", "parts"),
    [
        ((4, 6), (24,), (((4,), (6,)), ((4, 6),))),
        ((4, 6), (2, 12), (((2, 2), (6,)), ((2,), (2, 6)))),
        ((4, 6), (4, 1, 6, 1), (((4,), (6,)), ((4,), (), (6,), ()))),
        ((4, 1, 6), (4, 6), (((4,), (), (6,)), ((4,), (6,)))),
        ((4, 6), (6, 4), None),
        ((), (1, 1), ((), ((), ()))),
    ],
)
def test_refinement(one: Any, other: Any, parts: Any) -> None:
    assert frame.refinement(one, other) == parts


STEPS = st.lists(st.tuples(st.booleans(), st.integers(0, 10**6)), max_size=5)


def factored(size: int, number: int) -> tuple[int, ...]:
    """One of the ways to write ``size`` as a product of up to five, with some ones."""
    made = []
    for _ in range(number % 5):
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        made.append(divisors[number % len(divisors)])
        size, number = size // made[-1], number // 3
    return (*made, size)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(STEPS, st.sampled_from([(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 1, 2)]))
def test_a_frame_follows_its_value(steps: Any, order: Any) -> None:
    """Whatever moves, the kernel's elements are the same, and so are its channels."""
    shape = (2, 6, 4, 3)
    value = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    now = Frame.of(shape, order, 1)
    channels = shape[order[-1]]
    want = kernels(value, now, channels)
    by_channel = np.arange(value.size, dtype=np.int32) % channels
    vector = np.empty(value.size, np.int32)
    vector[want.reshape(-1)] = by_channel
    for transposes, number in steps:
        if transposes:
            orders = list(itertools.permutations(range(value.ndim)))
            axes = orders[number % len(orders)]
            if axes == orders[0]:
                continue
            eqn = equation(lambda x, axes=axes: lax.transpose(x, axes), *value.shape)
            value = value.transpose(axes)
        else:
            shape = factored(value.size, number)
            if tuple(shape) == value.shape:
                continue
            eqn = equation(lambda x, s=tuple(shape): lax.reshape(x, s), *value.shape)
            value = value.reshape(shape)
        after = (
            now.after(eqn) if eqn.primitive.name in ("reshape", "transpose") else now
        )
        if after is None:
            return
        now = after
        assert now.shape == value.shape
        np.testing.assert_array_equal(kernels(value, now, channels), want)
        if now.view is not None:
            there = now.view.there(jnp.asarray(value))
            np.testing.assert_array_equal(now.view.back(there), value)
        check_vectors(now, vector[value])


def check_vectors(of: Frame, channel: np.ndarray) -> None:
    """Per channel are those shapes that hold each channel once and in order."""
    count = channel.max() + 1
    for kept in itertools.product((False, True), repeat=channel.ndim):
        index = tuple(slice(None) if keep else slice(1) for keep in kept)
        held = channel[index]
        if held.size == 1:
            continue
        fits = held.size == count and (held.reshape(-1) == range(count)).all()
        fits = fits and (np.broadcast_to(held, channel.shape) == channel).all()
        assert of.is_per_channel(held.shape) == fits, (of, held.shape)


def test_what_spreads_channels() -> None:
    nhwc = Frame.of((2, 8, 8, 8), (0, 1, 2, 3), 1)
    nchw = Frame.of((2, 8, 8, 8), (0, 2, 3, 1), 1)

    def spread(axis: int) -> Any:
        return equation(lambda v: lax.broadcast_in_dim(v, (2, 8, 8, 8), (axis,)), 8)

    for axis in range(1, 4):
        assert nhwc.spreads(spread(axis)) == (axis == 3)
        assert nchw.spreads(spread(axis)) == (axis == 1)
    # One step of two: to an axis of its own, at the right place or not.
    assert nhwc.spreads(equation(lambda v: v.reshape(1, 1, 1, 8), 8))
    assert not nhwc.spreads(equation(lambda v: v.reshape(1, 8, 1, 1), 8))
    assert nchw.spreads(equation(lambda v: v.reshape(1, 8, 1, 1), 8))
    assert nhwc.spreads(equation(lambda v: v.reshape(8, 1), 8))
    # Elements that are no channels.
    assert not nhwc.spreads(equation(lambda v: v.reshape(4, 4), 16))


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("pad", [0, 1, 2, 3, 4])
def test_phases(stride: int, size: int, pad: int) -> None:
    """The plain conv's results, put in order, are the transposed conv's."""
    phases = views.Phases.of(stride, size, pad)
    assert phases.before >= 0 and phases.after >= 0 and phases.lead >= 0
    rng = np.random.default_rng(0)
    blocks = 6
    x, w = rng.standard_normal(blocks), rng.standard_normal(size)
    dilated = np.zeros(pad + stride * (blocks + 9))
    dilated[pad : pad + stride * blocks : stride] = x
    want = [dilated[i : i + size] @ w for i in range(stride * blocks)]
    padded = np.concatenate([np.zeros(phases.before), w, np.zeros(phases.after)])
    runs = padded.reshape(phases.taps, stride)[:, ::-1]
    ahead = np.concatenate([np.zeros(phases.lead), x, np.zeros(9)])
    got = [ahead[i : i + phases.taps] @ runs for i in range(blocks)]
    np.testing.assert_allclose(np.reshape(got, -1), want, atol=1e-12)


@pytest.mark.parametrize(
    ("view", "shape", "redundant"),
    [
        (views.Transposed((2, 0, 1)), (2, 3, 4), False),
        (views.Factored((4, 3), (2, 2, 3), (2, 0, 1)), (4, 3), False),
        (views.Repeated((1, 3), 4), (1, 3), True),
        (
            views.PhaseFilter(
                (2, 2, 3, 5), views.Phases.of(2, 2, 1), views.Phases.of(2, 2, 1)
            ),
            (2, 2, 3, 5),
            False,
        ),
        (
            views.Both(
                views.Transposed((1, 0, 2)),
                views.PhaseFilter(
                    (4, 3, 5), views.Phases.of(1, 1, 0), views.Phases.of(2, 4, 2)
                ),
            ),
            (3, 4, 5),
            True,
        ),
    ],
)
def test_views_there_and_back(view: Any, shape: Any, redundant: bool) -> None:
    x = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape)
    there = view.there(x)
    np.testing.assert_array_equal(view.back(there), x)
    assert view.is_redundant == redundant
    assert (there.size > x.size) == redundant
    assert hash(view) == hash(view)
