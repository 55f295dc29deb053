# SPDX-License-Identifier: Apache-2.0
"""Casts on the fake driver (LD_LIBRARY_PATH) and XLA's CPU client, in several programs.

Arguments: the path of a cubin that casts, and as JSON the lengths of the tensors that
each program casts. Prints as JSON, for each, how many launches it made and the last
one's sizes and attributes, or the error.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_bolt._src import invoke
from jax_bolt._src.jit import loader


def cast(digest: str, lengths: list[int]) -> None:
    # Whole numbers that bf16 has, other ones in each tensor.
    arrays = [(np.arange(n) + i) % 251 for i, n in enumerate(lengths)]
    arrays = [array.astype(np.float32) for array in arrays]
    fun = jax.jit(lambda *xs: invoke.cast(digest, xs, jnp.dtype(jnp.bfloat16)))
    for got, want in zip(fun(*arrays), arrays, strict=True):
        np.testing.assert_array_equal(np.asarray(got, np.float32), want)


def main(path: str, programs: list[list[int]]) -> list[dict[str, Any]]:
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    native = loader.native()
    jax.ffi.register_ffi_target(
        loader.ffi_target(), native.host_handlers(), platform="cpu"
    )
    # As in a process that did not lower the program: its digest is all there is.
    native.set_resolver(lambda digest: native.load(digest, path))
    cuda = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    # XLA has its context current when it calls a handler.
    cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 40)
    cuda.cuCtxPushCurrent_v2(context)
    seen: list[dict[str, Any]] = []
    for lengths in programs:
        before = cuda.fake_casts()
        try:
            cast("casts", lengths)
        except jax.errors.JaxRuntimeError as error:
            seen.append({"error": str(error)})
            continue
        numbers = (ctypes.c_int64 * 64)()
        count = cuda.fake_cubin(numbers)
        launches = cuda.fake_casts() - before
        seen.append({"launches": launches, "last": numbers[4:count]})
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
