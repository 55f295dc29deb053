# SPDX-License-Identifier: Apache-2.0
"""What several unit tests build."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_nvcc import FakeNvcc
from fakes import Build, builder

from jax_bolt._src.jit import store


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return builder(tmp_path_factory.mktemp("fakes"))


@pytest.fixture
def fake(tmp_path: Path) -> FakeNvcc:
    return FakeNvcc(tmp_path / "cuda")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> store.Store:
    """An empty store, in a process in which nothing has failed yet."""
    monkeypatch.setattr(store, "_failures", {})
    return store.Store(tmp_path / "cache" / "kernels")
