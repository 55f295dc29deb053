# SPDX-License-Identifier: Apache-2.0
"""A cache, or the part of it that matters, as one file to take elsewhere.

A zip file: ``jax_bolt-cache.json`` says what it is, ``tuned/`` has tuning files and
``kernels/<digest>/`` the files of entries of the kernel store. Members are read into
memory and checked, and never extracted: nothing that an archive names becomes a path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
import stat
import struct
import uuid
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import CacheError
from .jit import manifest
from .jit.store import Entry
from .tune import db

FORMAT = 1

_HEADER = "jax_bolt-cache.json"
_TUNED = re.compile(r"tuned/([a-z0-9_]{1,100}\.json)")
_KERNEL = re.compile(
    rf"kernels/([0-9a-f]{{64}})/({'|'.join(map(re.escape, sorted(manifest.FILES)))})"
)
# No kernel, log or tuning file comes near the first, and no store near the others.
_MAX_MEMBER_BYTES = 256 << 20
_MAX_BYTES = 16 << 30
_MAX_MEMBERS = 500_000
_COMPRESSED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_BROKEN = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # of a zip file; the header has the date


@dataclasses.dataclass(frozen=True, slots=True)
class Archive:
    """An open archive whose members are what they should be, checked to the last."""

    results: tuple[db.Results, ...]
    digests: tuple[str, ...]
    _file: zipfile.ZipFile
    _names: dict[str, list[str]]

    def kernel(self, digest: str) -> dict[str, bytes]:
        """The files of a kernel, by name."""
        prefix = f"kernels/{digest}/"
        return {name: _read(self._file, prefix + name) for name in self._names[digest]}


def write(
    path: Path, results: Iterable[db.Results], kernels: Iterable[Entry]
) -> tuple[int, list[str]]:
    """Writes an archive, whole or not at all; what went in, and what was damaged.

    Returns the number of kernels and the digests of those that were left out since they
    are not sound. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    count, damaged = 0, []
    members: dict[str, str] = {}

    def add(name: str, content: bytes) -> None:
        members[name] = hashlib.sha256(content).hexdigest()
        _add(file, name, content)

    try:
        with (
            temporary.open("xb") as raw,
            zipfile.ZipFile(raw, "w", zipfile.ZIP_DEFLATED) as file,
        ):
            for found in results:
                text = db.text(found.device, found.entries)
                add(f"tuned/{db.file_name(found.device)}", text.encode())
            for entry in kernels:
                digest = entry.path.name
                try:
                    manifest.verified(entry.path, digest)
                    files = manifest.read(entry.path)
                    manifest.check(digest, files)
                except manifest.UNSOUND:
                    damaged.append(digest)
                    continue
                for name, content in files.items():
                    add(f"kernels/{digest}/{name}", content)
                count += 1
            _add(file, _HEADER, _header(members))
            file.close()
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count, damaged


@contextlib.contextmanager
def read(path: Path) -> Iterator[Archive]:
    """Opens an archive and checks all of it.

    Raises CacheError, naming the member at fault, and OSError where ``path`` cannot be
    read.
    """
    try:
        opened = zipfile.ZipFile(path)
    except _BROKEN as error:
        raise CacheError(
            f"{path} is not a jax_bolt cache archive ({error}): `python -m jax_bolt "
            "cache export FILE` makes one"
        ) from error
    with opened as file:
        try:
            yield _checked(file)
        except _Refused as error:
            raise CacheError(
                f"{path} is damaged or was changed, and nothing of it is used; export "
                f"it again: {error}"
            ) from error


class _Refused(Exception):
    """Which member is not what it should be, and why."""


