# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled behind the back of whoever times them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import CompileError
from ..plan import AnyCandidate
from .target import Target

# source -> (its digest, the path of its artifact or the CompileError)
Built: TypeAlias = dict[str, tuple[str, Path | CompileError]]

_POLL_S = 0.1


class Stopped(Exception):
    """The caller no longer waits, or the budget is spent."""


class Builder:
    """Compiles what it is given in a thread of its own, all that waits together."""

    def __init__(self, target: Target):
        self._target = target
        self._changed = threading.Condition()
        self._waiting: dict[str, None] = {}  # sources, in order
        self._building: set[str] = set()
        self._built: Built = {}
        self._error: BaseException | None = None
        self._stopped = False
        self._thread = threading.Thread(
            target=self._work, name="jax_bolt-build", daemon=True
        )

    def __enter__(self) -> Builder:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the compilers; what they had left is not built."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def add(self, sources: Sequence[str]) -> None:
        with self._changed:
            known = self._built.keys() | self._building
            self._waiting |= dict.fromkeys(s for s in sources if s not in known)
            self._changed.notify_all()

    def left(self) -> int:
        """How many kernels are to be compiled yet."""
        with self._changed:
            return len(self._waiting) + len(self._building)

    def are_built(self, sources: Sequence[str]) -> bool:
        """Whether it is known of all how compiling them ended.

        Raises what ended the thread, as CacheError.
        """
        with self._changed:
            if self._error is not None:
                raise self._error
            return all(source in self._built for source in sources)

    def wait(self, sources: Sequence[str], poll: Callable[[], None]) -> Built:
        """All of ``sources``; ``poll`` is called meanwhile, and may raise."""
        while not self.are_built(sources):
            poll()
            with self._changed:
                self._changed.wait(_POLL_S)
        with self._changed:
            return {source: self._built[source] for source in sources}

    def _work(self) -> None:
        while True:
            with self._changed:
                self._building.clear()
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                self._building.update(self._waiting)
                sources = list(self._waiting)
                self._waiting.clear()
            try:
                self._build(sources)
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def _build(self, sources: list[str]) -> None:
        target = self._target
        keys = {target.digest(source): source for source in sources}

        def on_done(digest: str, result: Path | CompileError) -> None:
            with self._changed:
                source = keys[digest]
                self._built[source] = (digest, result)
                self._building.discard(source)
                self._changed.notify_all()
                if self._stopped:
                    raise Stopped

        with contextlib.suppress(Stopped):
            target.kernels.build(
                target.toolchain, sources, target.arch, target.jobs, on_done
            )


def build(
    candidates: Sequence[AnyCandidate], target: Target, step: Callable[[str], None]
) -> Built:
    """Compiles all of them together, and waits.

    ``step`` is called with the digest of every kernel that is done. It may raise
    Stopped, which ends the compilers; what they had left is a CompileError.
    """
    sources = list(dict.fromkeys(c.source for c in candidates))
    keys = {source: target.digest(source) for source in sources}
    results: dict[str, Any] = {}

    def on_done(digest: str, result: Path | CompileError) -> None:
        results[digest] = result
        step(digest)

    with contextlib.suppress(Stopped):
        target.kernels.build(
            target.toolchain, sources, target.arch, target.jobs, on_done
        )
    missing = CompileError("not compiled: tuning stopped before")
    return {s: (keys[s], results.get(keys[s], missing)) for s in sources}
