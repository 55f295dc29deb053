# SPDX-License-Identifier: Apache-2.0
"""Chains: which pairs of calls could be one kernel, and what is launched for them."""

from __future__ import annotations

import itertools
import random
import re
import sys
from pathlib import Path
from typing import Any

import chain_stub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_lower
from chain_stub import BOTTLENECK, bottleneck, conv, pairs, shape, traced
from fakes import Build
from test_lower import TARGET, cuda_text, fresh_warnings, kernel  # noqa: F401

import jax_bolt
from jax_bolt import _native
from jax_bolt._src import (
    arch,
    chain,
    compat,
    invoke,
    ir,
    kernels,
    lower,
    plan,
    region_text,
    resolve,
)
from jax_bolt._src.errors import CompileError
from jax_bolt._src.invoke import ChainExecutable
from jax_bolt._src.jit import loader
from jax_bolt._src.launches import Launches
from jax_bolt._src.tune import isolate, measure

HOPPER = arch.from_name("sm_90a")


def relu_product(x: Any, w: Any) -> Any:
    return jax.nn.relu(x @ w)


# --- Finding them


@pytest.mark.usefixtures("as_users_run_it")
def test_pairs_of_resnet50() -> None:
    """Every 3x3 with its expansion but the last, which ends in the mean; every
    expansion with the next reduction; every projected shortcut with its sum, alone and
    with the next reduction."""
    pytest.importorskip("flax")
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    from benchmarks.models import models

    apply, *args = models.shapes("resnet50")
    every = pairs(apply, *args)
    longer = [each for each in every if len(each.calls) > 2]
    found = [each for each in every if each not in longer]
    merged = [p.info for p in found if p.info.region.side is not None]
    kept = [p.info for p in found if not p.info.region.stored and p.info not in merged]
    stored = [pair.info for pair in found if pair.info.region.stored]
    assert len(kept) == 15 and len(stored) == 15 and len(merged) == 4
    assert {info.first.label for info in merged} == {"conv1x1+bn"}
    assert {info.second.label for info in merged} == {"conv1x1+bn+add+relu"}
    assert {info.first.label for info in kept} == {"conv3x3+bn+relu"}
    # The sum goes to the next block's first conv, and is its residual or is projected.
    assert {info.first.label for info in stored} == {"conv1x1+bn+add+relu"}
    assert {info.second.label for info in stored} == {"conv1x1+bn+relu"}
    # Those that share a call: an expansion is the second of one and the first of one.
    used = [i for pair in found for i in pair.calls]
    assert max(map(used.count, used)) == 2
    assert [each.calls[:2] for each in longer] == [
        each.calls for each in found if each.info in merged
    ]
    for each in longer:
        assert each.info.region.stored and each.place == each.calls[1]
        assert each.info.label == "conv1x1+bn to conv1x1+bn+add+relu to conv1x1+bn+relu"
        assert region_text.parse(each.info.region.text) == each.info.region
    # What the largest 3x3 convs would save is not worth a look.
    texts = {p.info.region.text: p.info.region for p in found}
    worth = {t for t, r in texts.items() if plan.saving(r, HOPPER) >= 0.1}
    assert len(texts) == 22 and len(worth) == 20
    assert all("c512 k512r3s3" in text for text in texts.keys() - worth)
    for info in kept + stored + merged:
        assert region_text.parse(info.region.text) == info.region


def regions(fun: Any, *args: Any) -> list[tuple[str, str]]:
    """Of every pair: whether its first result is stored, and the second label."""
    return [
        ("stored" if p.info.region.stored else "kept", p.info.second.label)
        for p in pairs(fun, *args)
    ]


X, W = shape(64, 32), shape(32, 32)


def test_a_result_that_nobody_else_reads_is_kept() -> None:
    def fun(x, w, v):
        return relu_product(relu_product(x, w), v)

    assert regions(fun, X, W, W) == [("kept", "dot+relu")]


def test_a_result_that_leaves_is_stored() -> None:
    def fun(x, w, v):
        y = relu_product(x, w)
        return relu_product(y, v), y

    assert regions(fun, X, W, W) == [("stored", "dot+relu")]
    (pair,) = pairs(bottleneck, *BOTTLENECK)
    assert pair.info.region.stored and pair.calls == (0, 1)
    assert pair.info.name.count(" to ") == 1


