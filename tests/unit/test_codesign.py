# SPDX-License-Identifier: Apache-2.0
"""Advice: what a model's sites take with other activations, channels and layers."""

from __future__ import annotations

import dataclasses
import json
import statistics
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases
from jax import lax
from scipy import special

import jax_bolt
from jax_bolt._src import arch as arch_
from jax_bolt._src import (
    chain,
    compat,
    errors,
    evaluate,
    floor,
    ir,
    options,
    plan,
    region_text,
    resolve,
    results,
    rewrite,
)
from jax_bolt._src.codesign import activation, advise, variants
from jax_bolt._src.codesign.advice import Advice, SiteAdvice, Time
from jax_bolt._src.tune import db, measure

HOPPER = arch_.from_name("sm_90a")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
H200 = arch_.of_device("9.0", "NVIDIA H200", 132)
ORIGIN = plan.Origin("sources", "nvcc 1", "chains")
F32 = jnp.float32

NUMPY: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: (
        0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    ),
    "silu": lambda x: x * special.expit(x),
    "hard_swish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "softplus": lambda x: np.logaddexp(x, 0),
    "mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "leaky_relu": lambda x: np.where(x >= 0, x, 0.01 * x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
    "relu6": lambda x: np.clip(x, 0, 6),
}


def region(fun: Callable, *args: Any) -> ir.Region:
    return cases.Case("", fun, args).site().region


def block(act: Callable, x: Any, w: Any, side: Any, *stats: Any) -> Any:
    """A conv, BatchNorm, a residual and an activation."""
    return act(cases.batch_norm(cases.conv(x, w), *stats) + side)


def block_args(dtype: Any = jnp.bfloat16) -> tuple[Any, ...]:
    image = cases.shape(2, 6, 6, 16, dtype=dtype)
    stats = [cases.shape(16, dtype=F32)] * 4
    return image, cases.shape(3, 3, 16, 16, dtype=dtype), image, *stats


# --- Activations


@pytest.mark.parametrize("name", NUMPY)
def test_another_activation_is_the_region_of_the_model_that_has_it(name):
    """So that what advice measured is there when it is taken."""

    def made(name: str) -> ir.Region:
        act = getattr(jax.nn, name)
        return region(lambda *args: block(act, *args), *block_args())

    for now in ("relu", "silu"):
        epilogue = made(now).epilogue
        found = activation.find(epilogue)
        assert found is not None
        other = activation.named(name, epilogue.out_dtype)
        changed = activation.replaced(epilogue, found, other)
        assert changed.text == made(name).epilogue.text


@pytest.mark.parametrize("name", NUMPY)
def test_another_activation_computes_what_it_should(name):
    """Also in the middle of an epilogue, of which the rest stays."""

    def fun(x, w, side):
        return side - side * jax.nn.silu(3.0 * (x @ w))

    rng = np.random.default_rng(0)
    args = [rng.standard_normal(s) for s in ((40, 24), (24, 16), (40, 16))]
    shapes = [cases.shape(*a.shape, dtype=F32) for a in args]
    now = region(fun, *shapes)
    found = activation.find(now.epilogue)
    assert found is not None
    changed = activation.replaced(
        now.epilogue, found, activation.named(name, now.epilogue.out_dtype)
    )
    with jax.enable_x64(True):
        x, w, side = map(jnp.asarray, args)
        new = dataclasses.replace(now, epilogue=changed)
        got = evaluate.evaluate(new, x, w, [side], [], dtype=jnp.float64)
    want = args[2] - args[2] * NUMPY[name](3.0 * (args[0] @ args[1]))
    np.testing.assert_allclose(np.asarray(got), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "fun",
    [
        lambda x, w: x @ w,
        lambda x, w: (x @ w) * 2.0 + 1.0,
        lambda x, w: x @ w + jnp.ones((1, 16), jnp.bfloat16),
    ],
    ids=["nothing", "linear", "bias"],
)
def test_where_there_is_no_activation(fun):
    shapes = cases.shape(32, 16), cases.shape(16, 16)
    assert activation.find(region(fun, *shapes).epilogue) is None


def epilogue(*ops: ir.Op, auxiliary: tuple[ir.Output, ...] = ()) -> ir.Epilogue:
    ops = (ir.Op("acc"), *ops)
    return ir.Epilogue(ops, len(ops) - 1, "bf16", auxiliary=auxiliary)


