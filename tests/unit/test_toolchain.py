# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import types

import pytest
from fake_nvcc import FakeNvcc, toolchain

from jax_bolt._src import arch, paths
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import toolchain as toolchains
from jax_bolt._src.options import Options


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch, tmp_path):
    """No toolkit anywhere, and CUTLASS's headers in a directory of the test."""
    for variable in ("CUDA_HOME", "CUDA_PATH", "NVCC_CCBIN", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setattr(toolchains, "_wheels", lambda: [])
    header = tmp_path / "cutlass" / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        "#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 1\n"
    )
    monkeypatch.setattr(paths, "cutlass_root", lambda: tmp_path / "cutlass")
    toolchains._find.cache_clear()
    yield
    toolchains._find.cache_clear()


def test_the_option_comes_first(tmp_path, monkeypatch):
    mine, other = FakeNvcc(tmp_path / "mine"), FakeNvcc(tmp_path / "other")
    monkeypatch.setenv("CUDA_HOME", str(other.home))
    found = toolchains.find(Options(cuda_home=mine.home))
    assert found.nvcc == mine.nvcc
    assert (found.version, found.origin) == ("13.0.88", "cuda_home")
    assert found.cutlass_version == "4.2.1"
    assert found.abi_version.isdigit()


def test_the_environment_then_wheels_then_path(tmp_path, monkeypatch):
    named = {n: FakeNvcc(tmp_path / n) for n in ("home", "path2", "wheel", "onpath")}
    places = {"include": ["cuda_runtime.h", "crt/host_config.h", "cuda/std/utility"]}
    places |= {"lib": ["libcudart_static.a"], "nvvm/bin": ["cicc"]}
    for place, files in places.items():
        for name in files:
            file = named["wheel"].home / place / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    monkeypatch.setenv("PATH", str(named["onpath"].nvcc.parent))
    assert toolchains.find(Options()).origin == "$PATH"
    monkeypatch.setattr(toolchains, "_wheels", lambda: [named["wheel"].nvcc])
    toolchains._find.cache_clear()
    wheel = toolchains.find(Options())
    assert wheel.origin == toolchains.PYPI
    assert wheel.cuda_includes == (named["wheel"].home / "include",)
    monkeypatch.setenv("CUDA_PATH", str(named["path2"].home))
    assert toolchains.find(Options()).origin == "$CUDA_PATH"
    monkeypatch.setenv("CUDA_HOME", str(named["home"].home))
    assert toolchains.find(Options()).origin == "$CUDA_HOME"


def test_wheels_with_a_part_missing_are_passed_over_and_the_part_named(
    tmp_path, monkeypatch
):
    wheel = FakeNvcc(tmp_path / "wheel")
    monkeypatch.setattr(toolchains, "_wheels", lambda: [wheel.nvcc])
    with pytest.raises(CompileError, match=r"without cuda_runtime.h .*nvidia-cuda-run"):
        toolchains.find(Options())


def test_wheels_are_found_newest_first(tmp_path, monkeypatch):
    monkeypatch.undo()
    for cuda in ("cu9", "cu13", "cu14"):
        FakeNvcc(tmp_path / "nvidia" / cuda)
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(toolchains.importlib.util, "find_spec", lambda name: spec)
    assert [p.parts[-3] for p in toolchains._wheels()] == ["cu14", "cu13", "cu9"]
    monkeypatch.setattr(toolchains.importlib.util, "find_spec", lambda name: None)
    assert toolchains._wheels() == []


def test_nothing_found_names_the_command():
    with pytest.raises(CompileError, match=r'pip install "jax\[cuda13\]" "nvidia'):
        toolchains.find(Options())


def test_a_wrong_cuda_home_does_not_fall_back(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(FakeNvcc(tmp_path / "home").home))
    with pytest.raises(CompileError, match=r"JAX_BOLT_CUDA_HOME.*no such file"):
        toolchains.find(Options(cuda_home=tmp_path / "nowhere"))


def test_an_old_nvcc_is_refused_with_its_version(tmp_path):
    old = FakeNvcc(tmp_path / "old", "12.3.107")
    with pytest.raises(CompileError, match=r"12\.3\.107 is too old, 12\.4 is needed"):
        toolchains.find(Options(cuda_home=old.home))
    assert toolchains.find(
        Options(cuda_home=FakeNvcc(tmp_path / "new", "12.4.99").home)
    ).version == ("12.4.99")


def test_an_nvcc_that_does_not_answer_is_refused(tmp_path):
    fake = FakeNvcc(tmp_path / "broken")
    fake.nvcc.write_text("#!/bin/sh\necho something else\n")
    with pytest.raises(CompileError, match="something else"):
        toolchains.find(Options(cuda_home=fake.home))
    fake = FakeNvcc(tmp_path / "locked")
    fake.nvcc.write_text("not a program")
    with pytest.raises(CompileError, match="locked"):
        toolchains.find(Options(cuda_home=fake.home))


def test_missing_headers_are_named(tmp_path, monkeypatch):
    chosen = Options(cuda_home=FakeNvcc(tmp_path / "home").home)
    monkeypatch.setattr(paths, "cutlass_root", lambda: None)
    with pytest.raises(CompileError, match=r"CUTLASS.*reinstall jax_bolt"):
        toolchains.find(chosen)
    monkeypatch.setattr(paths, "own_include", lambda: None)
    with pytest.raises(CompileError, match="own headers"):
        toolchains.find(chosen)


def test_a_new_architecture_needs_a_new_nvcc(tmp_path):
    old = toolchain(tmp_path / "bin" / "nvcc", "12.4.99")
    toolchains.check_arch(old, arch.from_name("sm_90a"))
    with pytest.raises(CompileError, match=r"12\.4\.99; sm_100a needs 12\.8"):
        toolchains.check_arch(old, arch.from_name("sm_100a"))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "x.hpp").write_text("int x = 2;"),
        lambda root: (root / "y.h").write_text("int y = 2;"),
        lambda root: (root / "y.h").unlink(),
    ],
)
def test_what_kernels_are_made_from_sees_every_change(tmp_path, monkeypatch, change):
    def sources() -> str:
        toolchains._included_digest.cache_clear()
        return toolchains.sources(("jax_bolt/x.hpp",))

    root, cutlass = tmp_path / "jax_bolt", toolchains._headers()[1]
    monkeypatch.setattr(toolchains, "_headers", lambda: (tmp_path, cutlass))
    root.mkdir()
    (root / "x.hpp").write_text('#include "jax_bolt/y.h"\n')
    (root / "y.h").write_text("int y = 1;")
    (root / "z.h").write_text("int z = 1;")
    before = sources()
    (root / "z.h").write_text("int z = 2;")  # of another family
    assert sources() == before
    change(root)
    assert sources() != before


def test_host_compiler_order(tmp_path, monkeypatch):
    fake = FakeNvcc(tmp_path / "home")
    assert toolchains.find(Options(cuda_home=fake.home)).host_compiler is None
    bin_dir = tmp_path / "path"
    bin_dir.mkdir()
    for name in ("clang++", "g++", "g++-12"):
        (bin_dir / name).touch(mode=0o755)
        toolchains._find.cache_clear()
        found = toolchains.find(Options(cuda_home=fake.home)).host_compiler
        assert found == bin_dir / ("clang++" if name == "clang++" else "g++")
    monkeypatch.setenv("CXX", "g++-12")
    found = toolchains.find(Options(cuda_home=fake.home)).host_compiler
    assert found == bin_dir / "g++-12"