def test_a_result_that_a_later_call_reads_is_stored() -> None:
    def fun(x, w, v):
        y = relu_product(x, w)
        return jax.nn.relu(relu_product(y, v) @ w + y)

    assert regions(fun, X, W, W) == [("stored", "dot+relu"), ("kept", "dot+add+relu")]


def test_bodies_have_chains_of_their_own() -> None:
    def fun(x, w):
        def body(carry, _):
            return relu_product(relu_product(carry, w), w), None

        return jax.lax.scan(body, x, None, 3)[0]

    assert regions(fun, X, W) == [("kept", "dot+relu")]


def strided(x, w, v):
    return conv(jax.nn.relu(conv(x, w)), v, 2)


def wide(x, w, v):
    return conv(conv(x, w), v)


def own_side(x, w, v):
    y = relu_product(x, w)
    return y @ v + y


def between(x, w, v):
    """The second product's side input is made after the first product."""
    y = relu_product(x, w)
    z = relu_product(x, v)
    return jnp.tanh(y @ w + z)


def batched(x, w, v):
    return jnp.einsum("bij,bjk->bik", jnp.einsum("bij,bjk->bik", x, w), v)


def two_outputs(x, w, v):
    y = x @ w
    return jax.nn.relu(y * 2) @ v, y


SQUARE = shape(32, 32)
IMAGE, ONE = shape(2, 8, 8, 32), shape(1, 1, 32, 32)


@pytest.mark.parametrize(
    ("fun", "args"),
    [
        (strided, (IMAGE, ONE, ONE)),
        (wide, (IMAGE, ONE, shape(3, 3, 32, 32))),
        (own_side, (X, W, W)),
        (batched, (shape(4, 32, 32),) * 3),
        (two_outputs, (X, W, W)),
    ],
)
def test_what_is_no_chain(fun: Any, args: Any) -> None:
    done = traced(fun, *args)
    assert len(done.family.sites) == 2
    assert pairs(fun, *args) == []


def test_what_is_made_between_is_not_waited_for() -> None:
    """z is made after y, so the launch of y cannot read it; the other way round it can.

    And z, which is added, can be made where the sum is.
    """
    assert len(traced(between, X, W, W).family.sites) == 3
    (merged,) = pairs(between, X, W, W)
    assert merged.info.region.side == 0 and merged.place == merged.calls[1]

    def other(x, w, v):
        z = relu_product(x, v)
        y = relu_product(x, w)
        return jnp.tanh(y @ w + z)

    apart, merged = pairs(other, X, W, W)
    assert apart.info.region.side is None and apart.place == apart.calls[0]
    assert merged.info.region.side == 0 and apart.calls[1] == merged.calls[1]


def test_a_filter_is_no_left_operand() -> None:
    def fun(x, w, v):
        y = relu_product(x, w)
        return jax.lax.dot_general(v, y, (((1,), (0,)), ((), ())))

    found = pairs(fun, SQUARE, SQUARE, SQUARE)
    assert all(p.info.second.region.problem.a_layout == "row" for p in found)  # pyright: ignore


def test_models_in_another_layout_have_chains() -> None:
    """The transposes between two calls cancel."""
    layout = ("NCHW", "OIHW", "NCHW")

    def nchw(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=layout
        )

    def fun(x, residual, w, v):
        y = jax.nn.relu(nchw(x, w) + residual)
        return jax.nn.relu(nchw(y, v)), y

    args = shape(2, 16, 8, 8), shape(2, 32, 8, 8), shape(32, 16, 1, 1)
    (pair,) = pairs(fun, *args, shape(16, 32, 1, 1))
    assert pair.info.region.stored
    first, second = pair.info.region.regions
    assert (first.problem.channels, second.problem.channels) == (32, 16)


def test_disabled() -> None:
    (found,) = chain.sequences(traced(bottleneck, *BOTTLENECK).program)
    assert len(found) == 1
    alone = traced(bottleneck, *BOTTLENECK, disable=("sequence",))
    assert list(chain.sequences(alone.program)) == []


# --- Which of them


def of(*calls: int) -> chain.Chained:
    return chain.Chained(calls, None)  # type: ignore[arg-type]


