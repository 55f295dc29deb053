# SPDX-License-Identifier: Apache-2.0
"""Faults that cannot be had in a test's own process: kills, a full disk, another user.

A program, ``python faults.py NAME DIRECTORY [ARGUMENT]``, for unit/test_faults.py. It
fails, with a traceback, where something damaged was seen. It has one thread, so that it
can fork, and a build takes milliseconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# JAX warns of every fork; the children use none of it.
warnings.filterwarnings("ignore", message=r"os\.fork\(\)")

from fake_nvcc import FakeNvcc  # noqa: E402

from jax_bolt._src import arch, ir  # noqa: E402
from jax_bolt._src.jit import directories, store  # noqa: E402
from jax_bolt._src.tune import db  # noqa: E402

ARCH = arch.from_name("sm_90a")
SOURCE = "int x;" + 2000 * "/"
ROUNDS = 240


def region(n: int) -> ir.Region:
    problem = ir.GemmProblem(m=8, n=n, k=8, dtype="bf16")
    epilogue = ir.Epilogue(ops=(ir.Op("acc"),), result=0, out_dtype="bf16")
    return ir.Region(problem=problem, epilogue=epilogue)


def tuned(n: int) -> db.Entry:
    return db.Entry(choice="xla", xla_time_us=float(n))


# --- Killed


def lines_of(work: Callable[[], Any], act: Callable[[int], None]) -> None:
    """Runs ``work``; ``act`` is told the number of every line that is about to run.

    Lines of ours and of what touches files for us, in all threads.
    """
    places = ("jax_bolt/_src", "filelock", "shutil.py", "pathlib", "tempfile.py")
    count = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        if not any(place in frame.f_code.co_filename for place in places):
            return None
        if event == "line":
            count += 1
            act(count)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
        threading.settrace(None)  # type: ignore[arg-type]


def fork(work: Callable[[], Any]) -> int:
    """A child that ends with 0 when ``work`` is done; its process id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


