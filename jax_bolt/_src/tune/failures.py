# SPDX-License-Identifier: Apache-2.0
"""Launches that crashed or never ended, so that they are not tried again.

One line each in a file beside the tuning results: a digest over the kernel's own (hence
its sources, headers and compiler), the problem and the recipe; and what happened.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NAME = "failed.txt"


class Failures:
    """The launches that failed on this machine; safe for threads and processes."""

    def __init__(self, root: Path):
        self._path = root / NAME
        self._known: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for line in self._path.read_text(errors="replace").splitlines():
                key, _, reason = line.partition(" ")
                self._known[key] = reason

    def get(self, request: Mapping[str, Any]) -> str | None:
        """How the launch that a worker is asked for ended before, or None."""
        return self._known.get(_key(request))

    def add(self, request: Mapping[str, Any], reason: str) -> None:
        key = _key(request)
        self._known[key] = reason
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:  # one write: lines stay whole
                file.write(f"{key} {' '.join(reason.split())}\n")
        except OSError as error:
            logger.info("%s cannot be written: %s", self._path, error)


def _key(request: Mapping[str, Any]) -> str:
    parts = [request[name] for name in ("digest", "kind", "dims", "recipe")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