def test_the_pairs_that_save_most_together() -> None:
    found = [of(0, 1), of(1, 2), of(2, 3)]
    assert chain.best(found, [2.0, 3.0, 2.0]) == [found[0], found[2]]
    assert chain.best(found, [2.0, 5.0, 2.0]) == [found[1]]
    assert chain.best(found, [2.0, 0.0, -1.0]) == [found[0]]
    assert chain.best([], []) == []


def test_three_save_what_their_pair_saves_too_where_that_runs() -> None:
    found = [of(0, 1), of(1, 2), of(0, 1, 2)]
    assert chain.whole(found, [2.0, 3.0, 1.5]) == [2.0, 3.0, 3.5]
    assert chain.whole(found, [2.0, 3.0, -1.0]) == [2.0, 3.0, -1.0]
    assert chain.whole(found, [0.0, 3.0, 1.5]) == [0.0, 3.0, 0.0]
    assert chain.whole(found[1:], [3.0, 1.5]) == [3.0, 0.0]


@pytest.mark.parametrize("seed", range(40))
def test_no_other_choice_saves_more(seed: int) -> None:
    draw = random.Random(seed)
    found, savings = [], []
    for consumer in range(1, 9):
        if draw.random() < 0.8:
            calls = sorted(
                draw.sample(range(consumer), min(consumer, draw.choice((1, 1, 2))))
            )
            found.append(of(*calls, consumer))
            savings.append(draw.uniform(-1.0, 5.0))

    def total(chosen: Any) -> float | None:
        calls = [i for j in chosen for i in found[j].calls]
        return sum(savings[j] for j in chosen) if len(calls) == len({*calls}) else None

    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(len(found)), n) for n in range(5)
    )
    most = max(t for subset in subsets if (t := total(subset)) is not None)
    got = total([found.index(pair) for pair in chain.best(found, savings)])
    assert got is not None and got == pytest.approx(most)


# --- In which order


def random_program(draw: random.Random) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """Products of earlier values, some with a side input, and some of them results."""
    widths = [draw.choice((8, 16)) for _ in range(9)]
    plan_: list[tuple[int, int | None]] = []
    for index in range(1, len(widths)):
        same = [i for i in range(index) if widths[i] == widths[index]]
        side = draw.choice([None, *same])
        plan_.append((draw.choice([index - 1, draw.randrange(index)]), side))
    leaving = [i for i in range(1, len(widths)) if draw.random() < 0.3]

    def fun(x, *filters):
        values = [x]
        for w, (left, side) in zip(filters, plan_, strict=True):
            y = values[left] @ w
            values.append(jax.nn.relu(y if side is None else y + values[side]))
        return [values[i] for i in (*leaving, len(values) - 1)]

    shapes = [shape(4, widths[0], dtype=jnp.float32)]
    for width, (left, _) in zip(widths[1:], plan_, strict=True):
        shapes.append(shape(widths[left], width, dtype=jnp.float32))
    return fun, shapes