class Killer:
    """Runs ``work`` in children, each of which is killed somewhere in it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        work()  # for what is done once only, imports say
        start = time.monotonic()
        work()
        self.seconds = time.monotonic() - start
        counts = [0]
        lines_of(work, counts.append)
        self.lines = counts[-1]
        self.kills = 0
        self._random = random.Random(0)

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def run(self, work: Callable[[], Any]) -> None:
        last = self._random.randint(1, self.lines * 5 // 4)  # some live

        def at_a_line(count: int) -> None:
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

        if self.chance(0.7):  # before one of its lines
            child = fork(lambda: lines_of(work, at_a_line))
        else:  # in the middle of one, the compiler's run perhaps
            child = fork(work)
            time.sleep(self._random.uniform(0, 1.25 * self.seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        self.kills += os.WIFSIGNALED(status)


def killed_builders(place: Path) -> None:
    """Builders of one kernel are killed, over nothing, or over a damaged entry."""
    kernels, fake = store.Store(place / "cache" / "kernels"), FakeNvcc(place / "cuda")

    def build() -> Path:
        return fake.build(kernels, SOURCE)

    def rebuild() -> None:
        directories.discard(kernels.root / store.digest(fake.toolchain(), SOURCE, ARCH))
        build()

    killer, built = Killer(rebuild), 0
    entry = build().parent
    for _ in range(ROUNDS):
        damaged = b""
        if entry.exists() and killer.chance(0.5):
            damaged = b"damaged by round"
            (entry / "kernel.so").write_bytes(damaged)
        elif entry.exists():
            directories.discard(entry)
        killer.run(build)
        visible = [path for path in entry.parent.iterdir() if path.name[0] != "."]
        assert visible in ([], [entry]), visible
        assert [e.path for e in kernels.entries()] == visible
        found = kernels.find(entry.name)
        if found is not None:
            built += 1
            assert found.read_text() == SOURCE
        elif visible:
            # What is there is the damaged one of before, to its last byte.
            assert (entry / "kernel.so").read_bytes() == damaged != b""
            assert len(list(entry.iterdir())) >= 4
    assert build().read_text() == SOURCE
    kernels.clear()
    left = [p for p in entry.parent.iterdir() if not p.name.startswith(".lock-")]
    assert not left, left
    print(killer.kills, "killed,", built, "had built,", killer.lines, "lines")


def killed_writers(place: Path) -> None:
    """Writers of tuning results are killed; what was saved is never lost or damaged."""

    def rewrite() -> None:
        db.Database(place).path(ARCH).unlink(missing_ok=True)
        put(place, 1)

    killer, known = Killer(rewrite), {1}
    for n in range(2, ROUNDS):
        killer.run(lambda n=n: put(place, n))
        database = db.Database(place)
        found = {i for i in range(1, n + 1) if database.get(ARCH, region(i))}
        assert known <= found <= known | {n}, (known, found)
        assert all(database.get(ARCH, region(i)) == tuned(i) for i in found)
        known = found
    put(place, ROUNDS)
    assert not list(place.glob("*.tmp")), "what the dead left is removed"
    print(killer.kills, "killed,", len(known), "saved,", killer.lines, "lines")


def put(place: Path, n: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        db.Database(place).put(ARCH, {region(n): tuned(n)})


# --- Together


def merging_writers(place: Path) -> None:
    """Several processes write to one tuning file at once; nothing is lost."""
    count, each = 4, 12
    path = db.Database(place).path(ARCH)
    go = place / "go"

    def write(first: int) -> None:
        while not go.exists():
            time.sleep(0.001)
        for n in range(first, count * each + 1, count):
            if n % 2:
                put(place, n)
            else:
                entries = {region(n).text: tuned(n)}
                results = db.Results(device=db.device_key(ARCH), entries=entries)
                db.Database(place).merge(results, lambda entry: True)

    children = [fork(lambda i=i: write(i)) for i in range(1, count + 1)]
    go.touch()
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    saved = db.parse(path.read_bytes()).entries
    assert saved == {region(n).text: tuned(n) for n in range(1, count * each + 1)}


# --- A full disk


class Disk:
    """From the ``n``-th operation below ``root`` that needs room on, there is none."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.left: int | None = None
        sys.addaudithook(self._hook)
        real, os.fsync = os.fsync, lambda descriptor: self._fsync(descriptor, real)

    @contextlib.contextmanager
    def full_after(self, n: int) -> Iterator[None]:
        self.left = n
        try:
            yield
        finally:
            self.left = None

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        if self.left is None or not (writes or event in ("os.mkdir", "os.rename")):
            return
        # A directory that is there already needs no room.
        if event == "os.mkdir" and Path(arguments[0]).exists():
            return
        self._need(arguments[1 if event == "os.rename" else 0])

    def _fsync(self, descriptor: int, real: Callable[[int], None]) -> None:
        # Where many file systems say first that a write found no room.
        if self.left is not None:
            self._need(Path(f"/proc/self/fd/{descriptor}").readlink())
        real(descriptor)

    def _need(self, path: Any) -> None:
        # Removing needs none, and entries are renamed out of sight to be removed.
        if not str(path).startswith(self.root) or ".discarded-" in str(path):
            return
        assert self.left is not None
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


