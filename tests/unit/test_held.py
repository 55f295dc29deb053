# SPDX-License-Identifier: Apache-2.0
"""What ``freeze`` keeps is read by kernels without waiting; nothing else is."""

from __future__ import annotations

import re
import types
from typing import Any

import chain_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases
from jax.experimental.layout import Format, Layout
from test_errors import TARGET, gpu, nvcc  # noqa: F401

import jax_bolt
from jax_bolt._src import arch as arch_
from jax_bolt._src import compat, filters, ir, plan

X = cases.shape(2, 8, 8, 64)
HOPPER = arch_.from_name("sm_90a")


def layer(w: Any, b: Any, x: Any) -> Any:
    y = cases.conv(x, w)
    return jax.nn.relu(y + cases.over_channels(b, y))


def two(parameters: Any, x: Any) -> Any:
    (w, b), (v, c) = parameters
    return layer(v, c, layer(w, b, x))


def normal(seed: int, *shape: int) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(values).astype(jnp.bfloat16)


def parameters(count: int) -> list[tuple[jax.Array, jax.Array]]:
    return [(normal(i, 3, 3, 64, 64), normal(9 + i, 64)) for i in range(count)]


def launches(run: Any, *args: Any) -> np.ndarray:
    """The numbers of the one custom call of a program lowered for CUDA."""
    text = run.trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(f"@{TARGET}") == 1
    (found,) = re.findall(r'(?:recipe|program) = dense<"0x(\w+)">', text)
    return np.frombuffer(bytes.fromhex(found), np.int64)


def at_the_top(frozen: Any, *args: Any) -> np.ndarray:
    run, first = frozen._bound(args, {})
    return launches(run, *first, *args)


def in_a_program(frozen: Any, *args: Any) -> np.ndarray:
    return launches(jax.jit(lambda *args: frozen(*args)), *args)


def held(frozen: Any, *args: Any) -> int:
    """How many launches take their parameters for held."""
    top, inside = at_the_top(frozen, *args), in_a_program(frozen, *args)
    (places,) = np.nonzero(top != inside)
    assert (inside[places] == 0).all() and (top[places] == 1).all()
    return len(places)


def test_a_frozen_filter_and_its_bias_are_held(gpu, nvcc):  # noqa: F811
    assert held(jax_bolt.freeze(layer, *parameters(1)[0]), X) == 1


def test_each_kernel_of_a_sequence_for_itself(gpu, nvcc):  # noqa: F811
    assert held(jax_bolt.freeze(two, parameters(2)), X) == 2
    (w, b), (v, c) = parameters(2)

    def first_alone(w: Any, b: Any, v: Any, x: Any) -> Any:
        return two([(w, b), (v, c)], x)

    given = jax.ShapeDtypeStruct(v.shape, v.dtype)
    assert held(jax_bolt.freeze(first_alone, w, b), given, X) == 1


def test_a_bias_of_the_call_is_not(gpu, nvcc):  # noqa: F811
    w, b = parameters(1)[0]
    frozen = jax_bolt.freeze(lambda w, b, x: layer(w, b, x), w)
    assert held(frozen, b, X) == 0
    computed = jax_bolt.freeze(lambda w, x: layer(w, x[0, 0, 0], x), w)
    assert held(computed, X) == 0


def test_an_optimized_functions_parameters_are_not(gpu, nvcc):  # noqa: F811
    """The program before may end in a kernel of ours that still writes them."""
    w, b = parameters(1)[0]
    frozen = at_the_top(jax_bolt.freeze(layer, w, b), X)
    plain = launches(jax.jit(jax_bolt.optimize(layer)), w, b, X)
    assert (frozen != plain).sum() == 1


def test_a_filter_that_xla_rearranges_is_not(gpu, nvcc, monkeypatch):  # noqa: F811
    def grouped(w: Any, x: Any) -> Any:
        return jax.nn.relu(cases.conv(x, w, groups=16))

    frozen = jax_bolt.freeze(grouped, normal(0, 3, 3, 4, 64))
    (site,) = frozen._rewritten((X,), {}).family.sites
    assert site.ready == "merged_groups"
    assert held(frozen, X) == 1
    monkeypatch.setattr(filters, "for_device", lambda _: None)
    at_call = jax_bolt.freeze(lambda w, x: grouped(w, x), normal(0, 3, 3, 4, 64))
    assert held(at_call, X) == 0


