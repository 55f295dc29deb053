# SPDX-License-Identifier: Apache-2.0
"""A Flax ResNet-50 through jax_bolt, compared with plain JAX.

On an NVIDIA GPU it runs batch 32 at 224x224 in bf16. Elsewhere the same model runs
small, through the reference path, and the plan for an H100 or H200 is printed, a line
for each kind of region.
"""

from __future__ import annotations

import collections
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax_bolt
from benchmarks import environment, timing
from benchmarks.models import models

MODEL = "resnet50"
module = models.make(MODEL, jnp.bfloat16)


@jax_bolt.optimize
def predict(variables: Any, images: jax.Array) -> Any:
    return module.apply(variables, images)


def example_args() -> tuple[Any, ...]:
    """For ``python -m jax_bolt explain``: shapes of the variables and images."""
    _, *shapes = models.shapes(MODEL, 32, 224)
    return tuple(shapes)


def main() -> None:
    environment.set_sound_cpu_flags()
    on_gpu = jax.default_backend() == "gpu"
    batch, image = (32, 224) if on_gpu else (2, 64)
    apply, variables, images = models.build(MODEL, batch, image)
    plain = jax.jit(apply)
    exact = jax.jit(models.reference(MODEL))(variables, images)
    print(
        f"ResNet-50, bf16, batch {batch}, {image}x{image}, on {jax.devices()[0]}"
        f"{'' if on_gpu else ' (no GPU: the reference path)'}\n"
    )
    for name, fun in (("jax.jit", plain), ("jax_bolt", predict)):
        start = time.perf_counter()
        logits = jax.block_until_ready(fun(variables, images))
        first_s = time.perf_counter() - start
        times = _times(fun, variables, images)
        print(
            f"{name:9} first call {first_s:6.2f} s, then {times}"
            f", relative error {_error(logits, exact):.2e}"
        )
    print()
    if on_gpu:
        print(predict.explain(variables, images))
        return
    print("On a CPU these times say nothing of jax_bolt: both rows run XLA's code.\n")
    print("What an sm_90a GPU would run at batch 32, 224x224:")
    _summarize(jax_bolt.explain(predict, *example_args(), arch="sm_90a"))


def _summarize(report: jax_bolt.Report) -> None:
    """A line for each kind of region, with how many sites have it."""
    kernels = collections.Counter(
        (site.epilogue, site.what_runs_in_short) for site in report.sites
    )
    for (region, kernel), count in kernels.items():
        print(f"{count:4} x {region:30} {kernel}")
    print(f"{str(report).splitlines()[0].strip()}; site by site:")
    print("  python -m jax_bolt explain examples/resnet50.py:predict --arch sm_90a")


def _times(fun: Any, variables: Any, images: jax.Array) -> str:
    wall = timing.wall(fun, variables, images, runs=50, budget_s=5)
    text = f"{wall.median * 1e3:7.2f} ms a call"
    if jax.default_backend() != "gpu":
        return text
    traced = timing.kernels(fun, variables, images)
    return f"{text} ({traced.us / 1e3:.3f} ms in {traced.count:.0f} kernels)"


def _error(logits: Any, exact: jax.Array) -> float:
    difference = logits.astype(jnp.float32) - exact
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))


if __name__ == "__main__":
    main()
