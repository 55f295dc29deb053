# SPDX-License-Identifier: Apache-2.0
"""What all tests share: what they need, a cache of their own, strict promotion.

Tests under ``tests/gpu`` need a CUDA device and those under ``tests/compile`` need
nvcc; elsewhere ``@pytest.mark.gpu`` and ``@pytest.mark.nvcc`` say so. A test whose
need is not met is skipped with the reason, or fails where ``JAX_BOLT_REQUIRE``
(for example ``gpu,nvcc``) names that need: a GPU run cannot pass by skipping.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

# What is started in the background is no part of a test, before anything is imported.
os.environ["JAX_BOLT_WARM"] = "off"

from jax_bolt._src import errors, options
from jax_bolt._src.jit import toolchain

# Before anything reads the options. Workers of pytest-xdist inherit the variable, so
# that they share what one of them compiled.
if "JAX_BOLT_CACHE_DIR" not in os.environ:
    os.environ["JAX_BOLT_CACHE_DIR"] = tempfile.mkdtemp(prefix="jax_bolt-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_BOLT_CACHE_DIR"], True)

# A stray promotion in a test's model or in a rewrite's glue fails at once.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Flax and others need JAX's default promotion, not the suite's strict one."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


@functools.cache
def _no_gpu() -> str | None:
    try:
        jax.devices("cuda")
    except RuntimeError as error:
        return f"no CUDA device: {error}"
    return None


@functools.cache
def _no_nvcc() -> str | None:
    try:
        toolchain.find(options.current())
    except errors.CompileError as error:
        return f"no CUDA compiler: {error}"
    return None


NEEDS: dict[str, Callable[[], str | None]] = {"gpu": _no_gpu, "nvcc": _no_nvcc}


def pytest_configure() -> None:
    unknown = _required() - set(NEEDS)
    if unknown:
        raise pytest.UsageError(f"JAX_BOLT_REQUIRE: no need is called {unknown}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder == "gpu":
            item.add_marker("gpu")
        elif folder == "compile":
            item.add_marker("nvcc")


def pytest_runtest_setup(item: pytest.Item) -> None:
    for need, missing in NEEDS.items():
        if item.get_closest_marker(need) is None:
            continue
        if reason := missing():
            if need in _required():
                pytest.fail(f"JAX_BOLT_REQUIRE={need}, but {reason}")
            pytest.skip(reason)


def _required() -> set[str]:
    names = os.environ.get("JAX_BOLT_REQUIRE", "").split(",")
    return {name.strip() for name in names if name.strip()}


@pytest.fixture
def cache_dir(tmp_path: Path) -> Iterator[Path]:
    """An empty cache that is this test's alone."""
    with options.options(cache_dir=tmp_path / "cache"):
        yield tmp_path / "cache"
