# SPDX-License-Identifier: Apache-2.0
"""What users are told when they, or their machines, get something wrong.

Each message names the value at fault and what to do about it.
"""

from __future__ import annotations

import errno
import functools
import logging
import re
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from fake_nvcc import FakeNvcc

import jax_bolt
from jax_bolt._src import (
    cli,
    compat,
    lower,
    options,
    paths,
    plan,
    program,
    resolve,
    results,
)
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import directories, loader, store
from jax_bolt._src.jit import toolchain as toolchains
from jax_bolt._src.tune import db, search

TARGET = "jax_bolt.launch"


def dense(x: Any, w: Any) -> Any:
    return jax.nn.relu(x @ w)


def two_sites(x: Any, w: Any) -> Any:
    return jnp.tanh(dense(x, w) @ w)


ARGS = (
    jax.ShapeDtypeStruct((16, 64), jnp.bfloat16),
    jax.ShapeDtypeStruct((64, 64), jnp.bfloat16),
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A GPU on paper, whose driver takes whatever was compiled."""
    gpu = types.SimpleNamespace(
        compute_capability="9.0", device_kind="NVIDIA H200", local_hardware_id=0
    )
    native = types.SimpleNamespace(
        device_info=lambda ordinal: {"sm_count": 132},
        is_loaded=lambda digest: False,
        load=lambda digest, path: None,
        check=lambda digest, kind, dims, recipe: None,
        workspace_bytes=lambda *args: 0,
    )
    monkeypatch.setattr(compat, "cuda_device", lambda: gpu)
    monkeypatch.setattr(loader, "native", lambda: native)
    monkeypatch.setattr(loader, "ffi_target", lambda: TARGET)
    # What a process remembers, so as to say and try things once.
    monkeypatch.setattr(lower, "_warned", set())
    monkeypatch.setattr(store, "_failures", {})
    monkeypatch.setattr(results, "failures", {})
    return gpu


@pytest.fixture
def nvcc(cache_dir: Path, tmp_path: Path, monkeypatch: Any) -> Iterator[FakeNvcc]:
    header = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    parts = ("MAJOR", "MINOR", "PATCH")
    header.write_text("".join(f"#define CUTLASS_{part} 4\n" for part in parts))
    monkeypatch.setattr(paths, "cutlass_root", lambda: tmp_path / "cutlass")
    fake = FakeNvcc(tmp_path / "cuda")
    with options.options(cuda_home=fake.home, on_miss="heuristic"):
        yield fake


def lowered(fun: Any) -> str:
    """The StableHLO that a CUDA device would be given."""
    program = jax.jit(fun).trace(*ARGS).lower(lowering_platforms=("cuda",))
    return program.as_text()


def warning_of(fun: Any = dense) -> str:
    """The one warning of a function that runs on XLA in the end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        text = lowered(jax_bolt.optimize(lambda *args: fun(*args)))
    assert TARGET not in text and "stablehlo.dot_general" in text
    (warning,) = caught
    message = str(warning.message)
    # The site, by its source line, and what runs instead.
    assert re.match(r"jax_bolt: .*test_errors.py:\d+.* runs on XLA: ", message)
    return message


def test_what_a_program_runs_on_is_compiled_together(gpu, nvcc, monkeypatch):
    asked: list[int] = []
    build = store.Store.build

    def counted(self: Any, tools: Any, sources: Any, *rest: Any) -> Any:
        asked.append(len(sources))
        return build(self, tools, sources, *rest)

    monkeypatch.setattr(store.Store, "build", counted)
    assert TARGET in lowered(jax_bolt.optimize(two_sites))
    # All with the first site's, after which each is found.
    assert asked == [3, 1] and len(nvcc.calls) == 2


def test_a_fault_of_another_site_is_not_this_ones(gpu, nvcc, monkeypatch):
    foreseen = results.foreseen

    def broken(region: Any, *rest: Any) -> Any:
        if any(op.name == "tanh" for op in region.epilogue.ops):
            raise RuntimeError("a fault")
        return foreseen(region, *rest)

    monkeypatch.setattr(results, "foreseen", broken)
    assert TARGET in lowered(jax_bolt.optimize(lambda x, w: two_sites(x, w)))


# --- The machine


def test_no_compiler(gpu, cache_dir, tmp_path, monkeypatch):
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchains, "_wheels", lambda: [])
    message = warning_of()
    assert "NVIDIA's compiler, nvcc" in message
    assert '`pip install "jax[cuda13]" "nvidia-cuda-cccl<14"`' in message


