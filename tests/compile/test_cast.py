# SPDX-License-Identifier: Apache-2.0
"""The kernel that casts, with the real nvcc, for old and new architectures."""

from __future__ import annotations

import re

import pytest

from jax_bolt._src import arch, options
from jax_bolt._src.jit import codegen, compiler, toolchain


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["sm_75", "sm_80", "sm_90a"])
def test_it_compiles_without_spills(tmp_path, name, dtype):
    found = toolchain.find(options.current())
    source = codegen.cast_source(dtype)
    binary = compiler.compile(found, source, arch.from_name(name), tmp_path)
    assert binary.name == "cast.cubin"
    assert b".text.jax_bolt_cast\0" in binary.read_bytes()
    log = (tmp_path / compiler.LOG).read_text()
    assert re.search(r"0 bytes spill stores, 0 bytes spill loads", log), log