def test_an_activation_whose_inside_is_read_stays():
    sigmoid, product = ir.Op("logistic", (0,)), ir.Op("mul", (0, 1))
    silu = epilogue(sigmoid, product)
    assert activation.find(silu) == activation.Segment(0, 2, frozenset({1, 2}))
    stored = epilogue(sigmoid, product, auxiliary=(ir.Output(1, "bf16"),))
    assert activation.find(stored) is None
    side = ir.Op("side", attr=0)
    read = (sigmoid, product, side, ir.Op("mul", (1, 3)), ir.Op("add", (2, 4)))
    leaking = dataclasses.replace(epilogue(*read), sides=("bf16",))
    assert activation.find(leaking) is None


def test_what_is_linear_ahead_of_an_activation_is_no_part_of_it():
    two, six = ir.Op("const", attr=2.0), ir.Op("const", attr=6.0)
    scaled = epilogue(
        two, ir.Op("mul", (0, 1)), ir.Op("max", (1, 2)), six, ir.Op("min", (3, 4))
    )
    found = activation.find(scaled)
    assert found is not None
    assert found == activation.Segment(2, 5, frozenset({3, 5}))
    relu = activation.replaced(scaled, found, activation.named("relu", "bf16"))
    assert (
        relu.text
        == epilogue(
            two, ir.Op("mul", (0, 1)), ir.Op("const", attr=0.0), ir.Op("max", (2, 3))
        ).text
    )
    taken = activation.taken(scaled, found)
    assert [op.name for op in taken.ops].count("mul") == 0
    assert activation.find(taken) == activation.Segment(
        0, taken.result, frozenset(i for i, op in enumerate(taken.ops) if op.args)
    )


@pytest.mark.parametrize("name", ["softmax", "glu", "one_hot", "_relu", "nothing"])
def test_what_is_no_activation(name):
    with pytest.raises(ValueError, match=f"'{name}' is no activation"):
        activation.named(name, "bf16")
    with pytest.raises(ValueError, match="no activation"):
        jax_bolt.advise(
            lambda x: x @ x, cases.shape(16, 16), activations=["relu", name]
        )


# --- Regions as sites


# Every third: those of a kind stand together.
@pytest.mark.parametrize("case", [*cases.GEMMS, *cases.CONVS][::3], ids=str)
def test_a_region_as_a_site_computes_what_the_region_says(case):
    known = case.site().region
    site = variants.site(known, "here")
    assert site.region is known and site.name == "here"
    operands = measure.make_operands(site, l2_bytes=1 << 10)
    (values, *_) = operands.sets
    outputs = jax.jit(compat.jaxpr_as_fun(site.reference))(*values)
    truth = measure.truth(site, values)
    assert len(outputs) == len(known.epilogue.outputs)
    tolerance = {"bf16": 2e-2, "f16": 3e-3, "f32": 1e-5}[known.problem.dtype]
    for output, wanted, declared in zip(
        outputs, truth, known.epilogue.outputs, strict=True
    ):
        assert output.dtype.name.startswith(declared.dtype[:1])
        got = np.asarray(output.astype(F32)).reshape(wanted.shape)
        off = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
        assert off < tolerance


# --- Channels and chains


def conv_problem(**changes: Any) -> ir.ConvProblem:
    sizes: dict[str, Any] = dict(n=2, h=8, w=8, c=64, k=64, r=3, s=3, dtype="bf16")
    sizes |= {"padding": (1, 1, 1, 1)}
    return ir.ConvProblem(**(sizes | changes))


def relu_region(problem: ir.Problem) -> ir.Region:
    zero = ir.Op("const", attr=0.0)
    return ir.Region(problem=problem, epilogue=epilogue(zero, ir.Op("max", (0, 1))))