@pytest.mark.parametrize("seed", range(30))
def test_all_is_there_when_it_is_launched(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whichever pairs run: the steps in order, with what chains keep nowhere."""
    draw = random.Random(seed)
    fun, shapes = random_program(draw)
    eqns = traced(fun, *shapes).program.jaxpr.eqns
    sequences = [e for e in eqns if e.primitive.name == "bolt_sequence"]
    for eqn in sequences:
        calls = eqn.params["calls"]
        found = chain.chains_of(calls)
        chosen = chain.best(found, [draw.uniform(-0.3, 1) for _ in found])
        given = [(pair, "chain") for pair in chosen]
        monkeypatch.setattr(lower, "_chains", lambda *_, given=given: given)
        monkeypatch.setattr(lower, "_kernel_or_none", lambda *_: "kernel")
        steps = lower._steps(None, calls, None, None)  # type: ignore[arg-type]
        assert sum(len(step.eqns) for step in steps) == len(calls.jaxpr.eqns)
        assert sum(step.kernel == "chain" for step in steps) == len(chosen)
        kept = {
            calls.jaxpr.eqns[index].outvars[0]
            for each in chosen
            for index in each.calls[: -2 if each.info.region.stored else -1]
        }
        rng = np.random.default_rng(seed)
        inputs = [
            rng.standard_normal(aval.shape, np.float32) / 4 for aval in calls.in_avals
        ]
        want = compat.jaxpr_as_fun(calls)(*inputs)
        env = dict(zip(calls.jaxpr.invars, inputs, strict=True))
        for step in steps:
            for call in step.eqns:
                site = call.params["site"]
                made = chain.reference_fun(site.reference)(
                    *(env[v] for v in call.invars)
                )
                env.update(zip(call.outvars, made, strict=True))
            env = {v: value for v, value in env.items() if v not in kept}
        for var, expected in zip(calls.jaxpr.outvars, want, strict=True):
            np.testing.assert_array_equal(env[var], expected)


def test_random_programs_have_chains() -> None:
    """Or the test above would not say much."""
    stored: list[bool] = []
    for seed in range(30):
        fun, shapes = random_program(random.Random(seed))
        stored += [pair.info.region.stored for pair in pairs(fun, *shapes)]
    assert stored.count(True) > 20 and stored.count(False) > 20


# --- Candidates


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "CHAIN_TEMPLATES", (chain_stub,))


def info(fun: Any = bottleneck, args: Any = BOTTLENECK) -> chain.ChainInfo:
    (pair,) = pairs(fun, *args)
    return pair.info


def test_candidates(stub: None) -> None:
    region = info().region
    found, reasons = plan.chain_candidates(region, HOPPER)
    assert [c.text for c in found] == [
        f"chain_stub pixels={n} (pixels+pixels)" for n in (64, 128)
    ]
    assert reasons == []
    for candidate in found:
        names = candidate.form.name, candidate.template.name, candidate.config.text
        assert plan.named(region, HOPPER, *names) == candidate
        assert "Chain<" in candidate.source.splitlines()[-1]
        assert candidate.source.count("struct ") == 2
    assert plan.named(region, HOPPER, "pixels+pixels", "chain_stub", "gone") is None
    assert plan.named(region, HOPPER, "gone", "chain_stub", "pixels=64") is None
    found, reasons = plan.chain_candidates(region, HOPPER, ("chain_stub",))
    assert found == [] and "chain_stub is disabled" in reasons
    # 29 % of the bytes of a chain that neither writes nor reads twice what is between.
    assert 0.25 < plan.saving(region, HOPPER) < 0.35


def test_what_saves_little_is_not_compiled(stub: None) -> None:
    def fun(x, w, v):
        return conv(conv(x, w), v)

    args = shape(32, 7, 7, 512), shape(3, 3, 512, 512), shape(1, 1, 512, 2048)
    found, reasons = plan.chain_candidates(info(fun, args).region, HOPPER)
    assert found == [] and reasons == ["it could save at most 9% of the time"]


def test_channels_that_a_form_would_pad_are_not_made(stub: None) -> None:
    def fun(x, w, v):
        return relu_product(relu_product(x, w), v)

    region = info(fun, (X, shape(32, 20), shape(20, 32))).region
    found, reasons = plan.chain_candidates(region, HOPPER)
    assert found == []
    # The second one's K-major form has 24 channels: it is no chain.
    names = ("direct+direct", "k_major+direct")
    assert reasons == [f"chain_stub ({name}): 20 channels" for name in names]


# --- Launching


def executable(site: chain.ChainInfo) -> resolve.Resolution:
    found, reasons = plan.chain_candidates(site.region, HOPPER)
    if not found:
        return plan.Rejection("; ".join(reasons))
    candidate = found[0]
    problems = tuple(r.problem for r in site.region.regions)
    made = ChainExecutable(
        "c" * 64, problems, candidate.form, 0, recipe=candidate.recipe
    )
    return plan.Plan(candidate, "user", saved_us=1.0), made


@pytest.fixture
def chained(kernel: None, stub: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A kernel for every site and every pair."""
    monkeypatch.setattr(resolve, "resolve_chain", lambda site, *_: executable(site))


def launches(text: str) -> list[tuple[int, str]]:
    """Of every custom call: how many kernels it launches, and its results."""
    calls = re.findall(r"custom_call @jax_bolt.launch.*", text)
    return [
        (
            int(re.findall(r"program = dense<\[2, (\d+),", line)[0]),
            re.findall(r"-> (.*?)(?: loc|$)", line)[0],
        )
        for line in calls
    ]


def test_one_launch_for_both(chained: None) -> None:
    text = cuda_text(bottleneck, *BOTTLENECK)
    ((count, results),) = launches(text)
    assert count == 1 and f'digests = "{"c" * 64}"' in text
    # Both are results, and there is nothing between.
    assert results == "(tensor<32x28x28x512xbf16>, tensor<32x28x28x128xbf16>)"
    assert "stablehlo.convolution" not in text


def test_a_kept_result_is_nowhere(chained: None) -> None:
    def fun(x, w, v):
        return relu_product(relu_product(x, w), v)

    ((count, results),) = launches(cuda_text(fun, X, shape(32, 64), shape(64, 16)))
    assert (count, results) == (1, "tensor<64x16xbf16>")


def test_a_result_that_was_dropped_since_is_kept(chained: None) -> None:
    optimized = jax_bolt.optimize(bottleneck)
    text = cuda_text(lambda *args: optimized(*args)[0], *BOTTLENECK)
    assert launches(text) == [(1, "tensor<32x28x28x128xbf16>")]


def test_of_three_calls_two_are_one(chained: None) -> None:
    def fun(x, w, v, u):
        return relu_product(relu_product(relu_product(x, w), v), u)

    args = X, shape(32, 64), shape(64, 16), shape(16, 32)
    text = cuda_text(fun, *args)
    ((count, _),) = launches(text)
    assert count == 2
    assert re.search(r'digests = "(c{64},d{64}|d{64},c{64})"', text)
    with jax_bolt.options(disable=("chain",)):
        text = cuda_text(fun, *args)
    ((count, _),) = launches(text)
    assert count == 3 and "c" * 64 not in text


def test_the_text_is_the_same_every_time(chained: None) -> None:
    assert len({cuda_text(bottleneck, *BOTTLENECK) for _ in range(3)}) == 1


def test_the_launch_has_both_names(chained: None) -> None:
    def model(*args):
        with jax.named_scope("Block_3"):
            return bottleneck(*args)

    text = test_lower.lowered(jax_bolt.optimize(model), *BOTTLENECK)
    found = text.as_text(debug_info=True)
    assert TARGET in found and "conv1x1+add+relu to conv1x1+relu" in found


@pytest.mark.parametrize("strict", [False, True])
def test_a_chain_that_fails_costs_only_itself(
    chained: None,
    fresh_warnings: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    strict: bool,
) -> None:
    def fail(*_: Any) -> Any:
        raise CompileError("no nvcc", log="line\n" * 9)

    monkeypatch.setattr(resolve, "resolve_chain", fail)
    if strict:
        fun = jax_bolt.optimize(bottleneck, on_error="raise")
        with pytest.raises(CompileError):
            test_lower.lowered(fun, *BOTTLENECK)
        return
    with pytest.warns(UserWarning, match="one kernel, runs on several: no nvcc"):
        text = cuda_text(bottleneck, *BOTTLENECK)
    ((count, _),) = launches(text)
    assert count == 2


def test_a_chain_whose_input_xla_rearranges_begins_a_call(chained: None) -> None:
    """Of 20 channels rows are padded, which XLA has to do."""

    def fun(x, w, v, u):
        return relu_product(relu_product(relu_product(x, w), v), u)

    text = cuda_text(fun, X, shape(32, 20), shape(20, 64), shape(64, 16))
    assert [count for count, _ in launches(text)] == [1, 1]


def test_every_transformation_means_the_same(chained: None) -> None:
    """On a CPU chains are not there, and no reference knows of them."""
    rng = np.random.default_rng(0)
    dims = ((6, 8), (8, 16), (16, 8), (6, 16))
    args = [jnp.asarray(rng.standard_normal(d, np.float32)) for d in dims]

    def model(x, w, v, side):
        y = jax.nn.relu(x @ w + side)
        return jax.nn.relu(y @ v), y

    optimized = jax_bolt.optimize(model)

    def total(f: Any) -> Any:
        return lambda *xs: sum(jnp.sum(y * y) for y in f(*xs))

    def check(transform: Any) -> None:
        want, got = transform(model), transform(optimized)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            *(want, got),
        )

    assert len(pairs(model, *args)) == 1
    check(lambda f: jax.jit(f)(*args))
    check(lambda f: jax.grad(total(f), argnums=(0, 1, 2, 3))(*args))
    check(lambda f: jax.jvp(f, args, args))
    stacked = jnp.stack([args[0], 2 * args[0]])
    check(lambda f: jax.vmap(f, (0, None, None, None))(stacked, *args[1:]))


