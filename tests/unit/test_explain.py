# SPDX-License-Identifier: Apache-2.0
"""What models become, and what ``explain`` says of them, without a GPU."""

import collections
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jax_bolt
from benchmarks.models import models
from jax_bolt._src import options, rewrite

GOLDEN = Path(__file__).parent / "golden" / "conv_norm_relu.txt"
EPILOGUE = (
    "(f32[n],f32[n],f32[n],f32[n])(){%0=acc();%1=vector[0]();%2=sub(%0,%1);"
    "%3=vector[1]();%4=const[0x1.4f8b580000000p-17]();%5=add(%3,%4);%6=rsqrt(%5);"
    "%7=vector[2]();%8=mul(%6,%7);%9=mul(%2,%8);%10=vector[3]();%11=add(%9,%10);"
    "%12=const[0x0.0p+0]();%13=max(%11,%12);bf16:%13}"
)


@pytest.fixture(autouse=True)
def flax_promotes_on_purpose():
    """conftest's strictness is for our own code."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def conv_norm_relu():
    """A Flax conv, inference BatchNorm and relu, with shapes for their variables."""
    nn = pytest.importorskip("flax.linen")

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3), use_bias=False, dtype=jnp.bfloat16)(x)
            x = nn.BatchNorm(use_running_average=True, dtype=jnp.bfloat16)(x)
            return nn.relu(x)

    x = jax.ShapeDtypeStruct((2, 6, 6, 4), jnp.bfloat16)
    variables = jax.eval_shape(Block().init, jax.random.key(0), x)
    return Block().apply, variables, x


def test_sites_of_one_name_are_numbered():
    inner = jax_bolt.optimize(lambda x, w: x @ w)

    def model(x, w):
        def step(x, _):
            return product(x, w), None

        def product(x, w):
            return x @ w

        for _ in range(2):
            x = jax.nn.relu(product(x, w))
        refused = x.astype(jnp.complex64)
        for _ in range(2):
            refused = product(refused, w.astype(jnp.complex64))
        x = jax.lax.scan(step, inner(inner(x, w), w), None, length=2)[0]
        with jax.named_scope("Head"):
            return x @ w, refused

    square = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
    report = jax_bolt.explain(model, square, square)
    names = [site.name for site in report.sites]
    assert len(names) == len(set(names)) == 8
    ends = ["product)", "#2", "#3", "#4", "Head", "<lambda>)", "#2", "#5"]
    assert all(name.endswith(end) for name, end in zip(names, ends, strict=True))
    # Names are for people: what is computed there does not depend on them.
    assert len({site.region for site in report.sites if site.region is not None}) == 2


def test_golden_conv_norm_relu():
    fun, *args = conv_norm_relu()
    done = rewrite.rewrite(jax.make_jaxpr(fun)(*args), options.Options())
    lines = str(done.program).splitlines()
    text = "\n".join(line for line in lines if not line.startswith("      options="))
    assert text == GOLDEN.read_text().rstrip("\n")
    (site,) = done.family.sites
    assert site.region.epilogue.text == EPILOGUE
    assert (site.name, site.label) == ("Block/Conv_0", "conv3x3+bn+relu")
    # The user's own call is in the reference: its derivative rule survives.
    assert "custom_jvp_call" in str(site.reference)


# What a whole model may keep outside its regions: casts of parameters and of the
# input, pooling, and the mean before the classifier.
_OUTSIDE = {
    "bolt_call",
    "bolt_cast",
    "bolt_pool",
    "bolt_sequence",
    "convert_element_type",
    "reduce_window_max",
    "reduce_sum",
    "div",
    "reshape",
}


@pytest.mark.parametrize("name", models.MEASURED)
def test_every_root_of_the_benchmark_models_is_fused(name):
    fun, *args = models.shapes(name)
    done = rewrite.rewrite(jax.make_jaxpr(fun)(*args), options.Options())
    assert not done.refusals
    assert len(done.family.sites) == models.MODELS[name].roots
    count = collections.Counter(e.primitive.name for e in done.program.jaxpr.eqns)
    assert set(count) <= _OUTSIDE, count
    assert count["bolt_cast"] == 1
    # Only the mean divides.
    assert count["div"] <= 1 and count["reduce_sum"] <= 1


def test_resnet50_on_sm_90a():
    report = jax_bolt.explain(*models.shapes("resnet50"), arch="sm_90a")
    assert len(report.sites) == 54 and report.coverage == 1.0
    assert report.arch == "sm_90a"
    for site in report.sites:
        assert site.kernel.startswith("implicit_gemm_sm90"), site
        assert site.provenance == "heuristic"
        assert " µs: " in site.estimate and "device memory" in site.estimate
    assert [s.epilogue for s in report.sites[:3]] == [
        "conv7x7+bn+relu+max3x3/2",
        "conv1x1+bn+relu",
        "conv3x3+bn+relu",
    ]


def test_a_report_as_text_and_json():
    fun, *args = conv_norm_relu()

    def model(variables, x):
        y = fun(variables, x)
        return y, jnp.dot(y.astype(jnp.int8)[0, 0], jnp.zeros((8, 8), jnp.int8))

    report = jax_bolt.explain(model, *args, arch="sm_80")
    assert report.coverage == 0.5
    text = str(report)
    assert "1 of 2 roots fused, 1 on kernels, planned for sm_80" in text
    assert "conv3x3+bn+relu" in text and "dtype int8" in text
    assert "[bf16 n2h6w6c4" in text
    parsed = json.loads(report.to_json())
    assert parsed["coverage"] == 0.5
    refused = [site for site in parsed["sites"] if not site["fused"]]
    assert "dtype int8" in refused[0]["reason"]
    assert refused[0]["root"] == "dot_general"


def test_explain_without_a_gpu_and_without_an_architecture():
    fun, *args = conv_norm_relu()
    report = jax_bolt.explain(fun, *args)
    if not report.arch:
        assert "no GPU to plan for" in str(report)
    assert report.coverage == 1.0


def test_an_unknown_architecture_is_named():
    fun, *args = conv_norm_relu()
    with pytest.raises(jax_bolt.UnsupportedError, match="sm_12"):
        jax_bolt.explain(fun, *args, arch="sm_12")


def test_optimized_functions_that_it_calls():
    inner = jax_bolt.optimize(lambda x: jax.nn.relu(x @ x) @ x)
    x = jnp.ones((16, 16), jnp.bfloat16)

    def labels(fun):
        report = jax_bolt.explain(fun, x, arch="sm_90a")
        return [site.epilogue for site in report.sites]

    assert labels(inner) == ["dot+relu", "dot"]
    assert labels(lambda x: inner(x)) == ["dot+relu", "dot"]
    assert labels(jax.jit(inner)) == ["dot+relu", "dot"]
    assert sorted(labels(lambda x: inner(x) @ x)) == ["dot", "dot", "dot+relu"]
    step = lambda x: jax.lax.scan(lambda c, _: (inner(c), None), x, None, 2)[0]  # noqa: E731
    assert labels(step) == ["dot+relu", "dot"]


def test_a_function_without_roots():
    report = jax_bolt.explain(jnp.tanh, jnp.ones(3))
    assert not report.sites and report.coverage == 1.0
    x = jnp.ones((4, 4))
    hidden = jax_bolt.explain(lambda x: jax.pure_callback(lambda x: x @ x, x, x), x)
    assert "jax.pure_callback" in str(hidden)
    assert "docs/troubleshooting.md" in " ".join(str(hidden).split())


@pytest.mark.parametrize("kind", ["max", "mean"])
def test_what_xla_computes_of_a_region_is_said(kind):
    def model(x, w):
        y = jax.lax.conv_general_dilated(
            *(x, w, (1, 1), "SAME"), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        if kind == "mean":
            return jnp.mean(y, (1, 2))
        window = ((1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jax.lax.reduce_window(y, -jnp.inf, jax.lax.max, *window)

    args = [
        jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((2, 8, 8, 64), (3, 3, 64, 64))
    ]
    report = jax_bolt.explain(model, *args, arch="sm_80")
    (site,) = report.sites
    assert "+xla" in site.kernel
    says = {"mean": "XLA computes the mean", "max": "XLA computes the pooling"}[kind]
    assert says in site.what_runs and says in site.what_runs_in_short
    console = Console(width=400)
    with console.capture() as captured:
        console.print(report)
    assert says in captured.get() and f"<small>{says}<" in report._page()
    assert json.loads(report.to_json())["sites"][0]["left_to_xla"] in says
    # The kernels of sm_90a end in these themselves.
    assert not jax_bolt.explain(model, *args, arch="sm_90a").sites[0].left_to_xla


def test_dump_dir_gets_the_program_before_and_after(tmp_path):
    fun, *args = conv_norm_relu()
    with jax_bolt.options(dump_dir=tmp_path / "dump"):
        jax_bolt.explain(fun, *args)
    (folder,) = (tmp_path / "dump").iterdir()
    assert "bolt_call" not in (folder / "0-traced.txt").read_text()
    assert "bolt_call" in (folder / "1-rewritten.txt").read_text()
    assert EPILOGUE in (folder / "2-regions.txt").read_text()


def test_a_dump_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    fun, *args = conv_norm_relu()
    with jax_bolt.options(dump_dir=tmp_path / "file"):
        with pytest.warns(UserWarning, match="nothing is dumped"):
            assert jax_bolt.explain(fun, *args).coverage == 1.0
