# SPDX-License-Identifier: Apache-2.0
"""A kernel module and a CUDA driver of host code, built where a test asks for them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

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


def program(driver: Path, script: str, *args: object, **env: str) -> Any:
    """What one of the programs here prints as JSON, run on the fake ``driver``."""
    env = {"LD_LIBRARY_PATH": str(driver.parent), "JAX_PLATFORMS": "cpu"} | env
    done = subprocess.run(
        [sys.executable, "-P", str(FAKES / script), *map(str, args)],
        env=os.environ | env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
