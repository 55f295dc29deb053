# SPDX-License-Identifier: Apache-2.0
"""What tuning times and compares where a call's operands are views."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from jax_bolt._src import options, program
from jax_bolt._src.primitive import SiteInfo, reference_fun
from jax_bolt._src.tune import measure

NHWC, NCHW = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


def up(x: Any, w: Any, b: Any) -> Any:
    y = lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NHWC)
    return jax.nn.relu(y + b)


def up_first(x: Any, w: Any, b: Any) -> Any:
    y = lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=NCHW)
    return jax.nn.relu(y + b.reshape(1, -1, 1, 1))


def scores(q: Any, k: Any, b: Any) -> Any:
    return jnp.einsum("bqhd,bkhd->bhqk", q, k) * b


def site_of(fun: Callable[..., Any], *dims: tuple[int, ...]) -> SiteInfo:
    like = [jax.ShapeDtypeStruct(d, jnp.float32) for d in dims]
    (site,) = program.trace(fun, (), like, {}, options.Options())[0].family.sites
    return site


SITES = {
    "up": site_of(up, (2, 4, 5, 8), (2, 2, 8, 4), (1, 1, 1, 4)),
    "up with zeros": site_of(up, (2, 4, 5, 8), (3, 3, 8, 4), (1, 1, 1, 4)),
    "up, channels first": site_of(up_first, (2, 8, 4, 5), (4, 8, 4, 4), (4,)),
    "products": site_of(scores, (2, 5, 3, 8), (2, 6, 3, 8), ()),
}


@pytest.mark.parametrize("name", SITES)
def test_the_yardstick_and_xla_agree(name: str, monkeypatch: Any) -> None:
    """Operands are such as views give, and results come back in the region's order."""
    site = SITES[name]
    operands = measure.make_operands(site, l2_bytes=1)
    calls: list[Any] = []

    def time_queued(call: Callable[[], Any], ordinal: int) -> float:
        calls.append(call())
        return 6.0

    monkeypatch.setattr(measure, "time_queued", time_queued)
    run = measure.time_region(reference_fun(site.reference), operands, 0)
    assert run.micros == 6.0 / len(operands.sets)
    (error,) = measure.Yardstick(operands).errors(run.outputs)
    assert error < 1e-5
    assert [x.shape for x in run.outputs] == [a.shape for a in site.out_avals]


@pytest.mark.parametrize("name", SITES)
def test_views_of_xlas_own_path_cancel(name: str) -> None:
    """So that it is timed as the program would run it."""
    site = SITES[name]

    def written(*values: Any) -> Any:
        (made,) = reference_fun(site.reference)(*measure._viewed(site, values))
        return made if site.result is None else site.result.back(made)

    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    values = measure._written(site, operands)
    text = jax.jit(lambda *values: written(*values)).lower(*values).compile().as_text()
    assert text is not None
    plain = jax.jit(_plain(site)).lower(*values).compile().as_text()
    assert plain is not None
    for word in ("transpose(", "reverse(", "concatenate("):
        assert text.count(word) <= plain.count(word), text


def _plain(site: SiteInfo) -> Callable[..., Any]:
    fun = {"products": scores, "up, channels first": up_first}
    (name,) = (name for name, other in SITES.items() if other is site)
    return fun.get(name, up)
