# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from jax_bolt._src import paths
from jax_bolt._src.options import Options


def write(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("")


def test_the_cache_is_the_users_unless_the_option_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert paths.cache_root(Options()) == tmp_path / "jax_bolt"
    chosen = Options(cache_dir=tmp_path / "mine")
    assert paths.kernel_root(chosen) == tmp_path / "mine" / "kernels"
    assert paths.tuning_root(chosen) == tmp_path / "mine" / "tuned"
    assert list(tmp_path.iterdir()) == [], "looking must not create anything"


def test_own_headers_are_found_here():
    found = paths.own_include()
    assert found is not None
    assert (found / "jax_bolt" / "abi.h").is_file()


def test_own_headers_of_a_wheel_come_before_a_checkouts(tmp_path):
    package = tmp_path / "jax_bolt"
    assert paths.own_include(package) is None
    write(tmp_path / "cc" / "include" / "jax_bolt" / "abi.h")
    assert paths.own_include(package) == tmp_path / "cc" / "include"
    write(package / "_include" / "jax_bolt" / "abi.h")
    assert paths.own_include(package) == package / "_include"


def test_cutlass_of_the_wheel_comes_before_an_installed_one(tmp_path, monkeypatch):
    package = tmp_path / "jax_bolt"
    installed = tmp_path / "site" / "cutlass_library"
    write(installed / "__init__.py")
    (installed / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert paths.cutlass_root(package) is None
    write(installed / "source" / "include" / "cutlass" / "version.h")
    assert paths.cutlass_root(package) == installed / "source"
    write(package / "_cutlass" / "include" / "cutlass" / "version.h")
    assert paths.cutlass_root(package) == package / "_cutlass"


def test_no_cutlass_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert paths.cutlass_root(tmp_path / "jax_bolt") is None


@pytest.mark.parametrize("root", [paths.kernel_root, paths.tuning_root])
def test_a_root_is_absolute(root, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert root(Options(cache_dir="cache")).is_relative_to(tmp_path)  # pyright: ignore
