# SPDX-License-Identifier: Apache-2.0
"""What a wheel must bring: run by the Python of an environment that has only that.

    python -P tests/installed.py 0.1.0

Fails on the first thing that is missing. ``make package`` runs it.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import jax_bolt
from jax_bolt._src import kernels, options, paths
from jax_bolt._src.jit import loader, toolchain


def main(version: str) -> None:
    package = Path(jax_bolt.__file__).parent
    assert package.is_relative_to(sys.prefix), f"{package} is not what was installed"
    assert jax_bolt.__version__ == importlib.metadata.version("jax_bolt") == version
    for name in ("py.typed", "_native.pyi", "_cutlass/LICENSE.txt"):
        assert (package / name).is_file(), name
    assert paths.own_include() == package / "_include"
    assert paths.cutlass_root() == package / "_cutlass"
    assert toolchain.sources(kernels.HEADERS)
    assert loader.native().ABI_VERSION > 0

    @jax_bolt.optimize
    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w)

    x, w = jnp.ones((32, 64), jnp.bfloat16), jnp.ones((64, 48), jnp.bfloat16)
    assert layer(x, w).shape == (32, 48)
    report = layer.explain(x, w, arch="sm_90a")
    assert report.coverage == 1.0 and "implicit_gemm_sm90" in str(report)
    with tempfile.TemporaryDirectory() as folder:
        report.to_html(Path(folder) / "report.html")
        command = [sys.executable, "-m", "jax_bolt"]
        subprocess.run([*command, "cache", "size"], cwd=folder, check=True)
        try:
            toolchain.find(options.current())
        except jax_bolt.CompileError:
            print("no nvcc here: nothing is compiled with the headers of the wheel")
        else:
            doctor = [*command, "doctor", "--arch", "sm_90a"]
            subprocess.run(doctor, cwd=folder, check=True)
    print(f"jax_bolt {version} works as installed")


if __name__ == "__main__":
    main(sys.argv[1])
