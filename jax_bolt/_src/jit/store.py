# SPDX-License-Identifier: Apache-2.0
"""The kernel store: content-addressed, shared by any number of processes.

An entry is a directory named by its digest, holding the source, the binary, the
compiler's log and a manifest with the binary's checksum. It is built in a hidden
directory beside it, fsynced and renamed whole, so a reader sees all of it or none and
takes no lock. Builders of one digest take that digest's lock and look again.

An entry that is damaged, stale, not the user's own or writable by others is as good
as none: ``find`` passes over it with a debug message, and ``build`` replaces it.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import logging
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

import filelock

from ..arch import GpuArch
from ..errors import CacheError, CompileError
from . import compiler, directories, manifest
from . import toolchain as toolchains
from .toolchain import Toolchain

logger = logging.getLogger(__name__)

MAX_BYTES = 4 << 30

_USED = "used"  # its mtime is when a process last asked for the entry
_IN_USE_S = 600.0  # an entry asked for this recently may be about to be loaded
_ABANDONED_S = 86400.0  # no build takes this long

Result: TypeAlias = Path | CompileError

_counts: collections.Counter[str] = collections.Counter()
_counts_lock = threading.Lock()
# What failed once would fail again, after another minute of waiting.
_failures: dict[str, CompileError] = {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A stored kernel: bytes on disk, and when it was last asked for (Unix time)."""

    path: Path
    size: int
    used: float


def count(what: str) -> None:
    """Adds one to a counter of ``stats``."""
    with _counts_lock:
        _counts[what] += 1


def stats() -> dict[str, int]:
    """What this process did so far.

    ``found``: answered from disk; ``compiled``: built here; ``failed``: did not
    compile; ``discarded``: damaged entries removed; ``loaded``: opened for launching;
    ``tuned``: regions searched; ``stage1``: candidates timed by base programs;
    ``stage2``: candidates timed themselves; ``restarts``: of the process that times;
    ``adopted``: results of other versions taken over.
    """
    names = (
        *("found", "compiled", "failed", "discarded", "loaded"),
        *("tuned", "stage1", "stage2", "restarts", "adopted"),
    )
    with _counts_lock:
        return {name: _counts[name] for name in names}


def parts(toolchain: Toolchain, source: str, arch: GpuArch) -> dict[str, str]:
    """Everything a binary depends on. The source holds family, epilogue and config."""
    return {
        "schema": str(manifest.SCHEMA),
        "abi": toolchain.abi_version,
        "arch": arch.name,
        "nvcc": toolchain.version,
        "flags": json.dumps(compiler.flags(arch, compiler.artifact(source))),
        "headers": toolchains.included_digest(toolchain.own_include, source),
        "cutlass": toolchain.cutlass_version,
        "source": source,
    }


def digest(toolchain: Toolchain, source: str, arch: GpuArch) -> str:
    """The name of the entry: 64 hex digits over the labelled ``parts``."""
    return manifest.digest_of(parts(toolchain, source, arch))