@pytest.mark.parametrize(
    "problem, found",
    [
        (conv_problem(), []),
        (conv_problem(c=46), [("input", 48, 1 / 24)]),
        (conv_problem(c=174), [("input", 176, 1 / 88)]),
        (conv_problem(c=24), [("input", 32, 0.25)]),
        (conv_problem(c=3), [("input", 8, 5 / 8)]),
        (conv_problem(k=46), [("output", 48, 1 / 24), ("output", 64, 18 / 64)]),
        (conv_problem(k=96), [("output", 128, 0.25)]),
        (conv_problem(k=32), [("output", 64, 0.5)]),
        (conv_problem(k=24), []),
        (conv_problem(k=8), []),
        (conv_problem(c=8), [("input", 16, 0.5)]),
        (conv_problem(c=6, dtype="f32"), [("input", 8, 0.25)]),
        (conv_problem(c=30, k=30, groups=30), [("both", 32, 1 / 16)]),
        (conv_problem(c=30, k=60, groups=30), []),
        (conv_problem(c=30, k=30, groups=5), []),
        (ir.GemmProblem(m=9, n=1000, k=60, dtype="f16"),
         [("input", 64, 1 / 16), ("output", 1024, 24 / 1024)]),
        (ir.GemmProblem(m=9, n=50, k=50, batch=4, dtype="f16"), []),
    ],
    ids=lambda value: value.text if hasattr(value, "text") else "",
)  # fmt: skip
def test_channels_that_fill_no_unit(problem, found):
    made = list(variants.padded(relu_region(problem)))
    assert [(pad.operand, pad.to, pytest.approx(pad.idle)) for pad in made] == found
    for pad in made:
        new = pad.region.problem
        assert pad.to % pad.size == 0
        read = new.k if isinstance(new, ir.GemmProblem) else new.c
        if pad.operand in ("input", "both"):
            assert read == pad.to
        if pad.operand in ("output", "both"):
            assert new.channels == pad.to
        assert new.rows == problem.rows
        # What has aligned channels has nothing left to align.
        assert pad.operand not in {
            again.operand for again in variants.padded(pad.region) if again.to <= pad.to
        }


def test_a_chain_has_the_sites_channels_and_activation():
    chain = variants.chained(relu_region(conv_problem(k=48, stride=(2, 2))))
    assert chain is not None and not chain.stored
    assert chain.second.text == (
        "conv[bf16 n2h4w4c48 k48r1s1 st1x1 pad0x0x0x0 dil1x1] "
        "(bf16[n])(){%0=acc();%1=vector[0]();%2=add(%0,%1);%3=const[0x0.0p+0]();"
        "%4=max(%2,%3);bf16:%4}"
    )
    pointwise = relu_region(conv_problem(r=1, s=1, padding=(0, 0, 0, 0)))
    assert variants.chained(pointwise) is None
    product = relu_region(ir.GemmProblem(m=9, n=8, k=8, dtype="bf16"))
    assert variants.chained(product) is None


def test_a_chain_is_the_one_of_the_model_that_takes_the_advice():
    def fun(x, w, after, bias):
        y = jax.nn.silu(cases.conv(x, w))
        return jax.nn.silu(cases.conv(y, after) + bias)

    shapes = (*block_args()[:2], cases.shape(1, 1, 16, 16), cases.shape(1, 1, 1, 16))
    program = jax.make_jaxpr(fun)(*shapes)
    found = chain.sequences(rewrite.rewrite(program, options.Options()).program)
    ((pair,),) = found
    advised = variants.chained(pair.info.sites[0].region)
    assert advised is not None and advised.text == pair.info.region.text


def test_a_chain_as_a_site_computes_what_its_regions_say():
    first = relu_region(conv_problem(c=24, k=48, stride=(2, 2)))
    made = variants.chained(first)
    assert made is not None
    site = advise.chain_site(made, "here")
    assert site.region is made and site.name.startswith("here to here")
    (values, *_) = measure.make_operands(site, l2_bytes=1 << 10).sets
    (output,) = jax.jit(compat.jaxpr_as_fun(site.reference))(*values)
    (wanted,) = measure.truth(site, values)
    got = np.asarray(output.astype(F32)).reshape(wanted.shape)
    assert np.linalg.norm(wanted) > 0
    assert np.linalg.norm(got - wanted) < 2e-2 * np.linalg.norm(wanted)


def test_the_floor_of_a_chain_by_hand():
    chain = variants.chained(relu_region(conv_problem()))
    assert chain is not None
    found = floor.of_chain(chain, H200)
    pixels = 2 * 8 * 8
    assert found.flops == 2 * pixels * 64 * (9 * 64 + 64)
    # The image, both filters and the last result: what lies between moves nowhere.
    assert found.bytes_moved == 2 * (2 * pixels * 64 + (9 + 1) * 64 * 64 + 0)
    assert found.memory_us == pytest.approx(found.bytes_moved / 4.8e6)
    assert found.compute_us == pytest.approx(found.flops / 989e6)


