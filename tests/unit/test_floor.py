# SPDX-License-Identifier: Apache-2.0
"""The floor: FLOPs and bytes of roots, and the published floors of four models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import floor
from jax_bolt._src import ir

H100 = floor.Ceilings(flops=790e12, bandwidth=3.0e12)


def _like(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _conv(stride: int, padding: Any) -> Any:
    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    return conv


@pytest.mark.parametrize(
    ("name", "milliseconds"),
    [
        ("resnet18", 0.164),
        ("resnet50", 0.544),
        ("vgg16", 1.391),
        ("repvgg_a0", 0.140),
    ],
)
def test_floor_of_models(name: str, milliseconds: float) -> None:
    pytest.importorskip("flax")
    from benchmarks.models import models

    # Flax's own BatchNorm needs JAX's default promotion, not the suite's strict one.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        roots = floor.roots(*models.shapes(name, 32, 224))
    assert floor.seconds(roots, H100) * 1e3 == pytest.approx(milliseconds, abs=5e-4)


def test_product() -> None:
    (root,) = floor.roots(jnp.matmul, _like(8, 16, 32), _like(8, 32, 4))
    assert root.flops == 2 * 8 * 16 * 32 * 4
    assert root.bytes == 2 * 8 * (16 * 32 + 32 * 4 + 16 * 4)


def test_output_counts_with_its_own_dtype() -> None:
    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.matmul(a, b, preferred_element_type=jnp.float32)

    (root,) = floor.roots(product, _like(16, 32), _like(32, 4))
    assert root.bytes == 2 * (16 * 32 + 32 * 4) + 4 * 16 * 4


def test_conv() -> None:
    (root,) = floor.roots(_conv(1, "SAME"), _like(2, 8, 8, 16), _like(3, 3, 16, 32))
    assert root.flops == 2 * (2 * 8 * 8 * 32) * (3 * 3 * 16)
    assert root.bytes == 2 * (2 * 8 * 8 * 16 + 3 * 3 * 16 * 32 + 2 * 8 * 8 * 32)


def test_strided_1x1_conv_reads_a_quarter_of_its_input() -> None:
    (root,) = floor.roots(_conv(2, "VALID"), _like(2, 8, 8, 16), _like(1, 1, 16, 32))
    assert root.bytes == 2 * (2 * 4 * 4 * 16 + 16 * 32 + 2 * 4 * 4 * 32)


def test_nested_calls_and_scan_steps_count() -> None:
    @jax.jit
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w)

    def stack(x: jax.Array, ws: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, ws)[0]

    (once,) = floor.roots(layer, _like(4, 8), _like(8, 8))
    (all_steps,) = floor.roots(stack, _like(4, 8), _like(5, 8, 8))
    assert all_steps.times == 5
    assert all_steps.seconds(H100) == pytest.approx(5 * once.seconds(H100))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_problems_of_a_report_give_the_same_roots(stride: int, kernel: int) -> None:
    pad = kernel // 2
    conv = _conv(stride, ((pad, pad), (pad, pad)))
    args = (_like(2, 14, 14, 16), _like(kernel, kernel, 16, 24))
    problem = ir.ConvProblem(
        n=2,
        h=14,
        w=14,
        c=16,
        k=24,
        r=kernel,
        s=kernel,
        stride=(stride, stride),
        padding=(pad, pad, pad, pad),
        dtype="bf16",
    )
    product = ir.GemmProblem(m=16, n=4, k=32, dtype="bf16")
    expected = floor.roots(conv, *args)
    expected += floor.roots(jnp.matmul, _like(16, 32), _like(32, 4))
    assert floor.of_problems([problem, product]) == expected


def test_a_depthwise_problem_gives_the_same_root() -> None:
    def conv(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=16,
        )

    sizes: dict = {"n": 2, "h": 14, "w": 14, "c": 16, "k": 16, "r": 3, "s": 3}
    problem = ir.ConvProblem(**sizes, padding=(1, 1, 1, 1), dtype="bf16", groups=16)
    expected = floor.roots(conv, _like(2, 14, 14, 16), _like(3, 3, 1, 16))
    assert floor.of_problems([problem]) == expected


def test_measured_ceilings_are_positive() -> None:
    ceilings = floor.measure(quick=True)
    assert ceilings.flops > 0 and ceilings.bandwidth > 0