@dataclasses.dataclass(frozen=True, slots=True)
class Store:
    """The entries below ``root``, kept under ``max_bytes`` together.

    All methods raise CacheError when other users could write below ``root``.
    """

    root: Path
    max_bytes: int = MAX_BYTES

    def digest(self, toolchain: Toolchain, source: str, arch: GpuArch) -> str:
        return digest(toolchain, source, arch)

    def find(self, digest: str) -> Path | None:
        """The verified binary of ``digest``, or None; takes no lock."""
        if not manifest.is_digest(digest):  # it may come from a file, and be a path
            return None
        for root in self._readable():
            try:
                binary = manifest.verified(root / digest, digest)
            except FileNotFoundError:
                continue
            except manifest.UNSOUND as error:
                logger.debug("passing over %s: %s", root / digest, error)
                continue
            _touch(root / digest / _USED)
            return binary
        return None

    def build(
        self,
        toolchain: Toolchain,
        sources: Iterable[str],
        arch: GpuArch,
        jobs: int | None = None,
        on_done: Callable[[str, Result], None] | None = None,
    ) -> dict[str, Result]:
        """The binary of every source, or why it has none; compiles what is missing.

        ``jobs`` compilers run at once (default: one per CPU). ``on_done`` is called
        in this thread as each is known. A failure is remembered by the process.
        """
        wanted = {digest(toolchain, source, arch): source for source in sources}
        results: dict[str, Result] = {}

        def done(digest: str, result: Result) -> None:
            results[digest] = result
            if on_done is not None:
                on_done(digest, result)

        missing: dict[str, str] = {}
        for key, source in wanted.items():
            if known := self.find(key) or _failures.get(key):
                if isinstance(known, Path):
                    count("found")
                done(key, known)
            else:
                missing[key] = source
        if missing:
            # Closed at once when on_done raises, which ends the other compilers.
            with contextlib.closing(
                self._build(toolchain, missing, arch, jobs)
            ) as built:
                for key, result in built:
                    done(key, result)
            self.prune()
        return {key: results[key] for key in wanted}

    def add(self, digest: str, files: Mapping[str, bytes]) -> bool:
        """Takes an entry that was built elsewhere; False where there is a sound one.

        Raises ValueError where the files are not that entry's, CacheError where they
        cannot be stored.
        """
        manifest.check(digest, files)
        try:
            reason = directories.make(self.root)
            if reason is None:
                return self._add(digest, files)
        except (OSError, NotImplementedError) as error:
            reason = directories.reason(error)
        raise CacheError(
            f"kernels cannot be stored in {self.root}: {reason}; make room there, or "
            "set JAX_BOLT_CACHE_DIR to another directory"
        )

    def _add(self, digest: str, files: Mapping[str, bytes]) -> bool:
        with self._locked(self.root, digest) as found:
            if found is None:
                with directories.aside(self.root) as aside:
                    for name, content in files.items():
                        (aside / name).write_bytes(content)
                    _publish(aside, self.root / digest)
            return found is None

    def check(self) -> None:
        """Does nothing but what all methods do: raise CacheError, or not."""
        for _ in self._readable():
            pass

    def entries(self) -> list[Entry]:
        """Every entry, sound or not, least recently used first."""
        found = []
        for root in self._readable():
            for path in root.iterdir():
                if manifest.is_digest(path.name):
                    found.append(_entry(path))
        return sorted(found, key=lambda entry: entry.used)

    def prune(self, max_bytes: int | None = None) -> int:
        """Removes least recently used entries until the rest fit; bytes removed.

        What was asked for in the last ten minutes stays: someone may be loading it.
        """
        bound = self.max_bytes if max_bytes is None else max_bytes
        entries = self.entries()
        total = excess = sum(entry.size for entry in entries)
        for entry in entries:
            if excess <= bound or entry.used > time.time() - _IN_USE_S:
                break
            directories.discard(entry.path)
            excess -= entry.size
        self._remove_hidden(older_than_s=_ABANDONED_S)
        return total - excess

    def clear(self) -> None:
        """Removes every entry, and forgets what failed."""
        for entry in self.entries():
            directories.discard(entry.path)
        self._remove_hidden(older_than_s=0.0)
        for root in self._readable():  # what warm.start and warm.background note
            for note in root.glob(".warm/*-*"):
                note.unlink(missing_ok=True)
        _failures.clear()

    def _readable(self) -> Iterator[Path]:
        if self.root.is_dir():
            directories.require_private(self.root)
            yield self.root
        if directories.has_temporary():
            yield directories.temporary()

    def _remove_hidden(self, older_than_s: float) -> None:
        """Removes what killed builders left behind."""
        for root in self._readable():
            for path in root.glob(".*-*"):
                try:
                    age = time.time() - path.lstat().st_mtime
                except FileNotFoundError:
                    continue
                if path.is_dir() and age >= older_than_s:
                    shutil.rmtree(path, ignore_errors=True)

    def _build(
        self,
        toolchain: Toolchain,
        missing: dict[str, str],
        arch: GpuArch,
        jobs: int | None,
    ) -> Generator[tuple[str, Result]]:
        try:
            compiler.check(toolchain, arch)
        except CompileError as error:
            yield from ((key, error) for key in missing)
            return
        root = directories.writable(self.root)
        stop = threading.Event()

        def build_one(key: str) -> Result:
            return self._build_one(root, key, toolchain, missing[key], arch, stop)

        jobs = jobs or math.ceil(compiler.cpus())
        yield from _parallel(build_one, list(missing), jobs, stop)

    def _build_one(
        self,
        root: Path,
        key: str,
        toolchain: Toolchain,
        source: str,
        arch: GpuArch,
        stop: threading.Event,
    ) -> Result:
        problem: str | None = None
        for place in (lambda: root, directories.temporary):
            try:
                with self._locked(place(), key) as found:
                    binary = found or _compile(
                        place(), key, toolchain, source, arch, stop
                    )
                count("found" if found else "compiled")
            except CompileError as error:
                if not stop.is_set():
                    _failures[key] = error
                count("failed")
                return error
            except (OSError, NotImplementedError) as error:  # a full disk; no locks
                problem = problem or directories.reason(error)
            else:
                if problem is not None:
                    directories.warn_temporary(root, problem)
                return binary
        # Nothing is wrong with the kernel: a later call may try again.
        count("failed")
        return CompileError(
            f"a kernel cannot be stored in {root}: {problem}; make room there, or "
            "set JAX_BOLT_CACHE_DIR to another directory"
        )

    @contextlib.contextmanager
    def _locked(self, root: Path, key: str) -> Iterator[Path | None]:
        """Alone in building ``key``; what was there, or whoever came first built."""
        path = root / f".lock-{key}"
        with filelock.FileLock(path, timeout=compiler.TIMEOUT_S):
            yield self.find(key)