# --- Estimates


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_90a", "sm_100a"])
@pytest.mark.parametrize(
    "problem",
    [
        conv_problem(n=32, h=56, w=56),
        conv_problem(n=32, h=56, w=56, c=64, groups=64),
        ir.GemmProblem(m=4096, n=3072, k=768, dtype="f16"),
    ],
    ids=["conv", "depthwise", "gemm"],
)
def test_an_estimate_is_above_the_floor_and_grows_with_the_epilogue(name, problem):
    arch = arch_.from_name(name)
    plain = relu_region(problem)
    found = activation.find(plain.epilogue)
    assert found is not None
    mish = activation.replaced(plain.epilogue, found, activation.named("mish", "bf16"))
    light = plan.estimate(plain, arch)
    heavy = plan.estimate(dataclasses.replace(plain, epilogue=mish), arch)
    assert light is not None and heavy is not None
    assert floor.floor(plain, arch).time_us < light < heavy < 2000


def test_an_estimate_counts_what_is_gathered_first():
    ragged = relu_region(conv_problem(n=32, h=56, w=56, c=62))
    even = relu_region(conv_problem(n=32, h=56, w=56, c=64))
    of_ragged, of_even = (plan.estimate(r, HOPPER) for r in (ragged, even))
    assert of_ragged is not None and of_even is not None
    written_and_read = 2 * 2 * 32 * 56 * 56 * 64 / HOPPER.bandwidth * 1e6
    assert of_ragged > of_even + 0.9 * written_and_read


def test_estimates_beside_what_was_measured():
    """The best kernels of all kinds of regions, as the benchmark had them."""
    ratios = []
    for path in sorted(RESULTS.glob("kernels-nvidia-h200-*.json")):
        document = json.loads(path.read_text())
        for problem in document["problems"][::3]:
            if problem.get("ours_us"):
                region = region_text.parse(problem["region"])
                assert isinstance(region, ir.Region)
                estimate = plan.estimate(region, H200)
                assert estimate is not None
                ratios.append(estimate / problem["ours_us"])
    assert len(ratios) > 20
    assert 0.5 < min(ratios) and max(ratios) < 1.4
    assert 0.85 < statistics.geometric_mean(ratios) < 1.1


def test_an_estimate_of_a_chain():
    made = variants.chained(relu_region(conv_problem(n=32, h=56, w=56)))
    assert made is not None
    found, _ = plan.chain_candidates(made, H200)
    estimate = plan.estimate(made, H200)
    assert estimate == min(c.micros for c in found)
    # Neither free nor out of proportion.
    first, second = plan.estimate(made.first, H200), plan.estimate(made.second, H200)
    assert estimate and first and second
    assert first < estimate < 1.5 * (first + second)
    assert plan.estimate(made, H200, ("chain_sm90",)) is None
    assert plan.estimate(made, arch_.from_name("sm_80")) is None


@pytest.mark.parametrize("now, then", [(62, 64), (100, 104)])
def test_an_estimate_of_a_chain_counts_what_is_gathered_first(now, then):
    """By the kernel's prologue, or by XLA."""
    ragged, even = (
        variants.chained(relu_region(conv_problem(n=32, h=56, w=56, c=c)))
        for c in (now, then)
    )
    assert ragged is not None and even is not None
    of_ragged, of_even = plan.estimate(ragged, HOPPER), plan.estimate(even, HOPPER)
    assert of_ragged is not None and of_even is not None
    written_and_read = 2 * 2 * 32 * 56 * 56 * then / HOPPER.bandwidth * 1e6
    assert of_ragged > of_even + 0.9 * written_and_read


def test_no_estimate_where_no_kernel_takes_it():
    grouped = relu_region(conv_problem(c=64, k=64, groups=4))
    assert plan.estimate(grouped, arch_.from_name("sm_80")) is None


# --- Advice