# --- What a kernel is bound to


@pytest.fixture(scope="session")
def host(build: Build) -> str:
    """Sequences of kernels of host code, on the CPU: chains with and without a side."""
    for sides in (0, 1):
        flags = ("-DFAKE_CHANNELS=3", f"-DFAKE_SIDES={sides}")
        path = build("chain.cc", f"chain{sides}.so", *flags)
        _native.load(f"chain{sides}", str(path))
    flags = ("-DFAKE_CHANNELS=6", "-DFAKE_SIDES=0", "-DFAKE_MERGED=4")
    _native.load("merged", str(build("chain.cc", "merged.so", *flags)))
    flags = ("-DFAKE_CHANNELS=3", "-DFAKE_SIDES=0", "-DFAKE_JOINED=4")
    _native.load("joined", str(build("chain.cc", "joined.so", *flags)))
    _native.load("kernel", str(build("kernel.cc", "kernel.so")))
    name = "jax_bolt_test.launch_chain"
    jax.ffi.register_ffi_target(name, _native.host_handlers(), platform="cpu")
    return name


def rand(*dims: int) -> np.ndarray:
    rng = np.random.default_rng(sum(dims))
    return rng.standard_normal(dims, dtype=np.float32)


def product(m: int, n: int, k: int) -> invoke.Executable:
    problem = ir.GemmProblem(m=m, n=n, k=k, dtype="f32")
    region = ir.Region(problem=problem, epilogue=ir.Epilogue((ir.Op("acc"),), 0, "f32"))
    form = plan.forms.Form("direct", region)
    return invoke.Executable("kernel", problem, form, 0)


