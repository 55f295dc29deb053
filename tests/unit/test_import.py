# SPDX-License-Identifier: Apache-2.0
"""``import jax_bolt`` does next to nothing; the work waits for the first call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fresh_python import run

# What JAX itself imports, prints and starts is not ours.
IMPORT = """
import json, sys, threading
import jax
before, threads = set(sys.modules), threading.active_count()
print("imported JAX")
import jax_bolt
print("imported jax_bolt", flush=True)
print(json.dumps({
    "modules": sorted(set(sys.modules) - before),
    "threads": threading.active_count() - threads,
}))
"""

# JAX refuses to change the number of CPU devices once it has a backend.
COUNT_DEVICES = """
import jax
{statement}
jax.config.update("jax_num_cpu_devices", 3)
print(jax.device_count("cpu"))
"""


def test_import_prints_nothing_and_loads_little(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    places = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "xdg")}
    printed = run(IMPORT, JAX_BOLT_CACHE_DIR=str(cache), **places)
    assert "imported JAX\nimported jax_bolt\n" in printed
    seen = json.loads(printed.splitlines()[-1])
    tops = {name.partition(".")[0] for name in seen["modules"]}
    assert "jax_bolt" in tops
    assert not tops & {"rich", "platformdirs", "filelock", "flax"}
    # program imports the matcher, the kernels, the compiler and the tuner.
    assert "jax_bolt._src.program" not in seen["modules"]
    assert "jax_bolt._native" not in seen["modules"]
    assert seen["threads"] == 0
    assert list(tmp_path.iterdir()) == []


def test_import_initialises_no_backend() -> None:
    assert run(COUNT_DEVICES.format(statement="import jax_bolt")).split() == ["3"]
    with pytest.raises(AssertionError, match="jax_num_cpu_devices config should"):
        run(COUNT_DEVICES.format(statement="import jax_bolt; jax.devices()"))