def _checked(file: zipfile.ZipFile) -> Archive:
    members = file.infolist()
    _check_members(members)
    digests = _digests(file)
    names = {member.filename for member in members} - {_HEADER}
    # A damaged directory can end early without being invalid.
    if missing := set(digests) ^ names:
        raise _Refused(f"{min(missing)} is missing, there or in {_HEADER}")
    results = []
    kernels: defaultdict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        if hashlib.sha256(_read(file, name)).hexdigest() != digests[name]:
            raise _Refused(f"{name}: it does not match its checksum")
        if tuned := _TUNED.fullmatch(name):
            results.append(_results(file, name, tuned[1]))
        elif kernel := _KERNEL.fullmatch(name):
            kernels[kernel[1]].append(kernel[2])
    archive = Archive(tuple(results), tuple(kernels), file, dict(kernels))
    for digest in archive.digests:
        try:
            manifest.check(digest, archive.kernel(digest))
        except ValueError as error:
            raise _Refused(f"kernels/{digest}: {error}") from error
    return archive


def _check_members(members: list[zipfile.ZipInfo]) -> None:
    """By the directory alone, before anything is read."""
    if len(members) > _MAX_MEMBERS:
        raise _Refused(f"it has {len(members)} members")
    if sum(member.file_size for member in members) > _MAX_BYTES:
        raise _Refused(f"unpacked, it is larger than {_MAX_BYTES >> 30} GiB")
    seen: set[str] = set()
    for member in members:
        # The name as it is written: zipfile itself cuts it at a null.
        name = member.orig_filename
        kind = stat.S_IFMT(member.external_attr >> 16)
        known = name == _HEADER or _TUNED.fullmatch(name) or _KERNEL.fullmatch(name)
        if not known:
            reason = "no such file belongs into one"
        elif name in seen:
            reason = "it is there twice"
        elif kind not in (0, stat.S_IFREG):
            reason = "it is not a plain file"
        elif member.flag_bits & 1 or member.compress_type not in _COMPRESSED:
            reason = "it is encrypted or compressed in another way"
        elif member.file_size > _MAX_MEMBER_BYTES:
            reason = f"it is larger than {_MAX_MEMBER_BYTES >> 20} MiB"
        else:
            seen.add(name)
            continue
        raise _Refused(f"{name!r}: {reason}")
    if _HEADER not in seen:
        raise _Refused(f"it has no {_HEADER}")


def _header(digests: dict[str, str]) -> bytes:
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = {"format": FORMAT, "versions": db.versions(), "date": date}
    return json.dumps({**header, "members": digests}, indent=1).encode()


def _digests(file: zipfile.ZipFile) -> dict[str, str]:
    """The members there should be, with the checksums they should have."""
    try:
        header = json.loads(_read(file, _HEADER))
        version = header["format"]
        digests = dict(header["members"]) if version == FORMAT else {}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _Refused(f"{_HEADER}: {error}") from error
    if version != FORMAT:
        raise CacheError(
            f"{file.filename} has format {version!r}, and this jax_bolt reads format "
            f"{FORMAT}: use one version of jax_bolt to export and to import"
        )
    return digests


def _results(file: zipfile.ZipFile, name: str, base: str) -> db.Results:
    try:
        results = db.parse(_read(file, name))
    except ValueError as error:
        raise _Refused(f"{name}: {error}") from error
    if db.file_name(results.device) != base:
        raise _Refused(f"{name}: it is of another device, {results.device!r}")
    return results


def _add(file: zipfile.ZipFile, name: str, content: bytes) -> None:
    member = zipfile.ZipInfo(name, _EPOCH)
    member.external_attr = (stat.S_IFREG | 0o644) << 16
    member.compress_type = zipfile.ZIP_DEFLATED
    file.writestr(member, content)


def _read(file: zipfile.ZipFile, name: str) -> bytes:
    """A member, its checksum verified; no more than the directory says it has."""
    size = file.getinfo(name).file_size
    try:
        with file.open(name) as member:
            content = member.read(size)
    # OSError: where a damaged directory points before the file.
    except (*_BROKEN, RuntimeError, EOFError, OSError, zlib.error) as error:
        raise _Refused(f"{name}: {error}") from error
    if len(content) != size:
        raise _Refused(f"{name}: it is cut short")
    return content