def model_of(stored: bool, side: bool) -> tuple[Any, list[np.ndarray]]:
    def fun(x, w, bias, v, other, *sides):
        y = x @ w + sum(sides) + bias[None]
        z = y @ v + other[None]
        return (y, z) if stored else z

    args = [rand(7, 5), rand(5, 6), rand(6), rand(6, 3), rand(3)]
    return fun, [*args, *([rand(7, 6)] if side else [])]


@pytest.mark.parametrize("stored", [0, 1])
@pytest.mark.parametrize("side", [0, 1])
def test_a_chain_finds_its_buffers(host, monkeypatch, stored, side) -> None:
    """Two in one call, of which the second reads what the first one made."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    fun, args = model_of(bool(stored), bool(side))
    site = info(fun, args)
    assert site.region.stored == bool(stored)
    (form,) = plan.forms.chain_forms(site.region)[:1]
    problems = tuple(r.problem for r in site.region.regions)
    made = ChainExecutable(f"chain{side}", problems, form, 0, ())
    order = operands_of(site, fun, args)
    got = jax.jit(measure.kernel_function(site, made))(*order)
    want = fun(*args) if stored else [fun(*args)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        *(list(want), got),
    )
    operands = measure.make_operands(site, l2_bytes=0)
    errors = measure.errors(operands, made)
    assert errors.kernel < 1e-5 and measure.is_accurate(errors, site.region)
    # Its reference says the same, and so does the yardstick.
    reference = chain.reference_fun(site.reference)(*order)
    truth = measure.truth(site, order)
    for a, b, c in zip(want, reference, truth, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(a, c.reshape(a.shape), rtol=1e-4, atol=1e-5)


def test_a_merged_shortcut_finds_its_buffers(host, monkeypatch) -> None:
    """The second product reads an operand that was made after the first one."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)

    def fun(x, w, bias, h, v, other):
        y = x @ w + bias[None]
        return h @ v + y + other[None]

    args = [rand(7, 5), rand(5, 6), rand(6), rand(7, 4), rand(4, 6), rand(2, 3).ravel()]
    x, w, bias, h, v, other = args
    (site,) = (p.info for p in pairs(fun, *args) if p.info.region.side is not None)
    form = plan.forms.chain_forms(site.region)[0]
    problems = tuple(r.problem for r in site.region.regions)
    made = ChainExecutable("merged", problems, form, 0, ())
    first, second = (
        dict(zip(s.operands, given, strict=True))
        for s, given in zip(
            site.sites, ((x, w, bias), (h, v, None, other)), strict=True
        )
    )
    del second[site.between]
    order = [each[i] for each in (first, second) for i in sorted(each)]
    want = fun(*args)
    for got in (
        *jax.jit(measure.kernel_function(site, made))(*order),
        *chain.reference_fun(site.reference)(*order),
        *measure.truth(site, order),
    ):
        np.testing.assert_allclose(got.reshape(7, 6), want, rtol=1e-4, atol=1e-5)

    def run(x, w, bias, h, v, other):
        calls = Launches()
        (late,) = calls.add(product(7, 4, 4), h, h[:4], [], [], (7, 4))
        assert calls.takes(made, (x, w), (late, v))
        roles = (x, w, [], [bias]), (late, v, [None], [other])
        (z,) = calls.add_chain(made, roles, ((7, 6), (7, 6)))
        return calls.launch([z])[z]

    want = (h @ h[:4]) @ v + x @ w + bias + other
    got = jax.jit(run)(*args)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [0, 1])
