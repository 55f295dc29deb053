# SPDX-License-Identifier: Apache-2.0
"""Which stored kernels programs used here. Imports no JAX, which takes a second."""

from __future__ import annotations

import time

from .. import paths
from ..jit import store
from ..options import Options
from ..tune import db

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
