# SPDX-License-Identifier: Apache-2.0
"""Uses cubins on the fake driver (LD_LIBRARY_PATH); prints what happened as JSON.

Arguments: the native module, loaded by its path to spare the import of JAX, and a list
of calls as JSON: the name of a function of the module and its arguments; "at once"
before the name calls it from many threads.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from typing import Any

from fakes.profile import native_module


def state(cuda: Any) -> dict[str, Any]:
    numbers = (ctypes.c_int64 * 64)()
    count = cuda.fake_cubin(numbers)
    encodes, replaces, attributes, value, *launch = numbers[:count]
    raw = (ctypes.c_ubyte * 8192)()
    size = cuda.fake_parameters(raw)
    return {
        "encodes": encodes,
        "replaces": replaces,
        "attributes": [attributes, value],
        "launch": launch,
        "parameters": bytes(raw)[:size].hex(),
    }


def main(path: str, calls: list[list[Any]]) -> list[dict[str, Any]]:
    native = native_module(path)
    cuda = ctypes.CDLL("libcuda.so.1")
    seen: list[dict[str, Any]] = []

    def call(name: str, *args: Any) -> dict[str, Any]:
        try:
            value = getattr(native, name)(*args)
        except (RuntimeError, ValueError) as error:
            return {"error": f"{type(error).__name__}: {error}"}
        return {"value": value}

    for name, *args in calls:
        if name == "at once":
            many = [threading.Thread(target=call, args=args) for _ in range(16)]
            for thread in many:
                thread.start()
            for thread in many:
                thread.join()
            result = {}
        else:
            result = call(name, *args)
        seen.append(result | state(cuda))
    return seen


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], json.loads(sys.argv[2]))))
