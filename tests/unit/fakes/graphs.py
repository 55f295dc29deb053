# SPDX-License-Identifier: Apache-2.0
"""Calls a sequence of five kernels on the fake driver; prints what happened as JSON.

Arguments: the kernels' artifact, how often it is called on each operand, and how many
of these there are; then how often on another one.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bolt import _native

ONE = (0, 0, 4, 4, 3, 5, 1, 0, 1, 0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0)  # A x B, 4 by 3


def main(artifact: str, calls: int, operands: int, more: int) -> dict[str, Any]:
    # The handler runs on this thread, whose context is current.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _native.load("kernel", artifact)
    jax.ffi.register_ffi_target("launch", _native.host_handlers(), platform="cpu")
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 40)
    cuda.cuCtxPushCurrent_v2(context)

    def state() -> list[int]:
        read = (ctypes.c_int * 5)()
        cuda.fake_state(read)
        return list(read)

    given = {"kind": np.int64(3), "digests": "kernel"}
    given |= {"program": np.asarray([2, 5, *ONE * 5], np.int64)}
    # The result is where an operand was: at one place however often it is called.
    call = jax.ffi.ffi_call(
        "launch",
        [jax.ShapeDtypeStruct((4, 3), jnp.float32)],
        input_output_aliases={2: 0},
    )
    run = jax.jit(lambda a, b, c: call(a, b, c, **given)[0], donate_argnums=2)
    b = jnp.full((5, 3), 2.0)
    c = jnp.zeros((4, 3))
    seen: dict[str, Any] = {"graphs": [], "launches": [], "sums": []}
    every = [jnp.full((4, 5), 1.0 + i) for i in range(operands + 1)]
    for a in [*every[:-1] * calls, *every[-1:] * more]:
        c = run(a, b, c)
        seen["sums"].append(float(c[0, 0]))
        seen["graphs"].append(state()[3])
        seen["launches"].append(_native.launches("kernel"))
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], *map(int, sys.argv[2:]))))