def test_three_products_find_their_buffers(host, monkeypatch, stored) -> None:
    """A merged shortcut, and the product over the channels of the sum."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    monkeypatch.setattr(
        measure, "_time", lambda fun, sets, _: (1.0, jax.jit(fun)(sets)[0])
    )

    def fun(x, w, bias, h, v, other, u, last):
        y = x @ w + bias[None]
        y = h @ v + y + other[None]
        z = y @ u + last[None]
        return (y, z) if stored else z

    args = [rand(7, 5), rand(5, 6), rand(6), rand(7, 4), rand(4, 6), rand(2, 3).ravel()]
    args += [rand(6, 3), rand(3)]
    (found,) = (each for each in pairs(fun, *args) if len(each.calls) == 3)
    site = found.info
    assert site.region.stored == bool(stored) and site.region.joints == (0, None)
    x, w, bias, h, v, other, u, last = args
    given = (x, w, bias), (h, v, None, other), (None, u, last)
    order: list[Any] = []
    for each, values in zip(site.sites, given, strict=True):
        own = dict(zip(each.operands, values, strict=True))
        order += [own[i] for i in sorted(own) if own[i] is not None]
    form = plan.forms.chain_forms(site.region)[0]
    problems = tuple(region.problem for region in site.region.regions)
    made = ChainExecutable("joined", problems, form, 0, ())
    want: Any = fun(*args) if stored else [fun(*args)]
    for got in (
        jax.jit(measure.kernel_function(site, made))(*order),
        chain.reference_fun(site.reference)(*order),
        measure.truth(site, order),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-4, atol=1e-5)

    # Timed against the pair that it begins with, and a kernel.
    merged = ChainExecutable("merged", problems[:2], form.first, 0, ())  # type: ignore[arg-type]
    second = invoke.Executable("kernel", problems[2], form.second, 0)
    operands = measure.make_operands(site, l2_bytes=0)
    errors = measure.errors(operands, made)
    assert errors.kernel < 1e-5 and measure.is_accurate(errors, site.region)
    run = measure.time_apart((merged, second), operands, 0)
    assert len(run.outputs) == 1 + stored

    def promised(x, w, bias, h, v, other, u, last):
        calls = Launches()
        (late,) = calls.add(product(7, 4, 4), h, h[:4], [], [], (7, 4))
        assert calls.takes(made, (x, w), (late, v), (None, u))
        roles = (x, w, [], [bias]), (late, v, [None], [other]), (None, u, [], [last])
        kept = calls.add_chain(made, roles, ((7, 6), (7, 6), (7, 3)))
        assert len(kept) == 1 + stored
        return calls.launch(kept)[kept[-1]]

    y = (h @ h[:4]) @ v + x @ w + bias + other
    got = jax.jit(promised)(*args)
    np.testing.assert_allclose(got, y @ u + last, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("stored", [0, 1])
def test_both_ways_are_timed_with_the_same_results(host, monkeypatch, stored) -> None:
    """One kernel, two kernels and XLA; without a stopwatch."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    monkeypatch.setattr(
        measure, "_time", lambda fun, sets, _: (1.0, jax.jit(fun)(sets)[0])
    )
    fun, args = model_of(bool(stored), True)
    site = info(fun, args)
    problems = tuple(r.problem for r in site.region.regions)
    form = plan.forms.chain_forms(site.region)[0]
    both = ChainExecutable("chain1", problems, form, 0, ())
    first, second = (
        invoke.Executable(
            "kernel", each.region.problem, plan.forms.Form("direct", each.region), 0
        )
        for each in site.sites
    )
    operands = measure.make_operands(site, l2_bytes=0)
    runs = [
        measure.time_in_sequence(both, operands, 0),
        measure.time_apart((first, second), operands, 0),
        measure.time_region(chain.reference_fun(site.reference), operands, 0),
    ]
    want = measure.truth(site, operands.sets[0])
    for run in runs:
        assert len(run.outputs) == len(want) == 1 + stored
        for got, expected in zip(run.outputs, want, strict=True):
            np.testing.assert_allclose(
                np.reshape(got, expected.shape), expected, rtol=1e-4, atol=1e-5
            )


