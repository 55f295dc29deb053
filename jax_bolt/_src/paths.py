# SPDX-License-Identifier: Apache-2.0
"""Where the cache, our headers, CUTLASS's headers and Python are.

Functions only: nothing is looked up at import, and nothing here writes to a disk.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import platformdirs

from .options import Options

_PACKAGE = Path(__file__).resolve().parents[1]


def python() -> str | None:
    """The interpreter to start processes of our own with, or None where there is none.

    In a program that embeds Python, or was frozen, ``sys.executable`` is that program.
    """
    named = sys.executable and Path(sys.executable).name.startswith("python")
    return sys.executable if named else None


def cache_root(options: Options) -> Path:
    """The directory everything cached lives under; it may not exist yet."""
    return options.cache_dir or platformdirs.user_cache_path("jax_bolt")


def kernel_root(options: Options) -> Path:
    """The kernel store's directory."""
    return cache_root(options) / "kernels"


def tuning_root(options: Options) -> Path:
    """The directory of the user's tuning files, one for each device kind."""
    return cache_root(options) / "tuned"


def shipped_tuning(package: Path = _PACKAGE) -> Path:
    """The directory of the tuning files that come with jax_bolt; it may be missing."""
    return package / "data" / "tuned"


def own_include(package: Path = _PACKAGE) -> Path | None:
    """The directory to give ``-I`` for ``jax_bolt/abi.h``; None when it is missing."""
    # Installed, the headers lie inside the package; in a checkout, beside it.
    for root in (package / "_include", package.parent / "cc" / "include"):
        if (root / "jax_bolt" / "abi.h").is_file():
            return root
    return None


def cutlass_root(package: Path = _PACKAGE) -> Path | None:
    """The tree that holds CUTLASS's ``include`` and ``tools/util/include``, or None."""
    roots = [package / "_cutlass"]
    # find_spec of a top-level name does not run the package, whose import is slow.
    spec = importlib.util.find_spec("cutlass_library")
    if spec is not None:
        places = spec.submodule_search_locations or ()
        roots += [Path(place) / "source" for place in places]
    for root in roots:
        if (root / "include" / "cutlass" / "version.h").is_file():
            return root
    return None
