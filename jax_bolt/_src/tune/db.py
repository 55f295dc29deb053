# SPDX-License-Identifier: Apache-2.0
"""The tuning database: for every problem on one kind of GPU, what ran fastest.

One small JSON file per device kind, apart from the binaries. Readers take no lock;
a writer takes the file's, reads it again, merges and replaces it whole.

What was measured here replaces what was known (``put``). What was measured elsewhere
is merged: of two results for one problem ``better`` says which is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import logging
import math
import os
import re
import threading
import uuid
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import filelock

from .. import arch as arch_
from .. import ir
from ..arch import GpuArch
from ..errors import CacheError

logger = logging.getLogger(__name__)

SCHEMA = 1

# A result that XLA itself gets this wrong was not described right by the matcher.
SANE_ERROR: dict[ir.DType, float] = {"bf16": 3e-2, "f16": 1e-2, "f32": 1e-2}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A tuned choice.

    ``choice`` is "kernel" or "xla"; of a chain "kernel" or "apart", its regions each
    for itself. Times are µs for the whole region, preparation of its operands
    included, ours and XLA's measured alike; ``kernel_time_us`` is of the kernel alone,
    and ``spread`` the relative distance of that one's quartiles. ``apart_time_us`` is
    of a chain's regions as they would run otherwise, one after the other.
    ``notes`` name candidates that crashed or did not end. Errors are relative (2-norm)
    to a float32 reference. ``digest`` names the kernel's artifact, ``sources`` and
    ``compiler`` what it was built from and with; with others the entry is void
    until ``tune.adopt`` has taken it over.
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
    apart_time_us: float | None = None
    spread: float | None = None
    error: float | None = None
    xla_error: float | None = None
    candidates: int = 0
    notes: str = ""
    versions: str = ""
    date: str = ""


_FIELDS = {field.name for field in dataclasses.fields(Entry)}
_NUMBERS = {
    *("time_us", "xla_time_us", "kernel_time_us", "apart_time_us"),
    *("spread", "error", "xla_error"),
}
_CHOICES = ("kernel", "xla", "apart")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A tuning file: ``entries`` by region text, and by what and when it was written.

    ``versions`` and ``date`` are "" where the file does not say.
    """

    device: str
    entries: Mapping[str, Entry]
    versions: str = ""
    date: str = ""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """How many entries were new, replaced one, were no better, or are unverified."""

    added: int = 0
    replaced: int = 0
    kept: int = 0
    unverified: int = 0


def device_key(arch: GpuArch) -> str:
    """What a tuning result depends on besides the problem; no driver version."""
    return f"{arch.gpu or arch.name} {arch.sm_count} SMs {arch.name}"


def arch_of(device: str) -> GpuArch:
    """The architecture of a ``device_key``.

    Raises UnsupportedError where it is unknown, ValueError where it is no such key.
    """
    parts = re.fullmatch(r"(.+) (\d+) SMs sm_(\d+)(\d)a?", device)
    if parts is None:
        raise ValueError(f"{device!r} names no kind of GPU")
    gpu, sm_count, major, minor = parts.groups()
    return arch_.of_device(f"{major}.{minor}", gpu, int(sm_count))


def file_name(device: str) -> str:
    """The name of the tuning file of ``device``, a ``device_key``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


def is_verified(entry: Entry) -> bool:
    """Whether a kernel was timed and found accurate; nothing is asked of others."""
    if entry.choice != "kernel":
        return True
    if not entry.time_us or entry.error is None or entry.xla_error is None:
        return False
    # Of the operands' dtype an entry says nothing.
    return is_accurate(entry.error, entry.xla_error, max(SANE_ERROR.values()))


def is_accurate(error: float, xla_error: float, sane: float) -> bool:
    """Contract 1: at most 1.25 times XLA's own error; and that one must be sane."""
    return xla_error <= sane and error <= 1.25 * xla_error + 1e-6


def better(new: Entry, old: Entry, holds: Callable[[Entry], bool]) -> bool:
    """Whether ``new``, from elsewhere, is to replace ``old``.

    ``holds`` says whether an entry's kernel is made from what this machine has. An
    entry that holds replaces one that does not. Times are compared between entries
    that both hold, since those of other versions say nothing about these.
    """
    if not holds(new):
        return False
    return not holds(old) or _time_us(new) < _time_us(old)


def _time_us(entry: Entry) -> float:
    """Of the region, by what was chosen."""
    time = entry.time_us if entry.choice == "kernel" else rival_us(entry)
    return time or math.inf


def rival_us(entry: Entry) -> float | None:
    """Of what a kernel, or a chain's, was compared with."""
    times = (entry.xla_time_us, entry.apart_time_us)
    return min((t for t in times if t is not None), default=None)