def test_what_calls_copy_first_is_not(gpu, nvcc, monkeypatch):  # noqa: F811
    """An array in another layout, or on a device that the call does not run on."""
    w, b = parameters(1)[0]
    columns = Format(Layout((3, 2, 1, 0)), w.sharding)
    assert held(jax_bolt.freeze(layer, jax.device_put(w, columns), b), X) == 0
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    assert held(jax_bolt.freeze(layer, w, b), X) == 1
    here = jax.device_put((w, b), jax.devices()[0])
    assert held(jax_bolt.freeze(layer, *here), X) == 1
    monkeypatch.setattr(jax, "local_devices", lambda: ["another one"])
    assert held(jax_bolt.freeze(layer, w, b), X) == 0
    assert held(jax_bolt.freeze(layer, *here), X) == 1


def test_what_goes_where_the_image_is_is_not():
    (device,) = jax.devices()[:1]
    x = jax.device_put(normal(1, 2, 8), device)
    assert compat.place_of(x) == device and compat.runs_on(device, [x])
    other = types.SimpleNamespace(committed=True, devices=lambda: {"another one"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_device_count", lambda: 2)
        assert compat.runs_on(device, [x]) and not compat.runs_on(device, [other])
    assert compat.place_of(jax.random.key(0)) is compat.place_of(np.ones(2)) is None


def test_abstract_parameters_are_not(gpu, nvcc):  # noqa: F811
    given = parameters(1)[0]
    shapes = (jax.ShapeDtypeStruct(p.shape, p.dtype) for p in given)
    abstract = at_the_top(jax_bolt.freeze(layer, *shapes), X)
    assert (abstract != at_the_top(jax_bolt.freeze(layer, *given), X)).sum() == 1


def test_in_a_loop_they_are_not(gpu, nvcc):  # noqa: F811
    def looped(w: Any, b: Any, x: Any) -> Any:
        return jax.lax.fori_loop(0, 3, lambda _, x: layer(w, b, x), x)

    assert held(jax_bolt.freeze(looped, *parameters(1)[0]), X) == 0


def test_what_is_held_is_ready(monkeypatch):
    waited: list[Any] = []

    def block_until_ready(x: Any) -> Any:
        waited.extend(jax.tree.leaves(x))
        return x

    frozen = jax_bolt.freeze(layer, *parameters(1)[0])
    monkeypatch.setattr(jax, "block_until_ready", block_until_ready)
    x = normal(3, *X.shape)
    for each in (frozen, frozen.replace(*parameters(2)[1])):
        waited.clear()
        each(x)
        (_, (kept,)) = each._bound((x,), {})
        assert len(kept) == 2 and kept[0] is each._frozen[0]
        assert [*map(id, waited)] == [*map(id, kept)]
        each(x)
        assert len(waited) == 2, "once"


CASES = [
    *(*cases.GEMMS, *cases.CONVS),
    *(*chain_cases.CASES, *chain_cases.MERGED, *chain_cases.JOINED),
]


def case_merges(region: ir.Work) -> bool:
    return isinstance(region, ir.Chain) and isinstance(region.first, ir.Chain)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_number_of_a_launch_says_so(case: Any):
    region = case.site().region
    if isinstance(region, ir.Chain):
        found, _ = plan.chain_candidates(region, HOPPER)
    else:
        found, _ = plan.candidates(region, HOPPER)
    for candidate in found:
        waits, reads = candidate.recipe, candidate.held_recipe
        changed = [
            pair for pair in zip(waits, reads, strict=True) if len(set(pair)) > 1
        ]
        if candidate.template.name in ("implicit_gemm_sm90", "chain_sm90"):
            # What a prologue packs was written by the kernel just before.
            template: Any = candidate.template
            packed = template.prologue(candidate.form.region) is not None
            geometries = 1 + case_merges(region)
            assert changed == ([] if packed else [(0, 1)] * geometries)
        elif candidate.template.name == "merged_sm90":
            assert changed == [(0, 1)] * 2
        else:
            assert changed == []
