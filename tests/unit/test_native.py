# SPDX-License-Identifier: Apache-2.0
"""The native module's registry and launcher, on kernels of host code."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import Build
from fresh_python import run
from jax.experimental import serialize_executable

from jax_bolt import _native

TARGET = "jax_bolt_test.launch"
FUNCTIONS = ("abi_version", "check", "workspace_bytes", "launch", "error_string")
GEMM, CONV = 0, 1


@pytest.fixture(scope="session")
def kernel(build: Build) -> Path:
    path = build("kernel.cc", "kernel.so")
    _native.load("kernel", str(path))
    return path


@pytest.fixture(scope="session")
def target(kernel: Path) -> str:
    jax.ffi.register_ffi_target(TARGET, _native.host_handlers(), platform="cpu")
    return TARGET


@pytest.fixture
def resolver() -> Iterator[Callable[[Callable[[str], object]], None]]:
    yield _native.set_resolver
    _native.set_resolver(None)


def rand(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(len(shape) + sum(shape))
    return rng.standard_normal(shape, dtype=np.float32)


def launch(*operands: Any, results: Any = None, **attributes: Any) -> Any:
    """The custom call on a 4 by 5 times 5 by 3 product unless told otherwise."""
    given: dict[str, Any] = dict(digest="kernel", kind=GEMM, dims=(4, 3, 5, 1), sides=0)
    given |= attributes
    given["kind"] = np.int64(given["kind"])
    given |= {k: np.int64(given[k]) for k in ("sides", "outputs") if k in given}
    given["dims"] = np.array(given["dims"], np.int64)
    if results is None:
        results = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    return jax.jit(lambda *xs: jax.ffi.ffi_call(TARGET, results)(*xs, **given))(
        *operands
    )


# --- Loading


def test_load_is_idempotent(kernel: Path) -> None:
    _native.load("kernel", str(kernel))
    _native.load("kernel", "/nowhere/else.so")  # the first artifact stays
    assert _native.is_loaded("kernel")
    assert not _native.is_loaded("kerne")


def test_load_refuses_what_is_no_module(tmp_path: Path) -> None:
    text = tmp_path / "text.so"
    text.write_text("not a shared object")
    with pytest.raises(RuntimeError, match=r"cannot load kernel module .*text\.so: "):
        _native.load("bad", str(text))
    with pytest.raises(RuntimeError, match="No such file"):
        _native.load("bad", str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match="not absolute"):
        _native.load("bad", "libm.so.6")
    assert not _native.is_loaded("bad")


def test_load_refuses_another_abi(build: Build) -> None:
    path = build("kernel.cc", "abi.so", "-DFAKE_ABI_VERSION=99")
    with pytest.raises(RuntimeError, match=f"version 99, not {_native.ABI_VERSION}"):
        _native.load("abi", str(path))
    assert not _native.is_loaded("abi")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_load_refuses_a_missing_symbol(build: Build, function: str) -> None:
    flags = [f"-DFAKE_WITHOUT_{function.upper()}"]
    if function == "workspace_bytes":  # launch calls it
        flags.append("-DFAKE_WITHOUT_LAUNCH")
    path = build("kernel.cc", f"without_{function}.so", *flags)
    with pytest.raises(RuntimeError, match=f"does not export jax_bolt_{function}"):
        _native.load(function, str(path))
    assert not _native.is_loaded(function)


def test_concurrent_loads(build: Build) -> None:
    paths = {f"c{i}": str(build("kernel.cc", f"c{i}.so")) for i in range(3)}

    def load(i: int) -> bool:
        digest = f"c{i % 3}"
        _native.load(digest, paths[digest])
        return _native.is_loaded(digest) and _native.check(digest, 0, [1] * 4) is None

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(load, range(64)))


# --- Queries


def test_check(kernel: Path) -> None:
    assert _native.check("kernel", GEMM, [4, 3, 5, 1]) is None
    assert _native.check("kernel", CONV, [1] * 15) == "not a gemm"
    with pytest.raises(ValueError, match="unknown problem kind"):
        _native.check("kernel", 7, [1] * 4)
    with pytest.raises(ValueError, match="wrong number of dims"):
        _native.check("kernel", GEMM, [1] * 5)
    with pytest.raises(RuntimeError, match="kernel absent is not loaded"):
        _native.check("absent", GEMM, [1] * 4)
    with pytest.raises(RuntimeError, match="kernel absent is not loaded"):
        _native.launches("absent")


def test_workspace_bytes(kernel: Path) -> None:
    query = _native.workspace_bytes
    assert query("kernel", GEMM, [4, 3, 5, 1], sm_count=132) == 0
    assert query("kernel", GEMM, [4, 3, 5, 2], sm_count=132) == 64 * 132


# --- The custom call


def test_handlers_register_for_cuda() -> None:
    handlers = _native.handlers()
    assert set(handlers) == {"instantiate", "execute"}
    jax.ffi.register_ffi_target("jax_bolt_test.cuda", handlers, platform="CUDA")


def test_execute(target: str) -> None:
    a, b, vector = rand(4, 5), rand(5, 3), rand(3)
    sides = rand(4, 3), rand(3, 4).reshape(4, 3)
    before = _native.launches("kernel")
    plain = launch(a, b)
    np.testing.assert_allclose(plain, a @ b, rtol=1e-5, atol=1e-6)
    full = launch(a, b, *sides, vector, vector, sides=2)
    want = a @ b + sides[0] + sides[1] + 2 * vector
    np.testing.assert_allclose(full, want, rtol=1e-5, atol=1e-6)
    assert _native.launches("kernel") == before + 2


def test_execute_with_workspace(target: str) -> None:
    d = jax.ShapeDtypeStruct((4, 3), jnp.float32)
    workspace = jax.ShapeDtypeStruct((64,), jnp.uint8)
    dims = (4, 3, 5, 2)
    _, bytes_ = launch(rand(4, 5), rand(5, 3), results=(d, workspace), dims=dims)
    np.testing.assert_array_equal(bytes_, np.full(64, 7))
    small = jax.ShapeDtypeStruct((63,), jnp.uint8)
    for results in ((d, small), (d,)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="needs 64 bytes"):
            jax.block_until_ready(
                launch(rand(4, 5), rand(5, 3), results=results, dims=dims)
            )


def test_auxiliary_outputs_come_before_the_workspace(target: str) -> None:
    a, b, side = rand(4, 5), rand(5, 3), rand(3, 4).reshape(4, 3)
    space = jax.ShapeDtypeStruct((64,), jnp.uint8)
    results = (D, D, space)
    given: dict[str, Any] = dict(sides=1, outputs=2, dims=(4, 3, 5, 2))
    full, bare, bytes_ = launch(a, b, side, results=results, **given)
    np.testing.assert_allclose(bare, a @ b, rtol=1e-5)
    np.testing.assert_allclose(full, a @ b + side, rtol=1e-5)
    np.testing.assert_array_equal(bytes_, np.full(64, 7))


def too_many(count: int) -> list[np.ndarray]:
    return [rand(3)] * count


D = jax.ShapeDtypeStruct((4, 3), jnp.float32)


@pytest.mark.parametrize(
    ("operands", "changes", "message"),
    [
        ([], dict(dims=(1, 2, 3)), "wrong number of dims"),
        ([], dict(kind=7), "unknown problem kind"),
        ([], dict(sides=4), "too many side inputs"),
        ([], dict(sides=-1), "too many side inputs"),
        ([], dict(kind=CONV, dims=(1,) * 15), "not a gemm"),
        ([], dict(sides=1), "operands are missing"),
        (too_many(13), {}, "too many per-channel inputs"),
        ([], dict(results=(D, D, D)), "expected one result"),
        ([], dict(outputs=2), "expected one result"),
        ([], dict(outputs=2, results=(D,) * 4), "expected one result"),
        ([], dict(outputs=3), "too many outputs"),
        ([], dict(outputs=0), "too many outputs"),
        ([], dict(dims=(4, 3, 13, 1)), r"a fake failure \(status -3\)"),
    ],
)
def test_execute_refuses(
    target: str, operands: list[np.ndarray], changes: dict[str, Any], message: str
) -> None:
    before = _native.launches("kernel")
    message = rf"kernel kernel at net/Dense_0: .*{message}"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        a, b = rand(4, 5), rand(5, 3)
        jax.block_until_ready(launch(a, b, *operands, site="net/Dense_0", **changes))
    assert _native.launches("kernel") == before


def test_execute_needs_its_attributes(target: str) -> None:
    call = jax.ffi.ffi_call(TARGET, D)
    with pytest.raises(jax.errors.JaxRuntimeError, match="digest"):
        jax.block_until_ready(jax.jit(call)(rand(4, 5), rand(5, 3)))


def test_concurrent_launches(target: str) -> None:
    a, b = rand(4, 5), rand(5, 3)
    before = _native.launches("kernel")
    given = dict(digest="kernel", kind=np.int64(0), sides=np.int64(0))
    dims = np.array((4, 3, 5, 1), np.int64)
    f = jax.jit(lambda *xs: jax.ffi.ffi_call(TARGET, D)(*xs, dims=dims, **given))
    f(a, b)
    with ThreadPoolExecutor(8) as pool:
        outs = list(pool.map(lambda i: np.asarray(f(a * i, b)), range(64)))
    for i, out in enumerate(outs):
        np.testing.assert_allclose(out, (a * i) @ b, rtol=1e-4, atol=1e-4)
    assert _native.launches("kernel") == before + 65


# --- The resolver


def test_resolver_loads(target: str, kernel: Path, resolver: Any) -> None:
    asked = []

    def resolve(digest: str) -> None:
        asked.append(digest)
        _native.load(digest, str(kernel))

    resolver(resolve)
    a, b = rand(4, 5), rand(5, 3)
    np.testing.assert_allclose(launch(a, b, digest="found"), a @ b, rtol=1e-5)
    launch(a + 1, b, digest="found", site="again")
    assert asked == ["found"]


def test_resolver_fails(target: str, resolver: Any) -> None:
    def resolve(digest: str) -> None:
        raise LookupError(f"no {digest} in the store")

    resolver(resolve)
    a, b = rand(4, 5), rand(5, 3)
    message = "NOT_FOUND.*kernel lost at here: LookupError: no lost in the store(\n|$)"
    with pytest.raises(jax.errors.JaxRuntimeError, match=message) as caught:
        launch(a, b, digest="lost", site="here")
    assert "At:" not in str(caught.value)  # no Python stack inside XLA's message
    resolver(lambda digest: None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="neither loaded nor in"):
        launch(a, b, digest="lost", site="silent")
    resolver(None)
    with pytest.raises(jax.errors.JaxRuntimeError, match="nothing is set to find it"):
        launch(a, b, digest="lost", site="unset")


RELOAD = """
import pickle, sys
import jax, numpy as np
from jax.experimental import serialize_executable
from jax_bolt import _native
module, target, path = sys.argv[1:]
jax.ffi.register_ffi_target(target, _native.host_handlers(), platform="cpu")
asked = []
_native.set_resolver(lambda d: (asked.append(d), _native.load(d, module)))
with open(path, "rb") as f:
    compiled = serialize_executable.deserialize_and_load(*pickle.load(f))
a, b = np.ones((4, 5), np.float32), np.ones((5, 3), np.float32)
np.testing.assert_array_equal(compiled(a, b), a @ b)
assert asked == ["kernel"], asked
"""


def test_resolver_serves_a_loaded_executable(
    target: str, kernel: Path, tmp_path: Path
) -> None:
    given = dict(digest="kernel", kind=np.int64(0), sides=np.int64(0))
    dims = np.array((4, 3, 5, 1), np.int64)
    f = jax.jit(lambda *xs: jax.ffi.ffi_call(TARGET, D)(*xs, dims=dims, **given))
    compiled = f.lower(rand(4, 5), rand(5, 3)).compile()
    saved = tmp_path / "executable"
    saved.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
    run(RELOAD, kernel, TARGET, saved)
