# SPDX-License-Identifier: Apache-2.0
"""Device code compiled as host code, and run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from jax_bolt._src.jit.toolchain import Toolchain


def output_of(source: Path, found: Toolchain, folder: Path) -> str:
    """What the program ``source`` prints; fails where it does not build or run."""
    program = folder / source.stem
    build = subprocess.run(
        [
            str(found.nvcc),
            *("-x", "c++", "-std=c++17", "-O1", "-DNDEBUG"),
            "-Xcompiler=-fpermissive,-w",
            *(f"-I{path}" for path in (found.own_include, found.cutlass_include)),
            *("-o", str(program)),
            str(source),
        ],
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    run = subprocess.run([str(program)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