def _compile(
    root: Path,
    key: str,
    toolchain: Toolchain,
    source: str,
    arch: GpuArch,
    stop: threading.Event,
) -> Path:
    labelled = parts(toolchain, source, arch)
    for label, value in labelled.items():
        logger.debug("building %s: %s = %s", key, label, value)
    with directories.aside(root) as aside:
        start = time.monotonic()
        binary = compiler.compile(toolchain, source, arch, aside, stop=stop)
        text = manifest.text(key, binary, labelled, time.monotonic() - start)
        (aside / manifest.MANIFEST).write_text(text)
        _publish(aside, root / key)
    return root / key / binary.name


def _publish(aside: Path, entry: Path) -> None:
    # What was there find() has just refused.
    if directories.publish(aside, entry):
        count("discarded")


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        logger.debug("cannot note the use of %s: %s", path.parent, error)


def _entry(path: Path) -> Entry:
    size = used = 0.0
    # Being removed by another process, or not ours: nothing to add.
    with contextlib.suppress(OSError):
        status = path.lstat()
        size, used = status.st_size, status.st_mtime
        if path.is_dir() and not path.is_symlink():
            size = sum(file.lstat().st_size for file in path.iterdir())
            used = (path / _USED).stat().st_mtime
    return Entry(path=path, size=int(size), used=used)


def _parallel(
    build_one: Callable[[str], Result],
    keys: list[str],
    jobs: int,
    stop: threading.Event,
) -> Generator[tuple[str, Result]]:
    """Runs ``build_one`` in ``jobs`` threads; yields as each ends.

    Daemon threads, not an executor, whose threads a program waits for at its exit.
    """
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[str, Result | BaseException]]
    finished = queue.SimpleQueue()
    for key in keys:
        todo.put(key)

    def work() -> None:
        while not stop.is_set():
            try:
                key = todo.get_nowait()
            except queue.Empty:
                return
            try:
                finished.put((key, build_one(key)))
            except BaseException as error:
                finished.put((key, error))

    try:
        for i in range(min(jobs, len(keys))):
            threading.Thread(target=work, name=f"jax_bolt-{i}", daemon=True).start()
        for _ in keys:
            key, result = finished.get()
            if not isinstance(result, Path | CompileError):
                raise result
            yield key, result
    finally:
        # Interrupted: the compilers still running have nobody to work for.
        stop.set()
