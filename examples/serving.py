# SPDX-License-Identifier: Apache-2.0
"""A serving loop at batch 1: parameters frozen, a new checkpoint in between.

    python examples/serving.py

Everything that depends on the parameters alone is computed once. A request runs what is
left, and another checkpoint of the same shapes compiles nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))

import jax_bolt
from benchmarks import environment
from benchmarks.models import models


def requests(count: int, image: int) -> Iterator[np.ndarray]:
    """Images as they come in, [1, image, image, 3]."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        yield rng.standard_normal((1, image, image, 3), np.float32)


def serve(predict: Callable[[Any], Any], count: int, image: int) -> list[float]:
    """Seconds from a request's image to its class, one after the other."""
    times = []
    for request in requests(count, image):
        start = time.perf_counter()
        logits = predict(jnp.asarray(request, jnp.bfloat16))
        int(jnp.argmax(logits))  # the answer, on the host
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    environment.set_sound_cpu_flags()
    on_gpu = jax.default_backend() == "gpu"
    name, image, count = ("resnet50", 224, 200) if on_gpu else ("resnet18", 32, 5)
    apply, variables, _ = models.build(name, 1, image)
    plain = jax.jit(apply)
    predict = jax_bolt.freeze(apply, variables)
    for label, fun in (
        ("jax.jit", lambda x: plain(variables, x)),
        ("frozen", predict),
    ):
        serve(fun, 3, image)  # compiles, and tunes
        times = sorted(serve(fun, count, image))
        median, late = times[len(times) // 2], times[int(len(times) * 0.99)]
        print(f"{label:8} {median * 1e3:7.3f} ms median, {late * 1e3:7.3f} ms at 99 %")

    other = jax.tree.map(lambda leaf: leaf * 1.01, variables)
    start = time.perf_counter()
    predict = predict.replace(other)
    serve(predict, 1, image)
    seconds = time.perf_counter() - start
    print(f"a new checkpoint: {seconds * 1e3:.1f} ms to its first answer")


if __name__ == "__main__":
    main()
