# SPDX-License-Identifier: Apache-2.0
"""The tuning database: for every problem on one kind of GPU, what ran fastest.

One small JSON file per device kind, apart from the binaries. Readers take no lock;
a writer takes the file's, reads it again, merges and replaces it whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import threading
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import filelock

from .. import ir
from ..arch import GpuArch

logger = logging.getLogger(__name__)

SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tuned choice.

    ``choice`` is "kernel" or "xla". Times are µs for the whole region, preparation
    of its operands included, ours and XLA's measured alike; ``kernel_time_us`` is of
    the kernel alone. Errors are relative (2-norm) to a float32 reference. ``digest``
    names the kernel's artifact, ``sources`` and ``compiler`` what it was built from
    and with; with others the entry is void.
    """

    choice: str
    form: str = ""
    template: str = ""
    config: str = ""
    digest: str = ""
    sources: str = ""
    compiler: str = ""
    time_us: float | None = None
    xla_time_us: float | None = None
    kernel_time_us: float | None = None
    error: float | None = None
    xla_error: float | None = None
    candidates: int = 0
    versions: str = ""
    date: str = ""


_FIELDS = {field.name for field in dataclasses.fields(Entry)}
_NUMBERS = {"time_us", "xla_time_us", "kernel_time_us", "error", "xla_error"}


def device_key(arch: GpuArch) -> str:
    """What a tuning result depends on besides the problem; no driver version."""
    return f"{arch.gpu or arch.name} {arch.sm_count} SMs {arch.name}"


class Database:
    """The user's tuning results under ``root``; safe for threads and processes."""

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Any, dict[str, Entry]]] = {}
        self._unsaved: dict[Path, dict[str, Entry]] = {}

    def path(self, arch: GpuArch) -> Path:
        slug = re.sub(r"[^a-z0-9]+", "_", device_key(arch).lower()).strip("_")
        return self.root / f"{slug}.json"

    def get(self, arch: GpuArch, region: ir.Region) -> Entry | None:
        path = self.path(arch)
        with self._lock:
            unsaved = self._unsaved.get(path, {})
            return unsaved.get(region.text) or self._load(path).get(region.text)

    def put(self, arch: GpuArch, entries: Mapping[ir.Region, Entry]) -> None:
        """Merges ``entries``; where nothing can be written they live in memory."""
        if not entries:
            return
        path = self.path(arch)
        new = {region.text: entry for region, entry in entries.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(f"{path}.lock", timeout=60), self._lock:
                self._save(path, arch, {**self._load(path), **new})
        except (OSError, NotImplementedError) as error:  # no locks on this disk
            with self._lock:
                self._unsaved.setdefault(path, {}).update(new)
            warnings.warn(
                f"tuning results cannot be saved in {path.parent} ({error}); they last "
                "for this process. Set JAX_BOLT_CACHE_DIR to a writable directory.",
                stacklevel=2,
            )

    def _load(self, path: Path) -> dict[str, Entry]:
        try:
            status = path.stat()
        except OSError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if path not in self._read or self._read[path][0] != stamp:
            self._read[path] = (stamp, _parse(path))
        return self._read[path][1]

    def _save(self, path: Path, arch: GpuArch, entries: Mapping[str, Entry]) -> None:
        text = {key: dataclasses.asdict(entries[key]) for key in sorted(entries)}
        document = {"schema": SCHEMA, "device": device_key(arch), "entries": text}
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            with temporary.open("w") as file:
                json.dump(document, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def _parse(path: Path) -> dict[str, Entry]:
    """The file's entries; a damaged file or entry counts as absent."""
    try:
        document = json.loads(path.read_text())
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}")
        entries = dict(document["entries"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("ignoring the tuning file %s: %s", path, error)
        return {}
    parsed = {}
    for key, value in entries.items():
        entry = _entry(value)
        if entry is not None:
            parsed[key] = entry
    return parsed


def _entry(value: Any) -> Entry | None:
    """An entry of a file, or None where a field is missing or of the wrong type."""
    if not isinstance(value, dict) or value.get("choice") not in ("kernel", "xla"):
        return None
    fields = {k: v for k, v in value.items() if k in _FIELDS}
    for name, field in fields.items():
        if name in _NUMBERS:
            good = field is None or isinstance(field, int | float)
        else:
            good = isinstance(field, int if name == "candidates" else str)
        if not good:
            return None
    return Entry(**fields)
