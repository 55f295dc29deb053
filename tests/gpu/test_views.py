# SPDX-License-Identifier: Apache-2.0
"""On kernels: what needs views, and regions with reshapes and transposes inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_bolt
from jax_bolt._src import results

NHWC = ("NHWC", "HWIO", "NHWC")


def normal(seed: int, *dims: int) -> jax.Array:
    drawn = jax.random.normal(jax.random.key(seed), dims)
    return (drawn / (dims[-2] if seed else 1) ** 0.5).astype(jnp.bfloat16)


def up(x: Any, w: Any, b: Any) -> Any:
    y = lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC)
    return jax.nn.relu(y + b[None, None])


def line(x: Any, w: Any, b: Any) -> Any:
    numbers = ("NHC", "HIO", "NHC")
    y = lax.conv_general_dilated(x, w, (2,), "SAME", dimension_numbers=numbers)
    return jax.nn.silu(y + b[None])


def line_first(x: Any, w: Any, b: Any) -> Any:
    """Channels first, as in Equinox."""
    numbers = ("NCH", "OIH", "NCH")
    y = lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers)
    return jax.nn.silu(y + b[0][None, :, None])


def weight_first(x: Any, w: Any, b: Any) -> Any:
    return jax.vmap(jax.vmap(lambda x: jax.nn.gelu(w @ x + b[0])))(x)


def attention(x: Any, w: Any, b: Any) -> Any:
    q, k, v = jnp.split((x @ w + b[None]).reshape(*x.shape[:2], 12, 64), 3, axis=2)
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.125
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def heads(x: Any, w: Any, b: Any) -> Any:
    """An epilogue that goes on after the channels were split."""
    y = (x @ w + b[None]).reshape(*x.shape[:2], 4, 192)
    return jax.nn.relu(y * 0.5) + y


CASES = {
    "up 2x2": (up, (4, 28, 28, 64), (2, 2, 64, 32), (1, 32)),
    "up 3x3": (up, (4, 14, 14, 64), (3, 3, 64, 32), (1, 32)),
    "up 4x4": (up, (4, 14, 14, 64), (4, 4, 64, 32), (1, 32)),
    "line": (line, (4, 256, 64), (3, 64, 128), (1, 128)),
    "line, channels first": (line_first, (4, 64, 256), (128, 64, 3), (1, 128)),
    "weight first": (weight_first, (4, 64, 128), (256, 128), (1, 256)),
    "attention": (attention, (2, 64, 256), (256, 768), (1, 768)),
    "heads": (heads, (2, 64, 256), (256, 768), (1, 768)),
}


@pytest.fixture(autouse=True)
def _as_users_run_it() -> Iterator[None]:
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def close(got: Any, want: Any) -> None:
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("name", CASES)
def test_on_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tuning would choose."""
    monkeypatch.setattr(results, "stored", lambda *_: None)
    fun, *dims = CASES[name]
    args = [normal(i, *shape) for i, shape in enumerate(dims)]
    with jax_bolt.options(on_miss="heuristic", on_error="raise"):
        optimized = jax_bolt.optimize(fun)
        text = optimized.lower(*args).as_text()
        assert "jax_bolt.launch" in text
        assert "stablehlo.convolution" not in text
        assert "stablehlo.dot_general" not in text
        close(optimized(*args), jax.jit(fun)(*args))
        close(jax_bolt.freeze(fun, args[0])(*args[1:]), jax.jit(fun)(*args))


@pytest.mark.parametrize("name", ["up 2x2", "up 3x3", "line, channels first", "heads"])
def test_tuned(name: str) -> None:
    fun, *dims = CASES[name]
    args = [normal(i, *shape) for i, shape in enumerate(dims)]
    report = jax_bolt.tune(fun, *args, progress=False)
    for site in report.sites:
        assert site.time_us and site.xla_time_us, report
        assert site.error is not None and site.xla_error is not None
        # The yardstick's operands are those that the views can give: XLA is right.
        assert site.xla_error < 0.01
        assert site.error <= 1.25 * site.xla_error + 1e-6
    close(jax_bolt.optimize(fun)(*args), jax.jit(fun)(*args))