def model(x: Any, f: Any, g: Any, h: Any, other: Any) -> Any:
    """Two equal convs, one with no activation, and one that no kernel takes."""
    x = jax.nn.relu(cases.conv(x, f))
    x = jax.nn.relu(cases.conv(x, g))
    x = jax.nn.relu(cases.conv(x, g))
    x = cases.conv(x, h, padding="VALID")
    return lax.conv_general_dilated(
        *(x, other, (1, 1), "SAME"),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        batch_group_count=4,
    )


MODEL = (
    *(cases.shape(8, 28, 28, 16), cases.shape(3, 3, 16, 96)),
    *(cases.shape(3, 3, 96, 96), cases.shape(1, 1, 96, 64)),
    cases.shape(3, 3, 64, 64),
)


def test_estimates_for_a_model():
    advice = jax_bolt.advise(model, *MODEL, arch="sm_90a")
    assert (advice.arch, advice.device, advice.refused) == ("sm_90a", "", 1)
    assert not advice.is_measured
    twice, first, linear = advice.sites
    assert [site.count for site in advice.sites] == [2, 1, 1]
    for site in (twice, first):
        assert list(site.activations) == list(advise.ACTIVATIONS)
        assert site.activations["relu"] == site.now
        assert site.pointwise is not None and site.pointwise.channels == 96
        assert site.pointwise.chain is not None
        both = site.pointwise.chain.estimate_us
        assert both is not None and 0 < site.pointwise.chain_floor_us < both
        assert site.pointwise.chain.text.startswith("~")
        (pad,) = site.channels
        assert (pad.operand, pad.channels, pad.to) == ("output", 96, 128)
    assert linear.activations == {} and linear.pointwise is None
    sums = advice.totals()
    one, other = twice.now.estimate_us, first.now.estimate_us
    assert one is not None and other is not None
    expected = 2 * one + other
    assert sums["now"] == sums["relu"] == pytest.approx(expected)
    assert sums["mish"] > sums["relu"]


def test_without_a_gpu_the_usual_one_is_meant(monkeypatch):
    monkeypatch.setattr(compat, "cuda_device", lambda: None)
    optimized = jax_bolt.optimize(model)
    advice = optimized.advise(*MODEL, activations=("relu", "tanh"))
    assert advice == jax_bolt.advise(
        model, *MODEL, arch="sm_90a", activations=["relu", "tanh"]
    )
    assert advice.activations == ("relu", "tanh")


def test_of_a_frozen_function():
    f = jnp.ones((3, 3, 16, 96), jnp.bfloat16)
    frozen = jax_bolt.freeze(lambda f, x: jax.nn.relu(cases.conv(x, f)), f)
    (site,) = jax_bolt.advise(frozen, MODEL[0], arch="sm_80").sites
    assert site.now.estimate_us


def test_without_chains_there_is_no_time_of_one():
    with options.options(disable="chain"):
        advice = jax_bolt.advise(model, *MODEL, arch="sm_90a")
    for made in (advice, jax_bolt.advise(model, *MODEL, arch="sm_80")):
        one = made.sites[0].pointwise
        assert one is not None and one.chain is None and one.time.estimate_us


def test_an_architecture_without_kernels_has_no_advice():
    with pytest.raises(errors.UnsupportedError, match="no kernels for sm_75"):
        jax_bolt.advise(model, *MODEL, arch="sm_75")


def test_the_text_names_the_board_whose_numbers_count():
    for name, board in (("sm_90a", "H100 SXM"), ("sm_80", "A100 80GB")):
        text = str(jax_bolt.advise(model, *MODEL, arch=name))
        assert text.startswith(f"Estimates (~) of the rank model for {name} ({board}):")


def test_a_function_without_sites():
    advice = jax_bolt.advise(jnp.sin, cases.shape(3), arch="sm_90a")
    assert advice.sites == () and not advice.is_measured
    assert set(advice.totals().values()) == {0.0}
    assert "nothing was run" in str(advice)


def test_the_text_says_that_estimates_are_none():
    text = str(jax_bolt.advise(model, *MODEL, arch="sm_90a"))
    lines = text.splitlines()
    assert lines[0].startswith("Estimates (~) of the rank model for sm_90a")
    assert "1 convs or products have no region" in lines[0]
    for title in ("Other activations", "Channels that fill", "A 1x1 conv after it"):
        assert title in text
    (total,) = (line for line in lines if line.startswith(" all of them"))
    assert total.count("~") == 1 + len(advise.ACTIVATIONS)
    (change,) = (line for line in lines if line.startswith(" change"))
    assert "+0%" in change and change.count("%") == len(advise.ACTIVATIONS)


