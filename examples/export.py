# SPDX-License-Identifier: Apache-2.0
"""A model exported with ``jax.export``, its kernels beside it, and run from that.

    python examples/export.py /tmp/model

On a GPU the program names its kernels by their digests, and the machine that runs it
needs them in its cache: they go into ``kernels.zip``. Without a GPU the program is
plain JAX, for CPUs. JAX's serialization needs ``pip install flatbuffers``.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

import jax_bolt

# The name of the launcher, which is no part of XLA; exporting asks to be told.
LAUNCHER = export.DisabledSafetyCheck.custom_call("jax_bolt.launch")


@jax_bolt.optimize
def predict(params: list[jax.Array], x: jax.Array) -> jax.Array:
    for w in params[:-1]:
        x = jax.nn.gelu(x @ w)
    return x @ params[-1]


def main(folder: Path) -> None:
    on_gpu = jax.default_backend() == "gpu"
    keys = jax.random.split(jax.random.key(0), 4)
    sizes = [(256, 1024), (1024, 1024), (1024, 64)]
    params = [
        (jax.random.normal(key, size) / size[0] ** 0.5).astype(jnp.bfloat16)
        for key, size in zip(keys, sizes, strict=False)
    ]
    x = jax.random.normal(keys[3], (64, 256)).astype(jnp.bfloat16)
    expected = predict(params, x)  # tunes, where there is a GPU

    exported = export.export(jax.jit(predict), disabled_checks=[LAUNCHER])(params, x)
    program = folder / "model.jax"
    program.write_bytes(exported.serialize())
    print(f"{program.name}: {program.stat().st_size} bytes, {exported.platforms}")
    if on_gpu:
        command = [sys.executable, "-m", "jax_bolt", "cache", "export", "--force"]
        subprocess.run([*command, str(folder / "kernels.zip")], check=True)

    # Elsewhere: `python -m jax_bolt cache import kernels.zip`, then
    loaded = export.deserialize(bytearray(program.read_bytes()))
    result = loaded.call(params, x)
    assert (result == expected).all()
    print(f"it gives the same {result.shape} results, bit by bit")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        target = Path(sys.argv[1])
        target.mkdir(parents=True, exist_ok=True)
        main(target)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
