# SPDX-License-Identifier: Apache-2.0
"""Base programs compile: a few of each architecture's, the others differ in sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_bolt._src import arch as arch_
from jax_bolt._src import base, options, paths
from jax_bolt._src.jit import store, toolchain


@pytest.mark.parametrize(("name", "every"), [("sm_90a", 29), ("sm_80", 7)])
def test_base_programs_compile(name: str, every: int) -> None:
    active, arch = options.current(), arch_.from_name(name)
    sources = base.sources(arch)[::every]
    kernels = store.Store(paths.kernel_root(active))
    built = kernels.build(toolchain.find(active), sources, arch)
    failed = [result for result in built.values() if not isinstance(result, Path)]
    assert not failed, failed
