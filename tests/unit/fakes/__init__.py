# SPDX-License-Identifier: Apache-2.0
"""A kernel module and a CUDA driver of host code, built where a test asks for them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

FAKES = Path(__file__).parent
INCLUDE = FAKES.parents[2] / "cc" / "include"

Build: TypeAlias = Callable[..., Path]


def builder(folder: Path) -> Build:
    """``build(source, name, *flags)``: the shared object made from one of the fakes."""

    def build(source: str, name: str, *flags: str) -> Path:
        path = folder / name
        if not path.exists():
            command = ["g++", "-std=c++17", "-shared", "-fPIC", f"-I{INCLUDE}", *flags]
            command += [str(FAKES / source), "-o", str(path), "-ldl"]
            subprocess.run(command, check=True)
        return path

    return build
