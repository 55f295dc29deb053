# SPDX-License-Identifier: Apache-2.0
"""The CUDA lowering, without a GPU: what is emitted, and what falls back and why."""

import re
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax import export

import jax_bolt
from jax_bolt._src import arch, compat, invoke, ir, lower, plan, resolve
from jax_bolt._src.errors import CompileError, UnsupportedError

TARGET = "jax_bolt.launch"


def dense(x, w, b):
    return jax.nn.relu(x @ w + b[None])


def conv(x, w, b):
    y = jax.lax.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + b.reshape(1, 1, 1, -1)


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def sharded(aval, *spec):
    sharding = jax.sharding.NamedSharding(MESH, jax.sharding.PartitionSpec(*spec))
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding)


DENSE = shape(4, 16), shape(16, 8), shape(8)
MESH = jax.sharding.AbstractMesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))


def cuda_text(fun, *args):
    """The StableHLO that a CUDA device would be given for ``optimize(fun)``."""
    allowed = [export.DisabledSafetyCheck.custom_call(TARGET)]
    # A function of its own: JAX remembers the lowering of one it has seen.
    fresh = jax.jit(jax_bolt.optimize(lambda *a: fun(*a)))
    exported = export.export(fresh, platforms=["cuda"], disabled_checks=allowed)(*args)
    return exported.mlir_module()


def lowered(fun, *args):
    return jax.jit(fun).trace(*args).lower(lowering_platforms=("cuda",))


@pytest.fixture
def fresh_warnings(monkeypatch):
    monkeypatch.setattr(lower, "_warned", set())


@pytest.fixture
def kernel(monkeypatch):
    """A device, and a kernel for every site, that only exist on paper."""

    def found(site, *_):
        made = plan.heuristic(site.region, arch.from_name("sm_90a"))
        assert isinstance(made, plan.Plan)
        form = made.candidate.form
        return made, invoke.Executable("d" * 64, site.region.problem, form, 128)

    monkeypatch.setattr(compat, "cuda_device", lambda: object())
    monkeypatch.setattr(resolve, "resolve", found)
    refused = plan.Rejection("it was not timed")
    monkeypatch.setattr(resolve, "resolve_chain", lambda *_: refused)


def test_one_custom_call_for_a_region(kernel):
    text = cuda_text(dense, *DENSE)
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    assert "dims = dense<[4, 8, 16, 1]> : tensor<4xi64>" in call
    assert f'digest = "{"d" * 64}"' in call
    assert "kind = 0" in call and "sides = 0" in call
    # Result, then the workspace, both XLA's buffers.
    assert "(tensor<4x8xbf16>, tensor<128xui8>)" in call
    assert "stablehlo.dot" not in text and "maximum" not in text


def test_filters_are_packed_once_before_the_call(kernel):
    # Rows of 20 channels are no multiple of 16 bytes, and too many for a prologue.
    text = cuda_text(conv, shape(2, 9, 7, 20), shape(3, 3, 20, 16), shape(16))
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    assert "tensor<16x3x3x24xbf16>" in call
    assert "dense<[2, 9, 7, 24, 16, 3, 3, 5, 4, 2, 2, 1, 1, 1, 1]>" in call
    assert text.count("stablehlo.transpose") == 1
    assert "stablehlo.convolution" not in text


def test_filters_are_read_as_they_lie_where_a_kernel_can(kernel):
    text = cuda_text(conv, shape(2, 9, 7, 8), shape(3, 3, 8, 16), shape(16))
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    assert "tensor<3x3x8x16xbf16>" in call
    assert "stablehlo.transpose" not in text


def test_the_text_is_the_same_every_time(kernel):
    texts = set()
    for _ in range(2):
        texts.add(lowered(jax_bolt.optimize(lambda *a: dense(*a)), *DENSE).as_text())
    assert len(texts) == 1 and TARGET in texts.pop()


def test_launches_carry_the_name_of_their_site(kernel):
    def model(x, w, b):
        with jax.named_scope("Block_3"):
            return dense(x, w, b)

    text = lowered(jax_bolt.optimize(model), *DENSE).as_text(debug_info=True)
    assert re.search(r"Block_3/.*dot\+bias\+relu", text)


def test_no_device_means_xla(fresh_warnings, monkeypatch):
    monkeypatch.setattr(compat, "cuda_device", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = cuda_text(dense, *DENSE)
    assert TARGET not in text and "stablehlo.dot_general" in text


def test_partitioned_programs_fall_back(kernel):
    args = [sharded(a, "i") for a in DENSE]
    text = lowered(jax_bolt.optimize(dense), *args).as_text()
    assert TARGET not in text and "stablehlo.dot_general" in text


def test_a_shard_map_body_is_one_device_and_keeps_its_kernel(kernel):
    spec = jax.sharding.PartitionSpec
    fun = jax.shard_map(
        jax_bolt.optimize(dense),
        mesh=MESH,
        in_specs=(spec("i"), spec(), spec()),
        out_specs=spec("i"),
    )
    args = [sharded(a) for a in DENSE]
    text = lowered(fun, *args).as_text()
    (call,) = re.findall(r"stablehlo.custom_call @jax_bolt.launch.*", text)
    assert "dense<[2, 8, 16, 1]>" in call


def failing(error):
    def resolve_(*_):
        raise error

    return resolve_


@pytest.mark.parametrize(
    "error",
    [
        CompileError("no nvcc was found: pip install ...", log="line\n" * 50),
        UnsupportedError("compute capability '6.1' has no kernels"),
        RuntimeError("anything of the driver's"),
        ValueError("anything at all"),
    ],
)
def test_a_failure_is_one_warning_and_xla(kernel, fresh_warnings, monkeypatch, error):
    monkeypatch.setattr(resolve, "resolve", failing(error))

    def twice(x, w, b):
        return dense(dense(x, w, b), w.T, b[:1].repeat(16))

    with pytest.warns(UserWarning) as caught:
        text = cuda_text(twice, *DENSE)
    (warning,) = caught
    first_line = str(error).splitlines()[0]
    assert first_line in str(warning.message)
    assert "line\nline" not in str(warning.message)
    assert TARGET not in text


def test_on_error_raise_raises_with_the_log(kernel, monkeypatch):
    error = CompileError("nvcc failed", log="kernel.cu(3): error: no")
    monkeypatch.setattr(resolve, "resolve", failing(error))
    strict = jax_bolt.optimize(dense, on_error="raise")
    with pytest.raises(CompileError, match=r"kernel.cu\(3\): error: no"):
        lowered(strict, *DENSE)


def test_abi_problem_of_a_conv():
    problem = ir.ConvProblem(
        n=1, h=8, w=6, c=8, k=4, r=3, s=2, padding=(1, 0, 2, 3), dtype="f16"
    )
    kind, dims = invoke.abi_problem(problem)
    assert kind == invoke.CONV_FPROP
    assert dims == [1, 8, 6, 8, 4, 3, 2, 7, 10, 1, 1, 1, 2, 1, 1]