def operands_of(site: chain.ChainInfo, fun: Any, args: Any) -> list[Any]:
    """The chain's operands among a program's arguments, by their shapes."""
    by_shape = {a.shape: a for a in args}
    assert len(by_shape) == len(args)
    return [by_shape[tuple(aval.shape)] for aval in site.in_avals]


def test_promises_on_all_sides(host, monkeypatch) -> None:
    """What a chain reads, and what reads it, in one call."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    fun, args = model_of(True, True)
    x, w, bias, v, other, _ = args
    site = info(fun, args)
    problems = tuple(r.problem for r in site.region.regions)
    form = plan.forms.chain_forms(site.region)[0]
    both = ChainExecutable("chain1", problems, form, 0, ())

    def run(x, w, bias, v, other):
        calls = Launches()
        (left,) = calls.add(product(7, 5, 5), x, x[:5], [], [], (7, 5))
        (side,) = calls.add(product(7, 6, 5), left, w, [], [], (7, 6))
        assert calls.takes(both, (left, w), (None, v))
        assert not calls.takes(both, (left, side), (None, v))
        assert not calls.takes(both, (x, w), (None, side))
        roles = (left, w, [side], [bias]), (None, v, [], [other])
        y, z = calls.add_chain(both, roles, ((7, 6), (7, 3)))
        (last,) = calls.add(product(7, 6, 6), y, w.T @ w, [], [], (7, 6))
        made = calls.launch([z, last])
        return made[z], made[last]

    z, last = jax.jit(run)(x, w, bias, v, other)
    left = x @ x[:5]
    y = left @ w + left @ w + bias
    np.testing.assert_allclose(z, y @ v + other, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(last, y @ (w.T @ w), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("stored", [False, True])
def test_the_worker_binds_as_the_launch_does(stub: None, stored: bool) -> None:
    def fun(x, w, side, bias, v, other):
        y = jax.nn.relu(x @ w + side + bias[None])
        z = y @ v + other[None]
        return (z, y) if stored else z

    args = X, shape(32, 64), shape(64, 64), shape(64), shape(64, 16), shape(16)
    candidate = plan.chain_candidates(info(fun, args).region, HOPPER)[0][0]
    request = isolate.request_for(candidate, "d", Path("p"), 2, 3, verify=True)
    assert request["kind"] == invoke.GEMM and request["dims"] == [64, 64, 32, 1]
    assert request["recipe"] == list(candidate.recipe)
    operands = request["operands"]
    sizes = {
        name: [size for _, size, *_ in operands[name]]
        for name in ("ab", "sides", "vectors")
    }
    assert sizes["ab"] == [2 * 64 * 32, 2 * 32 * 64]
    assert sizes["sides"] == [2 * 64 * 16, 2 * 64 * 64]
    assert sizes["vectors"] == [2 * 64, 2 * 16]
    outputs = [2 * 64 * 64] if stored else []
    assert operands["output_bytes"] == [*outputs, 2 * 64 * 16]


def test_operands_are_drawn_as_each_site_wants_them() -> None:
    """The second filter has unit columns, too, and vectors are positive."""

    def fun(x, w, v, scale):
        return relu_product(relu_product(x, w), v) * scale[None]

    args = shape(256, 64), shape(64, 128), shape(128, 256), shape(256)
    site = info(fun, args)
    operands = measure.make_operands(site, l2_bytes=1)
    assert len(operands.sets) == 2
    values = {v.shape: np.asarray(v, np.float32) for v in operands.sets[0]}
    assert [a.shape for a in site.in_avals] == list(values)
    assert values[64, 128].std() == pytest.approx(1 / 8, rel=0.05)
    assert values[128, 256].std() == pytest.approx(128**-0.5, rel=0.05)
    assert values[(256,)].min() >= 0.5 and values[256, 64].min() < -1