def test_json_has_it_all():
    advice = jax_bolt.advise(model, *MODEL, arch="sm_90a")
    document = json.loads(advice.to_json())
    assert document["measured"] is False and document["refused"] == 1
    assert document["totals_us"] == advice.totals()
    first = document["sites"][0]
    assert first["activations"]["gelu"]["measured_us"] is None
    assert first["activations"]["gelu"]["estimate_us"] > 0
    assert first["pointwise"]["chain"]["estimate_us"] > 0
    assert document["board"] == "H100 SXM"
    assert first["channels"][0]["to"] == 128


def site_advice(now: Time, **activations: Time) -> SiteAdvice:
    return SiteAdvice(
        name="a", line="", epilogue="", problem="", count=3, now=now,
        activations=activations, channels=(), pointwise=None,
    )  # fmt: skip


def test_times_of_two_kinds_are_never_compared():
    both = Time(measured_us=10.0, estimate_us=8.0)
    guess = Time(estimate_us=12.0)
    mixed = Advice((site_advice(both, gelu=guess),), ("gelu",), "sm_90a", "H200")
    assert mixed.totals() == {"now": 24.0, "gelu": 36.0}
    assert not mixed.is_measured and "+50%" in str(mixed) and "~36.0" in str(mixed)
    measured = Advice((site_advice(both, gelu=both),), ("gelu",), "sm_90a", "H200")
    assert measured.totals() == {"now": 30.0, "gelu": 30.0}
    assert measured.is_measured and "~" not in str(measured)
    unknown = Advice((site_advice(both, gelu=Time()),), ("gelu",), "sm_90a", "H200")
    assert unknown.totals() == {"now": 0.0, "gelu": 0.0}
    (total,) = (line for line in str(unknown).splitlines() if "all of them" in line)
    assert "0" not in total and "~" not in total


# --- Measured


