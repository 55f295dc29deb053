# SPDX-License-Identifier: Apache-2.0
"""The tuner's worker, a program of its own: launches candidates and says how long.

Arguments: the native module's path, the socket's number, the parent's process id, the
GPU's uuid and its likeliest ordinal. Then one line of JSON in, one out: ``isolate.py``
has both sides' words. A candidate may kill this process, or never end; nobody else is
harmed.

Only the standard library is imported, and the native module by its path: no JAX, no
site-packages, none of the user's code, and of the GPU's memory only what is asked for.
"""

from __future__ import annotations

import array
import importlib.util
import json
import os
import random
import select
import socket
import struct
import sys
import threading
import time
from typing import Any

_DRAWN = 65521  # elements drawn of an operand, then repeated; a prime
_POLL_MS = 500


class Patterns:
    """Random values as bytes, by dtype and distribution."""

    def __init__(self) -> None:
        draw = random.Random(0)
        self._normal = [draw.gauss(0.0, 1.0) for _ in range(_DRAWN)]
        self._known: dict[tuple, bytes] = {}

    def of(self, dtype: str, scale: float, positive: bool, shift: int) -> bytes:
        """Normal values times ``scale``, or uniform ones about 1; another place to
        begin for every ``shift``."""
        key = (dtype, scale, positive)
        if key not in self._known:
            if len(self._known) > 32:
                self._known.clear()
            self._known[key] = _encode(dtype, self._values(scale, positive))
        data = self._known[key]
        start = shift * 4096 % len(data)
        return data[start:] + data[:start]

    def _values(self, scale: float, positive: bool) -> list[float]:
        if positive:  # a per-channel input may be a variance
            return [0.5 + (x * 16 % 1.0) for x in self._normal]
        return [scale * x for x in self._normal]


def _encode(dtype: str, values: list[float]) -> bytes:
    if dtype == "bool":
        return bytes(x > 0 for x in values)
    if dtype == "f16":
        return struct.pack(f"<{len(values)}e", *values)
    floats = array.array("f", values).tobytes()
    if dtype == "f32":
        return floats
    halves = bytearray(len(floats) // 2)
    halves[0::2], halves[1::2] = floats[2::4], floats[3::4]
    return bytes(halves)


class Timer:
    """Times candidates on the GPU ``ordinal``."""

    def __init__(self, native: Any, ordinal: int):
        self.native = native
        self.ordinal = ordinal
        self._context = native.Memory(ordinal)  # kept for the process's life
        self._patterns = Patterns()
        self._operands: Any = None
        self._memory: Any = None
        self._sets: list[tuple] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            if request["operands"] != self._operands:
                self._allocate(request["operands"])
            return self._time(request)
        except MemoryError:
            self._forget()
            return {"memory": True}
        except (RuntimeError, ValueError) as error:
            return {"error": str(error), "broken": not self._works()}

    def _time(self, request: dict[str, Any]) -> dict[str, Any]:
        native, digest = self.native, request["digest"]
        problem = request["kind"], request["dims"]
        recipe = request["recipe"]
        native.load(digest, request["path"])
        refusal = native.check(digest, *problem, recipe)
        if refusal is not None:
            return {"error": f"refuses the problem: {refusal}", "broken": False}
        size = native.workspace_bytes(digest, *problem, self.ordinal, None, recipe)
        space = native.Memory(self.ordinal)
        workspace = space.allocate(size, b"") if size else 0
        sets = [(*buffers, workspace) for buffers in self._sets]
        repeats = request["repeats"]
        times = native.profile(digest, *problem, sets, self.ordinal, repeats, recipe)
        answer: dict[str, Any] = {"times": times}
        if request["verify"]:
            written = request["operands"]["output_bytes"]
            answer["wrote_all"] = native.writes_all(
                digest, *problem, sets[0], written, self.ordinal, recipe
            )
        return answer

    def _allocate(self, operands: dict[str, Any]) -> None:
        self._forget()
        self._memory = self.native.Memory(self.ordinal)
        for index in range(operands["sets"]):
            outputs = [
                self._memory.allocate(size, b"") for size in operands["output_bytes"]
            ]
            a, b = (self._filled(each, index) for each in operands["ab"])
            sides = [self._filled(each, index) for each in operands["sides"]]
            vectors = [self._filled(each, index) for each in operands["vectors"]]
            self._sets.append((a, b, outputs, sides, vectors))
        self._operands = operands

    def _filled(self, operand: list, index: int) -> int:
        dtype, size, scale, positive = operand
        return self._memory.allocate(
            size, self._patterns.of(dtype, scale, positive, index)
        )

    def _forget(self) -> None:
        self._operands, self._memory, self._sets = None, None, []

    def _works(self) -> bool:
        """Whether the context is one that can still be used: most errors are final."""
        try:
            self.native.Memory(self.ordinal).allocate(16, b"")
        except (RuntimeError, MemoryError):
            return False
        return True


def native_module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_device(native: Any, uuid: str, ordinal: int) -> int:
    """The GPU of that uuid; the parent may have changed what is visible since."""
    for tried in (ordinal, *range(64)):
        try:
            if native.device_info(tried)["uuid"] == uuid:
                return tried
        except RuntimeError:
            if tried != ordinal:
                break
    raise RuntimeError(f"no GPU has the uuid {uuid} here")


def end_with(parent: int, fd: int) -> None:
    """Ends this process when its parent has: also out of a kernel that never ends."""
    poll = select.poll()
    poll.register(fd, select.POLLHUP | select.POLLERR)
    while True:
        # A process that the parent forked may keep the socket open.
        if (
            any(
                mask & (select.POLLHUP | select.POLLERR)
                for _, mask in poll.poll(_POLL_MS)
            )
            or os.getppid() != parent
        ):
            os._exit(1)


def main(path: str, fd: int, parent: int, uuid: str, ordinal: int) -> None:
    threading.Thread(target=end_with, args=(parent, fd), daemon=True).start()
    with socket.socket(fileno=fd) as connection, connection.makefile("rw") as lines:

        def say(answer: dict[str, Any]) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        start = time.monotonic()
        try:
            native = native_module(path)
            timer = Timer(native, find_device(native, uuid, ordinal))
        except (ImportError, RuntimeError, MemoryError) as error:
            say({"unavailable": str(error) or "too little free device memory"})
            return
        say({"ready": round(time.monotonic() - start, 3)})
        for line in lines:
            say(timer.answer(json.loads(line)))


if __name__ == "__main__":
    path, fd, parent, uuid, ordinal = sys.argv[1:]
    main(path, int(fd), int(parent), uuid, int(ordinal))