class Database:
    """The user's tuning results under ``root``; safe for threads and processes."""

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()
        self._read: dict[Path, tuple[Any, dict[str, Entry]]] = {}
        self._unsaved: dict[Path, dict[str, Entry]] = {}
        self._warned = False

    def path(self, arch: GpuArch) -> Path:
        return self.root / file_name(device_key(arch))

    def get(self, arch: GpuArch, region: ir.Work) -> Entry | None:
        path = self.path(arch)
        with self._lock:
            unsaved = self._unsaved.get(path, {})
            return unsaved.get(region.text) or self._load(path).get(region.text)

    def put(self, arch: GpuArch, entries: Mapping[ir.Work, Entry]) -> None:
        """Saves what was measured; where nothing can be written it lives in memory."""
        if not entries:
            return
        new = {region.text: entry for region, entry in entries.items()}
        try:
            self._update(device_key(arch), lambda old: {**old, **new})
        except (OSError, NotImplementedError) as error:  # no locks on this disk
            with self._lock:
                self._unsaved.setdefault(self.path(arch), {}).update(new)
                warned, self._warned = self._warned, True
            if not warned:
                warnings.warn(
                    f"{self._unsavable(error)}; they last for this process. "
                    "Set JAX_BOLT_CACHE_DIR to a writable directory.",
                    stacklevel=2,
                )

    def merge(self, results: Results, holds: Callable[[Entry], bool]) -> Merged:
        """Saves what is new or ``better``, as ``holds``; no unverified kernel.

        Raises CacheError where nothing can be written.
        """
        counts = dict.fromkeys(("added", "replaced", "kept", "unverified"), 0)

        def change(old: Mapping[str, Entry]) -> dict[str, Entry]:
            merged = dict(old)
            for key, entry in results.entries.items():
                known = old.get(key)
                if not is_verified(entry):
                    outcome = "unverified"
                elif known is not None and not better(entry, known, holds):
                    outcome = "kept"
                else:
                    merged[key] = entry
                    outcome = "added" if known is None else "replaced"
                counts[outcome] += 1
            return merged

        try:
            self._update(results.device, change)
        except (OSError, NotImplementedError) as error:
            raise CacheError(
                f"{self._unsavable(error)}: make room there, or set JAX_BOLT_CACHE_DIR "
                "to a writable directory"
            ) from error
        return Merged(**counts)

    def all(self) -> list[Results]:
        """Every tuning file that can be read, by device."""
        found = [_read(path) for path in sorted(self.root.glob("*.json"))]
        return [results for results in found if results is not None]

    def _unsavable(self, error: Exception) -> str:
        # Not str(error): it may hold a name that differs every time.
        reason = getattr(error, "strerror", None) or error
        return f"tuning results cannot be saved in {self.root} ({reason})"

    def _update(
        self, device: str, change: Callable[[Mapping[str, Entry]], dict[str, Entry]]
    ) -> None:
        """Replaces the entries of a device by ``change`` of them."""
        path = self.root / file_name(device)
        self.root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock", timeout=60), self._lock:
            # Whoever wrote these is dead: a writer holds the lock.
            for abandoned in self.root.glob(f"{path.stem}.*.tmp"):
                abandoned.unlink(missing_ok=True)
            if path.exists():  # one that cannot be read is not an empty one
                path.open("rb").close()
            old = self._load(path)
            new = change(old)
            if new != old:
                _write(path, text(device, new).encode())

    def _load(self, path: Path) -> dict[str, Entry]:
        try:
            status = path.stat()
        except OSError:
            return {}
        stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
        if path not in self._read or self._read[path][0] != stamp:
            results = _read(path)
            self._read[path] = (stamp, dict(results.entries) if results else {})
        return self._read[path][1]


def versions() -> str:
    """Of the libraries that a result depends on."""
    packages = ("jax_bolt", "jax", "jaxlib")
    return ", ".join(f"{name} {_version(name)}" for name in packages)


def text(device: str, entries: Mapping[str, Entry]) -> str:
    """The tuning file of ``device``, in order, so that equal results look equal."""
    document = {
        "schema": SCHEMA,
        "device": device,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "entries": {key: dataclasses.asdict(entries[key]) for key in sorted(entries)},
    }
    return json.dumps(document, indent=1) + "\n"


def _write(path: Path, content: bytes) -> None:
    """Replaces ``path`` whole: a reader, or a crash, sees the old or the new one."""
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def _read(path: Path) -> Results | None:
    """A tuning file, without what is damaged in it; None where all is."""
    try:
        return parse(path.read_bytes())
    except (OSError, ValueError) as error:
        logger.warning("ignoring the tuning file %s: %s", path, error)
        return None


def parse(content: bytes) -> Results:
    """The text of a tuning file; damaged entries are passed over.

    Raises ValueError where it is none.
    """
    try:
        document = json.loads(content)
        if document["schema"] != SCHEMA:
            raise ValueError(f"schema {document['schema']!r}")
        found = {key: _entry(value) for key, value in document["entries"].items()}
        labels = {k: document.get(k, "") for k in ("device", "versions", "date")}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    if not all(isinstance(label, str) for label in labels.values()):
        raise ValueError("it does not say for which device")
    entries = {key: entry for key, entry in found.items() if entry is not None}
    return Results(entries=entries, **labels)


def _entry(value: Any) -> Entry | None:
    """An entry of a file, or None where a field is missing or of the wrong type."""
    if not isinstance(value, dict) or value.get("choice") not in _CHOICES:
        return None
    fields = {k: v for k, v in value.items() if k in _FIELDS}
    for name, field in fields.items():
        if name in _NUMBERS:
            good = field is None or _is_number(field)
        elif name == "candidates":
            good = type(field) is int
        else:
            good = isinstance(field, str)
        if not good:
            return None
    return Entry(**fields)


def _is_number(value: Any) -> bool:
    # JSON's NaN and Infinity, and true, are numbers to Python.
    return type(value) in (int, float) and 0 <= value < 1e12


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