class Told(logging.Handler):
    """What the user was told."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("jax_bolt").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def full_disk_build(place: Path) -> None:
    """The disk is full at every point of a build, over nothing and over damage."""
    kernels, fake = store.Store(place / "cache" / "kernels"), FakeNvcc(place / "cuda")
    disk, told = Disk(kernels.root), Told()

    def build() -> Any:
        (result,) = kernels.build(fake.toolchain(), [SOURCE], ARCH).values()
        return result

    entry = build().parent
    n = 0
    for n in range(100):
        directories.temporary.cache_clear()
        directories.warn_temporary.cache_clear()
        told.messages.clear()
        if n % 2 and entry.exists():
            (entry / "kernel.so").write_bytes(b"damaged")
        else:
            directories.discard(entry)
        with disk.full_after(n):
            result = build()
            full = disk.left is not None and disk.left < 0
            again = build()
        # The kernel is there, in this process, and one warning says what to do.
        assert isinstance(result, Path) and result.read_text() == SOURCE, result
        assert again == result
        assert len(told.messages) == full, told.messages
        visible = [path for path in entry.parent.iterdir() if path.name[0] != "."]
        assert visible in ([], [entry])
        assert not list(entry.parent.glob(".build-*"))
        if not full:
            break
        # In the cache after all, where only its last flush failed.
        assert result.parents[1] in (
            directories.temporary(),
            *(p.parent for p in visible),
        )
        (message,) = told.messages
        assert "No space left on device" in message, message
        assert "JAX_BOLT_CACHE_DIR" in message
        # Room again: as if nothing had been.
        directories.temporary.cache_clear()
        assert build().parent == entry
    assert n > 8, "the disk was never full"
    print(n, "places")


def full_disk_everywhere(place: Path) -> None:
    """No room in the cache, and none for temporary files: one clear error."""
    kernels, fake = store.Store(place / "cache" / "kernels"), FakeNvcc(place / "cuda")
    kernels.root.mkdir(parents=True, mode=0o700)
    tempfile.tempdir = str(place)  # by itself it would look for one with room
    disk, told = Disk(place), Told()
    for n in (0, 1, 3):
        directories.temporary.cache_clear()
        with disk.full_after(n):
            (result,) = kernels.build(fake.toolchain(), [SOURCE], ARCH).values()
        assert isinstance(result, store.CompileError), result
        message = (
            f"a kernel cannot be stored in {kernels.root}: No space left on device"
        )
        assert str(result).startswith(message), result
        assert "make room there" in str(result)
    assert not told.messages
    assert kernels.entries() == []
    (result,) = kernels.build(fake.toolchain(), [SOURCE], ARCH).values()
    assert isinstance(result, Path), "it is not remembered"


def full_disk_put(place: Path) -> None:
    """The disk is full at every point of saving a tuning result."""
    disk = Disk(place / "tuned")
    database = db.Database(place / "tuned")
    database.put(ARCH, {region(1): tuned(1)})
    before = database.path(ARCH).read_bytes()
    n = 0
    for n in range(50):
        database = db.Database(place / "tuned")
        with (
            disk.full_after(n),
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always")
            for i in (2, 3):
                database.put(ARCH, {region(i): tuned(i)})
            full = disk.left is not None and disk.left < 0
        assert [database.get(ARCH, region(i)) for i in (1, 2, 3)] == [
            *(tuned(1), tuned(2), tuned(3))
        ]
        assert len(caught) == full, [str(w.message) for w in caught]
        assert not list((place / "tuned").glob("*.tmp"))
        if not full:
            break
        message = str(caught[0].message)
        assert "(No space left on device)" in message, message
        assert "JAX_BOLT_CACHE_DIR" in message
        saved = db.parse(database.path(ARCH).read_bytes()).entries
        assert set(saved) >= {region(1).text}
        database.path(ARCH).write_bytes(before)
    assert n > 3, "the disk was never full"
    print(n, "places")


# --- Read-only


def read_only(place: Path, user: str = "") -> None:
    """As ``user``, where it is given: root may write everywhere."""
    kernels, fake = store.Store(place / "cache" / "kernels"), FakeNvcc(place / "cuda")
    database = db.Database(place / "cache" / "tuned")
    if user:
        for path in (place, *place.rglob("*")):
            os.chown(path, int(user), int(user))
        os.setgid(int(user))
        os.setuid(int(user))

    def build(source: str) -> Any:
        (result,) = kernels.build(fake.toolchain(), [source], ARCH).values()
        return result

    old = build("int old;")
    database.put(ARCH, {region(1): tuned(1)})
    for path in (place / "cache", *(place / "cache").rglob("*")):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = sorted(place.joinpath("cache").rglob("*"))
    told = Told()
    try:
        assert build("int old;") == old, "what is there is used"
        new, other = build("int new;"), build("int other;")
        assert new.read_text() == "int new;" and other.read_text() == "int other;"
        assert build("int new;") == new
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for n in (2, 3):
                database.put(ARCH, {region(n): tuned(n)})
        assert [database.get(ARCH, region(n)) for n in (1, 2, 3)] == [
            *(tuned(1), tuned(2), tuned(3))
        ]
        assert len(caught) == 1, "one warning for tuning results"
        assert len(told.messages) == 1, "one for kernels"
        assert "cannot be written" in told.messages[0]
        assert sorted(place.joinpath("cache").rglob("*")) == before
    finally:
        for path in (place / "cache", *(place / "cache").rglob("*")):
            path.chmod(0o700)


if __name__ == "__main__":
    name, *rest = sys.argv[1:]
    globals()[name](Path(rest[0]), *rest[1:])
