# SPDX-License-Identifier: Apache-2.0
"""Candidates timed where they can do no harm: in a worker process, one for each GPU.

The worker (``worker.py``) lives as long as a tuning does, and no longer than this
process. It speaks JSON, not pickles: what a candidate has made of it must not run here.
When it dies, or says nothing for too long, the candidate at hand is to blame and a new
worker takes the next.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import ir, paths
from ..errors import CompileError
from ..invoke import launched
from ..jit import loader, store
from ..plan import AnyCandidate, ChainCandidate
from .failures import Failures

logger = logging.getLogger(__name__)

_START_S = 60.0
_LIMIT_S = 20.0
_POLL_S = 0.2
_EXIT_S = 5.0
_MAX_ANSWER = 1 << 20  # bytes
_MAX_STARTS = 2  # in vain, in a row
_PROGRAM = Path(__file__).with_name("worker.py")


class Unavailable(Exception):
    """Why there is no worker: nothing can be timed."""


class NoMemory(Exception):
    """The GPU has too little memory left for one set of operands."""


class Failed(Exception):
    """Why a candidate has no time. ``fatal``: it took the worker with it."""

    def __init__(self, reason: str, *, fatal: bool = False):
        super().__init__(reason)
        self.fatal = fatal


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """Median µs per launch, and the relative distance of the quartiles."""

    micros: float
    spread: float

    @staticmethod
    def of(times: Sequence[float]) -> Timing:
        middle = statistics.median(times)
        if len(times) < 4:
            return Timing(middle, (max(times) - min(times)) / middle)
        low, _, high = statistics.quantiles(times, n=4)
        return Timing(middle, (high - low) / middle)


class Worker:
    """The worker of one GPU, as this process sees it; for one thread at a time."""

    def __init__(self, uuid: str, ordinal: int, program: Sequence[str] = ()):
        self._device = (uuid, str(ordinal))
        self._program = program or (str(_PROGRAM), _native_path())
        self._process: subprocess.Popen | None = None
        self._socket: socket.socket | None = None
        self._errors: Any = None
        self._rest = b""
        self._ready = False
        self._ran = False  # once, at least
        self._failed_starts = 0

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Starts the process where there is none, and does not wait for it.

        Raises Unavailable.
        """
        if self._process is not None:
            return
        if self._failed_starts == _MAX_STARTS:
            raise Unavailable("not tuned: the tuning worker does not start")
        python = paths.python()
        if python is None:
            raise Unavailable(
                "not tuned: the tuning worker needs a Python to run it, and "
                f"sys.executable is {sys.executable!r}"
            )
        ours, theirs = socket.socketpair()
        us = str(theirs.fileno()), str(os.getpid())
        try:
            with theirs:
                self._errors = tempfile.TemporaryFile()
                self._process = subprocess.Popen(
                    # Isolated: whatever the user's environment and directories hold.
                    [python, "-I", "-S", *self._program, *us, *self._device],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    # An interrupt at the terminal is the parent's to handle.
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            ours.close()
            if self._errors is not None:
                self._errors.close()
            self._failed_starts = _MAX_STARTS
            raise Unavailable(
                f"not tuned: the tuning worker cannot be started: {error}"
            ) from None
        self._socket, self._rest = ours, b""

    def time(
        self,
        request: dict[str, Any],
        limit_s: float = _LIMIT_S,
        poll: Callable[[], None] = lambda: None,
    ) -> Timing:
        """Of the candidate that ``request`` describes, as ``request_for``.

        ``poll`` is called all the while; what it raises ends the worker.

        Raises Failed, NoMemory and Unavailable.
        """
        try:
            if self._process is not None and self._process.poll() is not None:
                self.stop()  # it died of something else, while nothing was asked
            self._wait_until_ready(poll)
            answer = self._ask(request, limit_s, poll)
            if answer.get("broken"):
                self.stop()
        except BaseException:
            self.stop()
            raise
        if answer.get("memory"):
            raise NoMemory
        if "error" in answer:
            reason, *_ = str(answer["error"]).splitlines() or ["it failed"]
            raise Failed(reason, fatal=bool(answer.get("broken")))
        times = _times(answer)
        if not times:
            self.stop()
            raise _nonsense()
        if request["verify"] and answer.get("wrote_all") is not True:
            raise Failed("left elements unwritten")
        return Timing.of(times)

    def stop(self) -> None:
        """Ends the process, whatever it is doing. The next ``time`` starts another."""
        process, self._process = self._process, None
        self._ready = False
        if process is None:
            return
        process.kill()
        if self._socket is not None:
            self._socket.close()
        self._errors.close()
        try:
            process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            # A GPU may take its time to let go of a process that it was working for.
            threading.Thread(target=process.wait, daemon=True).start()

    def _wait_until_ready(self, poll: Callable[[], None]) -> None:
        while not self._ready:
            if self._process is None and self._ran:
                store.count("restarts")
            self.start()
            try:
                answer = self._receive(_START_S, poll)
            except Failed as error:
                logger.warning("jax_bolt: the tuning worker: %s", error)
                self._failed_starts += 1
                self.stop()
                continue
            if "ready" not in answer:
                reason = answer.get("unavailable", "it does not understand")
                self._failed_starts = _MAX_STARTS
                raise Unavailable(
                    f"not tuned: the tuning worker cannot use the GPU: {reason}"
                )
            self._ready, self._ran, self._failed_starts = True, True, 0

    def _ask(
        self, request: dict[str, Any], limit_s: float, poll: Callable[[], None]
    ) -> dict[str, Any]:
        assert self._socket is not None
        try:
            self._socket.settimeout(limit_s)
            self._socket.sendall(json.dumps(request).encode() + b"\n")
        except OSError:  # it is dead: how it died is known below
            pass
        return self._receive(limit_s, poll)

    def _receive(self, limit_s: float, poll: Callable[[], None]) -> dict[str, Any]:
        """The next line; Failed where none comes."""
        assert self._socket is not None
        self._socket.settimeout(_POLL_S)
        # Not by the clock, which goes on while a container is paused.
        looks = math.ceil(limit_s / _POLL_S)
        while b"\n" not in self._rest:
            poll()
            if not looks:
                raise Failed(f"did not end within {limit_s:.0f} s", fatal=True)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                looks -= 1
                continue
            except OSError:
                data = b""
            self._rest += data
            if not data:
                raise self._ended()
            if len(self._rest) > _MAX_ANSWER:
                raise _nonsense()
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise _nonsense()
        return answer

    def _ended(self) -> Failed:
        """How, once it has closed its end of the socket."""
        assert self._process is not None
        try:
            code = self._process.wait(_EXIT_S)
        except subprocess.TimeoutExpired:
            return _nonsense()
        with contextlib.suppress(OSError, ValueError):
            self._errors.seek(0)
            logger.info("the tuning worker: %s", self._errors.read()[-2000:])
        if code < 0:
            # Some are others' doing: memory was short, or the job was ended.
            own = -code not in (signal.SIGKILL, signal.SIGTERM)
            return Failed(f"crashed the worker (signal {-code})", fatal=own)
        return Failed(f"the worker ended (exit status {code})")


def _nonsense() -> Failed:
    return Failed("made the worker answer nonsense", fatal=True)


def worker(ordinal: int) -> Worker:
    """A worker for a GPU, by CUDA's ordinal in this process. Raises Unavailable."""
    try:
        uuid = loader.native().device_info(ordinal)["uuid"]
    except (CompileError, RuntimeError) as error:
        raise Unavailable(f"not tuned: {error}") from error
    return Worker(uuid, ordinal)


def launch(
    worker: Worker,
    request: dict[str, Any],
    limit_s: float,
    crashes: Failures,
    poll: Callable[[], None] = lambda: None,
) -> Timing:
    """``worker.time``, but of nothing that is known to crash; what does is recorded."""
    if before := crashes.get(request):
        raise Failed(f"{before}, before", fatal=True)
    try:
        return worker.time(request, limit_s, poll)
    except Failed as error:
        if error.fatal:
            crashes.add(request, str(error))
        raise


def request_for(
    candidate: AnyCandidate,
    digest: str,
    path: Path,
    sets: int,
    repeats: int,
    *,
    verify: bool,
) -> dict[str, Any]:
    """What the worker is to time: ``candidate``, built as ``path``, on random data.

    With ``verify`` it also makes sure that all outputs are written as a whole. Raises
    Failed for what cannot be launched.
    """
    kind, dims = launched(candidate.form.region)
    try:
        recipe = candidate.recipe
    except ValueError as error:
        raise Failed(f"cannot be launched: {error}") from error
    if isinstance(candidate, ChainCandidate):
        operands = _chain_operands(candidate.form.region)
    else:
        operands = _operands(candidate.form.region)
    return {
        "digest": digest,
        "path": str(path),
        "kind": kind,
        "dims": dims,
        "recipe": list(recipe),
        "repeats": repeats,
        "verify": verify,
        "operands": {"sets": sets, **operands},
    }


def _operands(region: ir.Region) -> dict[str, list]:
    """What a region reads and writes: of inputs dtype, bytes and distribution."""
    problem, epilogue = region.problem, region.epilogue
    a, b = problem.operand_elements
    full = problem.rows * problem.channels
    stored = region.stored_rows * problem.channels
    depth = max(1, b // problem.channels)

    def operand(dtype: str, count: int, scale: float = 1.0, positive: bool = False):
        return [dtype, count * ir.ITEM_BYTES[dtype], scale, positive]

    return {
        "ab": [
            operand(problem.dtype, a),
            operand(problem.dtype, b, scale=1 / math.sqrt(depth)),
        ],
        "sides": [operand(dtype, full) for dtype in epilogue.sides],
        "vectors": [
            operand(v.dtype, 1 if v.scalar else problem.channels, positive=True)
            for v in epilogue.vectors
        ],
        "output_bytes": [stored * ir.ITEM_BYTES[o.dtype] for o in epilogue.outputs],
    }


def _chain_operands(chain: ir.Chain) -> dict[str, list]:
    """As ``launches.add_chain`` binds them: later products ahead of side inputs."""
    first, *others = each = [_operands(region) for region in chain.regions]
    products: list[Any] = []
    for made, other in zip(chain.joints, others, strict=True):
        if made is None:
            products += other["ab"][1:]
        else:
            products += other["ab"]
            del other["sides"][made]
    stored = each[-2 if chain.stored else -1 :]
    return {
        "ab": first["ab"],
        "sides": [*products, *(side for part in each for side in part["sides"])],
        "vectors": [vector for part in each for vector in part["vectors"]],
        "output_bytes": [size for part in stored for size in part["output_bytes"]],
    }


def limit_s(region: ir.Work, sets: int, bandwidth: float) -> float:
    """Seconds that a candidate has: far more than any needs that will ever win."""
    least = region.bytes_moved / bandwidth + region.flops / 1e15
    return _LIMIT_S + 1000 * sets * least


def _native_path() -> str:
    return str(loader.native().__file__)


def _times(answer: dict[str, Any]) -> list[float]:
    """The µs of an answer; none where it has anything else."""
    times = answer.get("times")
    if not isinstance(times, list):
        return []
    good = all(type(t) in (int, float) and 0 < t < 1e12 for t in times)
    return times if good else []
