# SPDX-License-Identifier: Apache-2.0
"""Runs the profiler on the fake driver (LD_LIBRARY_PATH); prints what happened as JSON.

Arguments: the native module, loaded by its path to spare the import of JAX; the kernel
module, M (its time in microseconds), the number of buffer sets, the number of repeats.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import sys
from typing import Any


def native_module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(native: str, module: str, m: int, sets: int, repeats: int) -> dict[str, Any]:
    _native = native_module(native)
    seen: dict[str, Any] = {}
    _native.load("kernel", module)
    dims = [m, 8, 8, 1]
    buffers = [(100 + i, 0, [0], [], [], 0) for i in range(sets)]
    cuda = ctypes.CDLL("libcuda.so.1")
    try:
        seen["times"] = _native.profile("kernel", 0, dims, buffers, 0, repeats)
        seen["rotation"] = [
            cuda.fake_operand(i) for i in range(cuda.fake_num_operands())
        ]
        before = cuda.fake_num_operands()
        _native.run("kernel", 0, dims, buffers[0], 0)
        seen["run"] = cuda.fake_num_operands() - before
    except (RuntimeError, ValueError) as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    state = (ctypes.c_int * 5)()
    cuda.fake_state(state)
    names = ("retained", "pushed", "objects", "graph_launches", "stream_launches")
    seen.update(zip(names, state, strict=True))
    seen["sm_count"] = ctypes.CDLL(module).fake_last_sm_count()
    seen["launches"] = _native.launches("kernel")
    seen["driver_version"] = _native.driver_version()
    seen["device"] = _native.device_info(0) if "cuInit" not in str(seen) else None
    return seen


if __name__ == "__main__":
    native, kernel, *numbers = sys.argv[1:]
    print(json.dumps(main(native, kernel, *map(int, numbers))))
