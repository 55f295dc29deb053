# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import sys
import types
from pathlib import Path

import jax
import pytest

from jax_bolt._src import options, paths
from jax_bolt._src.errors import CacheError, CompileError
from jax_bolt._src.jit import loader, store


class FakeNative(types.ModuleType):
    """Opens every file but those that are empty."""

    def __init__(self) -> None:
        super().__init__("jax_bolt._native")
        self.opened: dict[str, str] = {}
        self.resolver = None

    def is_loaded(self, digest):
        return digest in self.opened

    def load(self, digest, path):
        if not Path(path).read_bytes():
            raise RuntimeError("file too short")
        self.opened[digest] = path

    def set_resolver(self, resolver):
        self.resolver = resolver

    def handlers(self):
        return {"instantiate": "i", "execute": "e"}


@pytest.fixture
def native(monkeypatch):
    fake = FakeNative()
    monkeypatch.setitem(sys.modules, "jax_bolt._native", fake)
    for function in (loader.native, loader.ffi_target):
        function.cache_clear()
    yield fake
    for function in (loader.native, loader.ffi_target):
        function.cache_clear()


def test_load_once(native, tmp_path):
    (tmp_path / "kernel.so").write_bytes(b"kernel")
    loaded = store.stats()["loaded"]
    for _ in range(2):
        loader.load("d", tmp_path / "kernel.so")
    assert native.opened == {"d": str(tmp_path / "kernel.so")}
    assert store.stats()["loaded"] == loaded + 1


def test_a_kernel_that_cannot_be_opened(native, tmp_path):
    (tmp_path / "kernel.so").touch()
    with pytest.raises(CompileError, match="kernel d cannot be loaded: file too"):
        loader.load("d", tmp_path / "kernel.so")


def test_the_target_is_registered_once(native, monkeypatch):
    registered = []
    monkeypatch.setattr(
        jax.ffi, "register_ffi_target", lambda *a, **k: registered.append((a, k))
    )
    assert loader.ffi_target() == loader.ffi_target() == "jax_bolt.launch"
    ((args, kwargs),) = registered
    assert args == ("jax_bolt.launch", native.handlers())
    assert kwargs == {"platform": "CUDA", "api_version": 1}


def test_a_digest_of_another_process_is_found_in_the_store(
    native, monkeypatch, cache_dir
):
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *a, **k: None)
    loader.ffi_target()
    assert native.resolver is not None
    kernel = cache_dir / "kernel.so"
    kernel.parent.mkdir()
    kernel.write_bytes(b"kernel")
    asked = []

    def find(self, digest):
        asked.append((self.root, digest))
        return kernel if digest == "1" * 64 else None

    monkeypatch.setattr(store.Store, "find", find)
    native.resolver("1" * 64)
    assert native.opened == {"1" * 64: str(kernel)}
    assert asked == [(paths.kernel_root(options.current()), "1" * 64)]
    with pytest.raises(CacheError, match=r"2{64} is not in .*kernels.*compile"):
        native.resolver("2" * 64)


def test_a_missing_native_module_is_explained(native, monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_bolt._native", None)
    with pytest.raises(CompileError, match="native module cannot be imported"):
        loader.ffi_target()
