# SPDX-License-Identifier: Apache-2.0
"""Directories that only the user can write, for code that will be loaded."""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import CacheError

logger = logging.getLogger(__name__)


def reason(error: Exception) -> str:
    """What went wrong, without a path, which would differ every time."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def is_private(status: os.stat_result) -> bool:
    """Whether a directory is the user's own and nobody else can write in it."""
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def require_own_file(path: Path, directory: os.stat_result) -> None:
    """Raises ValueError unless ``path`` is a file that only the user can change.

    ``directory`` is its directory's status: where others cannot enter that, what they
    may do with the file does not matter, and a umask of 002 is common.
    """
    status = path.lstat()
    enter, write = stat.S_IXGRP | stat.S_IXOTH, stat.S_IWGRP | stat.S_IWOTH
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise ValueError(f"{path.name} is not a file of its user's own")
    if status.st_mode & write and directory.st_mode & enter:
        raise ValueError(f"other users can write to {path.name}")


def require_private(path: Path) -> None:
    """Raises CacheError, with the command that mends it, unless ``path`` is private.

    Raises OSError when ``path`` cannot be looked at.
    """
    status = path.stat()
    if is_private(status):
        return
    if not stat.S_ISDIR(status.st_mode):
        raise CacheError(f"the cache {path} is not a directory: remove it")
    if status.st_uid != os.geteuid():
        raise CacheError(
            f"the cache {path} belongs to user {status.st_uid}, not to you: run "
            f"`chown -R {os.geteuid()} '{path}'`, or choose another JAX_BOLT_CACHE_DIR"
        )
    raise CacheError(
        f"other users can write to the cache {path}: run `chmod go-w '{path}'`"
    )


def writable(root: Path) -> Path:
    """``root``, made if needed, or this process's temporary one where it is read-only.

    Warns once when it is the temporary one; raises CacheError as require_private.
    """
    problem = make(root)
    if problem is None:
        return root
    instead = temporary()
    warn_temporary(root, problem)
    return instead


def make(root: Path) -> str | None:
    """Makes ``root`` if needed; why it cannot be written, or None where it can.

    Raises CacheError as require_private.
    """
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        require_private(root)
    except FileExistsError:
        raise CacheError(f"the cache {root} is not a directory: remove it") from None
    except OSError as error:
        return reason(error)
    return None if os.access(root, os.W_OK | os.X_OK) else "it is read-only"


@functools.cache
def warn_temporary(root: Path, problem: str) -> None:
    """Says, once, that kernels go to ``temporary()`` instead of ``root``."""
    logger.warning(
        "the cache %s cannot be written (%s): kernels of this process go to %s and "
        "are lost when it ends; set JAX_BOLT_CACHE_DIR to a writable directory",
        root,
        problem,
        temporary(),
    )


@functools.cache
def temporary() -> Path:
    """A private directory that lives as long as this process."""
    path = Path(tempfile.mkdtemp(prefix="jax_bolt-"))
    owner = os.getpid()
    # A forked child must not take its parent's kernels away.
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(path, True))
    return path


def has_temporary() -> bool:
    """Whether ``temporary`` was needed so far."""
    return temporary.cache_info().currsize > 0


def discard(path: Path) -> None:
    """Removes an entry whole: a reader sees all of it or nothing. Never raises."""
    # Renaming inside one directory works even for an entry someone else owns.
    hidden = path.with_name(f".discarded-{uuid.uuid4().hex}")
    try:
        path.rename(hidden)
    except OSError as error:
        logger.debug("cannot discard %s: %s", path, error)
        return
    if hidden.is_dir() and not hidden.is_symlink():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        hidden.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(root: Path) -> Iterator[Path]:
    """A hidden directory in ``root`` to make an entry in; removed at the end."""
    path = root / f".build-{uuid.uuid4().hex}"
    path.mkdir(mode=0o700)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def publish(aside: Path, entry: Path) -> bool:
    """Gives what was made aside its name, whole; whether that replaced something."""
    for path in aside.iterdir():
        _sync(path)
    _sync(aside)
    replaced = os.path.lexists(entry)
    if replaced:
        discard(entry)
    aside.rename(entry)
    _sync(entry.parent)
    return replaced


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
