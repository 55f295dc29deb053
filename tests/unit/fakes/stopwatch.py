# SPDX-License-Identifier: Apache-2.0
"""Times a region on the fake driver (LD_LIBRARY_PATH); prints what happened as JSON.

Arguments: the µs that one execution of the region takes, and how often in a row the
device has reached the first mark before the host made the second.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp

from jax_bolt._src.jit import loader
from jax_bolt._src.tune import measure


def main(micros: int, late: int) -> dict[str, Any]:
    # In order, as on one CUDA stream.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    native = loader.native()
    jax.ffi.register_ffi_target(
        loader.mark_target(), native.host_mark_handlers(), platform="cpu"
    )
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    # XLA has its context current when it calls a handler.
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 40)
    cuda.cuCtxPushCurrent_v2(context)
    cuda.fake_reached(late)
    executions: list[int] = []

    def advance(x: Any) -> Any:
        executions.append(int(x[0]))
        cuda.fake_advance(micros)
        return x

    def region(x: jax.Array) -> list[jax.Array]:
        return [jax.pure_callback(advance, x, x, vmap_method="sequential")]

    sets = tuple((jnp.full(4, i, jnp.int32),) for i in range(3))
    seen: dict[str, Any] = {}
    try:
        site: Any = types.SimpleNamespace(views=(None,), results=(None,))
        operands = measure.Operands(site, sets)
        seen["micros"] = measure.time_region(region, operands, 0).micros
    except Exception as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["executions"] = executions
    try:
        native.read_stopwatch(0)
    except RuntimeError as error:
        seen["unread"] = str(error)
    cuda.fake_join()
    if "error" not in seen:
        began = time.perf_counter()
        jax.block_until_ready(measure._marker()(0))
        cuda.fake_join()
        seen["held_up_s"] = time.perf_counter() - began
        jax.block_until_ready(measure._marker()(1))
        native.read_stopwatch(0)
    state = (ctypes.c_int * 5)()
    cuda.fake_state(state)
    seen["objects"] = state[2]
    return seen


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
