# SPDX-License-Identifier: Apache-2.0
"""What the cache says of itself: kernels lately used, libraries that are complete.

Imports no JAX, which takes a second: most look rounds find nothing to build.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path

from .. import paths
from ..arch import GpuArch
from ..jit import compiler, store
from ..jit import toolchain as toolchains
from ..jit.toolchain import Toolchain
from ..options import Options
from ..tune import db
from . import start

RECENT_S = 30 * 86400.0


def winners(active: Options) -> set[str]:
    """The digests of the kernels that tuning results chose."""
    found = db.Database(paths.tuning_root(active)).all()
    entries = (entry for file in found for entry in file.entries.values())
    return {entry.digest for entry in entries if entry.choice == "kernel"}


def recent(active: Options) -> list[store.Entry]:
    """What the store has and was asked for in the last month, the latest first."""
    entries = reversed(store.Store(paths.kernel_root(active)).entries())
    return [entry for entry in entries if entry.used > time.time() - RECENT_S]


def complete(arch: GpuArch, active: Options, tools: Toolchain) -> Path:
    """The file that says that all of a library was built; its folder is there.

    What is removed since then was not used for longest, and is left away.
    """
    folder = paths.kernel_root(active) / start.FOLDER
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder / f"complete-{_version(arch, tools)}"


def _version(arch: GpuArch, tools: Toolchain) -> str:
    """What the contents of a library depend on, as a digest."""
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    parts = [
        *(arch.name, tools.version, code.hexdigest()),
        toolchains.sources(),
        compiler.flags(arch),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
