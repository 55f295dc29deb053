# SPDX-License-Identifier: Apache-2.0
"""The benchmarked models: which roots are regions, what stands beside them, results.

Full-size models are traced alone; small ones of the same layers are run.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import model_checks
import pytest
from model_checks import READ_TWICE, SPREAD, TRANSPOSED

pytest.importorskip("flax")
# Appended, so that an installed jax_bolt still comes before the source tree.
sys.path.append(str(Path(__file__).resolve().parents[2]))

import jax_bolt
from benchmarks import coverage_table
from benchmarks.models import models

# Why elementwise work on a region's result stays outside it.
OUTSIDE = {
    # Squeeze-and-excite takes the mean of what it scales, in float32.
    "mobilenet_v3": {READ_TWICE},
    "efficientnet_b0": {READ_TWICE},
    # LayerNorm reads its input three times: for mean, variance and result.
    "convnext_t": {READ_TWICE},
    "mixer_b16": {READ_TWICE, TRANSPOSED},
    # Positions are added to patches: a tensor that all images share.
    "vit_b16": {READ_TWICE, SPREAD},
}
# The smallest that all layers of the small model have pixels for.
IMAGES = {"inception": 64}


pytestmark = pytest.mark.usefixtures("as_users_run_it")


@pytest.mark.parametrize("name", models.MODELS)
def test_coverage_of_the_full_size(name: str) -> None:
    report = coverage_table.explained(name)
    assert coverage_table.row(name, report) in coverage_table.written()
    assert all(site.fused for site in report.sites)
    assert len(report.sites) == models.MODELS[name].roots
    # Every region has a kernel to try.
    assert all(site.kernel != "xla" for site in report.sites if site.fused)


@pytest.mark.parametrize("name", models.MODELS)
def test_no_elementwise_work_is_left_without_a_reason(name: str) -> None:
    done = model_checks.rewritten(*models.shapes(name))
    found = {leftover.reason for leftover in model_checks.leftovers(done)}
    assert found == OUTSIDE.get(name, set())


@pytest.mark.parametrize("name", models.MODELS)
def test_results(name: str) -> None:
    """Of ``optimize`` and ``freeze`` beside plain JAX, in float32."""
    image = IMAGES.get(name, 32)
    apply, variables, x = models.build(name, 2, image, jnp.float32, small=True)
    want = jax.jit(apply)(variables, x)
    model_checks.check_close(jax_bolt.optimize(apply)(variables, x), want, 1e-5)
    model_checks.check_close(jax_bolt.freeze(apply, variables)(x), want, 1e-5)


@pytest.mark.parametrize("name", models.MODELS)
def test_what_kernels_are_made_from(name: str) -> None:
    image = IMAGES.get(name, 32)
    shapes = models.shapes(name, 2, image, jnp.float32, small=True)
    done = model_checks.rewritten(*shapes)
    for site in {site.label: site for site in done.family.sites}.values():
        model_checks.check_region(site)


def test_the_table_in_the_documentation_has_these_models() -> None:
    """Its rows are compared above."""
    lines = coverage_table.written()
    assert tuple(lines[:2]) == coverage_table.HEAD
    assert len(lines) == 2 + len(models.MODELS)


def test_leftovers_are_seen() -> None:
    """Programs with work beside a region, and why it is there."""
    x, w, other = jnp.ones((2, 4, 8)), jnp.ones((8, 16)), jnp.ones((2, 4, 16))

    def reasons(fun: Any) -> list[str]:
        done = model_checks.rewritten(fun, x, w, other)
        assert len(done.family.sites) == 1
        return [leftover.reason for leftover in model_checks.leftovers(done)]

    assert reasons(lambda x, w, o: jax.nn.relu(x @ w) * 2 + o) == []
    # Stored beside the sum, if that is in memory, too.
    assert reasons(lambda x, w, o: ((y := x @ w), y + o)) == []
    assert reasons(lambda x, w, o: ((y := x @ w), (y + o).sum())) == [READ_TWICE]
    assert reasons(lambda x, w, o: (x @ w).mT + o.mT) == [TRANSPOSED]
    assert reasons(lambda x, w, o: x @ w + o.sum(2, keepdims=True)) == [SPREAD]
    # Of its own mean, which is not there when the region ends.
    assert reasons(lambda x, w, o: (y := x @ w) - y.mean()) == []
    # Sides beyond what a kernel takes: the check has no excuse for these.
    assert reasons(lambda x, w, o: x @ w + o + jnp.flip(o) - jnp.cumsum(o, 1)) == [""]