class Gpu:
    """Stands for a GPU and its tuner, which ends after ``limit`` regions."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.tuned: list[Any] = []
        self.limit = 10**6
        self.xla_is_faster: Callable[[ir.Region], bool] = lambda region: False
        self.chain_choice: str | None = "kernel"
        self.chains: list[Any] = []
        self.budgets: list[float | None] = []
        self._options = options.Options(cache_dir=root)
        target = types.SimpleNamespace(tools=None, arch=H200, origin=ORIGIN)
        for module, name, fake in (
            (compat, "cuda_device", lambda: object()),
            (resolve, "arch_of", lambda device: H200),
            (resolve, "target_for", lambda device, active: target),
            (advise.targets, "origin", lambda tools: ORIGIN),
            (results, "tune_missing", self.tune_missing),
            (results, "tune_chains", self.tune_chains),
        ):
            monkeypatch.setattr(module, name, fake)

    def advise(self, *args: Any, **kwargs: Any) -> Advice:
        with options.options(cache_dir=self._options.cache_dir):
            return jax_bolt.advise(*args, **kwargs)

    def tune_missing(
        self, sites: Sequence[Any], target: Any, active: Any, **_: Any
    ) -> None:
        self.budgets.append(active.budget_s)
        for index, site in enumerate(sites):
            key = db.device_key(H200), site.region.text
            results.failures[key] = "the tuning budget is spent"
            if index >= self.limit:
                continue
            self.tuned.append(site)
            candidate = plan.candidates(site.region, H200)[0][0]
            choice = "xla" if self.xla_is_faster(site.region) else "kernel"
            entry = self._entry(candidate, choice, time_us=7.0, xla_time_us=5.0)
            results.database(active).put(H200, {site.region: entry})

    def tune_chains(
        self, chains: Sequence[Any], target: Any, active: Any, **_: Any
    ) -> None:
        self.budgets.append(active.budget_s)
        self.chains += chains
        for info in chains if self.chain_choice else ():
            candidate = plan.chain_candidates(info.region, H200)[0][0]
            choice = self.chain_choice or ""
            entry = self._entry(candidate, choice, time_us=11.0, apart_time_us=10.0)
            results.database(active).put(H200, {info.region: entry})

    def _entry(self, candidate: Any, choice: str, **times: Any) -> db.Entry:
        is_chain = isinstance(candidate, plan.ChainCandidate)
        return db.Entry(
            choice=choice,
            sources=ORIGIN.chains if is_chain else ORIGIN.sources,
            compiler=ORIGIN.compiler or "",
            form=candidate.form.name,
            template=candidate.template.name,
            config=candidate.config.text,
            digest="0" * 64,
            error=0.0,
            xla_error=0.0,
            **times,
        )


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(tmp_path, monkeypatch)


def test_on_a_gpu_every_time_is_measured(gpu):
    before = dict(results.failures)
    advice = gpu.advise(model, *MODEL, budget_s=9.0)
    assert advice.device == "NVIDIA H200" and advice.is_measured
    whole, left = gpu.budgets  # chains have what regions left of it
    assert whole == 9.0 and left is not None and 0 < left < 9.0
    assert results.failures == before
    assert str(advice).startswith("Measured on NVIDIA H200. Times")
    assert advice.totals()["gelu"] == pytest.approx(3 * 7.0)
    texts = [site.region.text for site in gpu.tuned]
    assert len(texts) == len(set(texts))
    # The model's own come first, as the program has them, with its views.
    own = {site.region.text for site in gpu.tuned[:3]}
    report = jax_bolt.explain(model, *MODEL, arch="sm_90a")
    assert own == {site.region.text for site in report.sites if site.region}
    assert {site.name for site in gpu.tuned[3:]} <= {s.name for s in report.sites}


@pytest.mark.parametrize("choice", ["kernel", "apart", None])
def test_a_chain_is_timed_after_its_regions(gpu, choice):
    gpu.chain_choice = choice
    advice = gpu.advise(model, *MODEL)
    tuned = {site.region.text for site in gpu.tuned}
    assert len(gpu.chains) == 2
    for info in gpu.chains:
        assert {each.region.text for each in info.sites} <= tuned
    one = advice.sites[0].pointwise
    assert one is not None and one.chain is not None and one.chain.estimate_us
    if choice is None:  # nothing says that it was timed
        assert one.chain.measured_us is None and not advice.is_measured
        assert one.chain.text.startswith("~") and "What has a ~" in str(advice)
    else:
        # Also where it does not pay: it is what was asked for.
        assert (one.chain.measured_us, one.chain.runs) == (11.0, choice)
        assert one.chain.text == "11.0" and advice.is_measured


def test_where_xla_is_faster_its_time_counts(gpu):
    gpu.xla_is_faster = lambda region: "logistic" in region.text
    site = gpu.advise(model, *MODEL).sites[0]
    silu, relu = site.activations["silu"], site.activations["relu"]
    assert (silu.measured_us, silu.runs) == (5.0, "xla")
    assert (relu.measured_us, relu.xla_us, relu.runs) == (7.0, 5.0, "kernel")


def test_what_the_budget_did_not_reach_is_estimated(gpu):
    gpu.limit = 4  # the model's own three, and the first of the others
    advice = gpu.advise(model, *MODEL)
    first, *_ = advice.sites
    times = list(first.activations.values())
    assert [time.measured_us for time in times] == [7.0, 7.0, *[None] * 4]
    assert all(time.estimate_us for time in times)
    assert not advice.is_measured
    assert "What has a ~ is an estimate" in str(advice)
    assert first.now.text == "7.0" and times[-1].text.startswith("~")


def test_what_xla_rearranges_is_estimated(gpu):
    def fun(x, w):
        return jax.nn.relu(jax.lax.conv_transpose(x, w, (2, 2), "SAME"))

    args = cases.shape(2, 8, 8, 16), cases.shape(3, 3, 16, 24)
    (site,) = gpu.advise(fun, *args).sites
    assert [tuned.label for tuned in gpu.tuned] == ["conv_transpose3x3+relu"]
    assert site.now.measured_us == 7.0
    for time in site.activations.values():
        assert time.estimate_us
    # The kernel's channels are four times the model's.
    assert site.channels == () and site.pointwise is None and gpu.chains == []


def test_an_architecture_by_name_is_not_measured(gpu):
    advice = gpu.advise(model, *MODEL, arch="sm_80")
    assert gpu.tuned == [] and (advice.arch, advice.device) == ("sm_80", "")