def test_a_full_cache_needs_no_compiler(gpu, nvcc, monkeypatch, tmp_path):
    """What was tuned and built runs where it is later deployed without nvcc."""
    fun = jax_bolt.optimize(lambda *args: dense(*args))
    assert TARGET in lowered(fun)
    (built,) = store.Store(paths.kernel_root(options.current())).entries()
    target = resolve.target_for(gpu, options.current())
    (site,) = program.trace(dense, (), ARGS, {}, options.current())[0].family.sites
    made = plan.heuristic(site.region, target.arch)
    assert isinstance(made, plan.Plan)
    entry = db.Entry(
        choice="kernel",
        form=made.candidate.form.name,
        template=made.candidate.template.name,
        config=made.candidate.config.text,
        digest=built.path.name,
        sources=target.origin.sources,
        compiler=target.origin.compiler or "",
        time_us=1.0,
        error=1e-3,
        xla_error=1e-3,
    )
    target.results.put(target.arch, {site.region: entry})

    def none(_):
        raise CompileError("no compiler")

    monkeypatch.setattr(toolchains, "find", none)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TARGET in lowered(jax_bolt.optimize(lambda *args: dense(*args)))
    paths.cache_root(options.current()).rename(tmp_path / "away")
    assert "no compiler" in warning_of()
    # And so does what another machine's cache was exported from.
    with options.options(cache_dir=tmp_path / "away"):
        assert cli.main(["cache", "export", str(tmp_path / "cache.zip")]) == 0
    assert cli.main(["cache", "import", str(tmp_path / "cache.zip")]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TARGET in lowered(jax_bolt.optimize(lambda *args: dense(*args)))


def test_a_cuda_home_without_a_compiler(gpu, nvcc):
    nvcc.nvcc.unlink()
    message = warning_of()
    assert f"{nvcc.nvcc} (cuda_home): there is no such file" in message
    assert "JAX_BOLT_CUDA_HOME" in message


def test_no_cutlass(gpu, nvcc, monkeypatch):
    monkeypatch.setattr(paths, "cutlass_root", lambda: None)
    message = warning_of()
    assert "CUTLASS" in message and "reinstall jax_bolt" in message


def test_no_native_module(gpu, nvcc, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(compat, "cuda_device", lambda: gpu)
    monkeypatch.setattr(lower, "_warned", set())
    monkeypatch.setattr(loader.importlib, "import_module", missing_module)
    loader.native.cache_clear()
    try:
        message = warning_of()
    finally:
        loader.native.cache_clear()
    assert "undefined symbol" in message and "pip install --force-reinstall" in message


def missing_module(name: str) -> Any:
    raise ImportError(f"{name}: undefined symbol: it")


def test_an_old_gpu(gpu, nvcc):
    gpu.compute_capability, gpu.device_kind = "6.1", "NVIDIA GeForce GTX 1080"
    message = warning_of()
    assert "no kernels for NVIDIA GeForce GTX 1080" in message
    assert "'6.1'; it has them for 8.0" in message


@pytest.fixture
def own_temporary(monkeypatch: Any, tmp_path: Path) -> Iterator[None]:
    """Undoes what falling back to the temporary cache does to the process."""
    monkeypatch.setattr(directories.tempfile, "tempdir", str(tmp_path))
    cached = (directories.temporary, directories.warn_temporary)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_an_unwritable_cache_costs_no_kernel(
    gpu, nvcc, own_temporary, tmp_path, caplog
):
    # Not even root can make a directory below a file.
    (tmp_path / "file").touch()
    with (
        options.options(cache_dir=tmp_path / "file"),
        caplog.at_level(logging.WARNING, "jax_bolt"),
    ):
        text = lowered(jax_bolt.optimize(lambda *args: two_sites(*args)))
    assert text.count(TARGET) == text.count("kind = 3") == 1
    (record,) = caplog.records
    message = record.getMessage()
    assert f"the cache {tmp_path / 'file' / 'kernels'} cannot be written" in message
    assert "set JAX_BOLT_CACHE_DIR to a writable directory" in message


def test_a_full_disk(gpu, nvcc, own_temporary, monkeypatch, caplog):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(directories.os, "fsync", full)
    message = warning_of(two_sites)
    kernels = paths.kernel_root(options.current())
    assert f"a kernel cannot be stored in {kernels}: No space left" in message
    assert "make room there, or set JAX_BOLT_CACHE_DIR" in message
    assert not caplog.records, "and nothing else is said"
    with (
        options.options(on_error="raise"),
        pytest.raises(jax_bolt.CompileError, match="make room there"),
    ):
        lowered(jax_bolt.optimize(lambda *args: dense(*args)))


def test_a_cache_that_others_can_write(gpu, nvcc, cache_dir):
    (cache_dir / "kernels").mkdir(parents=True)
    (cache_dir / "kernels").chmod(0o777)
    assert f"chmod go-w '{cache_dir / 'kernels'}'" in warning_of()


def test_for_a_cache_that_others_can_write_nothing_is_tuned(
    gpu, nvcc, cache_dir, monkeypatch
):
    """Which would be begun once more for every site."""

    def tune(*_: Any) -> Any:
        raise AssertionError("it was begun")

    (cache_dir / "kernels").mkdir(parents=True)
    (cache_dir / "kernels").chmod(0o777)
    monkeypatch.setattr(search, "tune", tune)
    with options.options(on_miss="tune"):
        assert f"chmod go-w '{cache_dir / 'kernels'}'" in warning_of(two_sites)
    assert not nvcc.calls


# --- A kernel that does not compile


@pytest.fixture
def failing(nvcc: FakeNvcc) -> FakeNvcc:
    script = nvcc.nvcc.read_text()
    nvcc.nvcc.write_text(script.replace("grep -q FAIL source.cu", "true"))
    return nvcc


def test_a_failing_compile_is_one_warning(gpu, failing):
    message = warning_of(two_sites)
    assert "kernel for sm_90a does not compile: nvcc ended with status 2" in message
    assert 'on_error="raise"' in message
    # Pages of log are for those who ask.
    assert "FAIL is not defined" not in message
    assert len(failing.calls) == 2


def test_on_error_raise_shows_what_the_compiler_printed(gpu, failing):
    strict = jax_bolt.optimize(lambda *args: dense(*args), on_error="raise")
    with pytest.raises(jax_bolt.CompileError, match="error: FAIL is not defined"):
        lowered(strict)


def test_on_miss_error_names_the_site_and_the_problem(gpu, nvcc):
    strict = jax_bolt.optimize(lambda *args: dense(*args), on_miss="error")
    message = r"test_errors.py:\d+.*m16n64k64.*NVIDIA H200.*jax_bolt\.tune"
    with pytest.raises(jax_bolt.UnsupportedError, match=message):
        lowered(strict)


def test_tuning_without_a_gpu(monkeypatch):
    monkeypatch.setattr(compat, "cuda_device", lambda: None)
    with pytest.raises(jax_bolt.UnsupportedError, match=r"CUDA device.*pip install"):
        jax_bolt.tune(dense, *ARGS)


# --- The call


def choose(x: Any, how: str = "relu", *, scale: Any = 1) -> Any:
    return getattr(jax.nn, how)(x @ x) * scale


X = jnp.ones((4, 4))
OPTIMIZED = jax_bolt.optimize(choose)


@pytest.mark.parametrize(
    "call",
    [
        lambda: OPTIMIZED(X, "tanh"),
        lambda: OPTIMIZED.lower(X, "tanh"),
        lambda: OPTIMIZED.explain(X, "tanh"),
        lambda: jax_bolt.explain(choose, X, "tanh"),
        lambda: jax_bolt.tune(choose, X, "tanh"),
    ],
)
def test_an_argument_that_is_no_array(call):
    message = "argument 1 is 'tanh' of type str, not an array.* static_argnums=1"
    with pytest.raises(TypeError, match=message):
        call()


def abstract_call(fun, *others):
    return lambda: fun(*others, jax.ShapeDtypeStruct((4, 4), jnp.float32))


@pytest.mark.parametrize(
    "call",
    [
        abstract_call(jax_bolt.optimize(jnp.tanh)),
        abstract_call(jax_bolt.optimize(jnp.matmul), X),
        abstract_call(jax_bolt.freeze(jnp.matmul, X)),
        lambda: jax_bolt.optimize(sum)([jax.ShapeDtypeStruct((), jnp.float32)]),
    ],
)
def test_a_shape_is_no_array_but_will_do_elsewhere(call):
    with pytest.raises(TypeError, match=r"call \.lower, \.explain or") as caught:
        call()
    assert "static" not in str(caught.value)


def test_a_frozen_shape_is_no_array_but_will_do_elsewhere():
    shape = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    fun = jax_bolt.freeze(lambda w, x: (2 * w["a"][0]) @ x, {"a": [shape]})
    message = r"frozen argument 0\['a'\]\[0\] is ShapeDtype.*, or call \.lower"
    with pytest.raises(TypeError, match=message):
        fun(X)
    assert jax.eval_shape(fun, shape).shape == (4, 4)
    assert len(fun.explain(X).sites) == 1 and fun.lower(X)
    # Another mistake is told as it is.
    fun = jax_bolt.freeze(lambda w, x: w @ x + "a", shape)
    with pytest.raises(TypeError, match=r"unsupported operand|'a'"):
        jax.eval_shape(fun, shape)


def branching(w, v, x, flip, *, half=False):
    y = x @ w @ v
    return -y if flip else y / 2 if half else y


@pytest.mark.parametrize("frozen", [(X,), (X, X)])
def test_errors_of_a_frozen_function_name_the_users(frozen):
    fun = jax_bolt.freeze(branching, *frozen)
    rest = (X,) * (3 - len(frozen))
    place = rf"branching at {__file__}:{branching.__code__.co_firstlineno} "
    for call in (fun, fun.lower, fun.explain):
        with pytest.raises(jax.errors.TracerBoolConversionError) as caught:
            call(*rest, True)
        assert re.search(place, str(caught.value))
        assert "the argument flip." in str(caught.value)
    with pytest.raises(jax.errors.TracerBoolConversionError, match="argument half"):
        jax_bolt.freeze(branching, *frozen, static_argnums=len(rest))(
            *rest, flip=False, half=True
        )
    partial = functools.partial(branching, half=True)
    with pytest.raises(jax.errors.TracerBoolConversionError, match=place):
        jax_bolt.freeze(partial, *frozen)(*rest, True)


def test_a_keyword_that_is_no_array():
    message = "argument 'how' is 'tanh' of type str.* static_argnums=1"
    with pytest.raises(TypeError, match=message):
        OPTIMIZED(X, how="tanh")
    message = r"argument 'scale' is 'a' .*functools.partial\(f, scale=\.\.\.\)"
    with pytest.raises(TypeError, match=message):
        OPTIMIZED(X, scale="a")


def test_a_leaf_that_is_no_array():
    fun = jax_bolt.optimize(lambda tree: tree["x"][0] @ tree["x"][0])
    with pytest.raises(TypeError, match=r"argument 0\['x'\]\[1\] is 'name' .* apart"):
        fun({"x": [X, "name"]})
    with pytest.raises(TypeError, match=r"argument 0\['x'\]\[0\] is ShapeDtype"):
        fun({"x": [jax.ShapeDtypeStruct((4, 4), jnp.float32)]})


def test_a_long_argument_is_cut_short():
    with pytest.raises(TypeError) as caught:
        OPTIMIZED("x" * 10000)
    assert len(str(caught.value)) < 300


def test_a_mistake_inside_the_function_is_its_own():
    with pytest.raises(TypeError, match="unsupported operand"):
        jax_bolt.optimize(lambda x: (x @ x) + "a")(X)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        OPTIMIZED()


# --- The decorator


@pytest.mark.parametrize("bad", [3, "dense", None])
def test_what_is_no_function(bad):
    with pytest.raises(TypeError, match=f"takes a function of arrays, got {bad!r}"):
        jax_bolt.explain(bad, X)
    with pytest.raises(TypeError, match=f"takes a function of arrays, got {bad!r}"):
        jax_bolt.optimize(on_miss="xla")(bad)
    if bad is not None:
        with pytest.raises(TypeError, match=f"takes a function of arrays, got {bad!r}"):
            jax_bolt.optimize(bad)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("on_miss", "always", "'tune', 'heuristic', 'xla', 'error'"),
        ("on_miss", True, "'tune', 'heuristic', 'xla', 'error'"),
        ("on_error", "ignore", "'xla', 'raise'"),
    ],
)
def test_a_bad_option_fails_where_it_is_written(option, value, allowed):
    message = f"{option}={value!r} must be one of {allowed}"
    with pytest.raises(ValueError, match=message):
        jax_bolt.optimize(dense, **{option: value})


@pytest.mark.parametrize("argnums", ["static_argnums", "donate_argnums"])
@pytest.mark.parametrize("bad", ["how", 1.0, (0, "how")])
def test_positions_of_arguments_are_numbers(argnums, bad):
    with pytest.raises(TypeError, match=f"{argnums}.* not {re.escape(repr(bad))}"):
        functools.partial(jax_bolt.optimize, **{argnums: bad})(choose)
