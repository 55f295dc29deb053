# SPDX-License-Identifier: Apache-2.0
"""Code in a Python process of its own, which imports the jax_bolt under test."""

from __future__ import annotations

import os
import subprocess
import sys


def environ(**changes: str) -> dict[str, str]:
    """This environment, in which a new Python finds the modules that this one does."""
    places = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": places, **changes}


def run(code: str, *args: object, **changes: str) -> str:
    """All that ``code`` printed, warnings and all; fails where it did."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, args)],
        env=environ(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout
