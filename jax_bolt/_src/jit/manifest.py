# SPDX-License-Identifier: Apache-2.0
"""The manifest of a stored kernel: what the files of an entry say of each other.

The manifest has the binary's checksum, and the labelled parts whose digest names the
entry; the source, one of the parts, lies beside it in full. So an entry on disk or from
another machine can be checked with nothing else at hand.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import compiler, directories

SCHEMA = 1
MANIFEST = "manifest.json"
# All that belongs to a kernel; of the binaries an entry has one.
FILES = frozenset({MANIFEST, compiler.SOURCE, compiler.LOG, *compiler.BINARIES})

_DIGEST = re.compile(r"[0-9a-f]{64}")


# What reading an unsound entry may raise, as ``verified`` does.
UNSOUND = (OSError, ValueError, KeyError, TypeError, RecursionError)


def is_digest(name: str) -> bool:
    """Whether ``name`` can be an entry's."""
    return _DIGEST.fullmatch(name) is not None


def digest_of(parts: Mapping[str, str]) -> str:
    """The name of the entry: 64 hex digits over its labelled parts."""
    # JSON keeps the parts apart whatever they contain.
    return _sha256(json.dumps(dict(parts), sort_keys=True).encode())


def text(digest: str, binary: Path, parts: Mapping[str, str], seconds: float) -> str:
    """The text of the manifest of a kernel that was just built."""
    # The source lies beside the manifest in full.
    labelled = {**parts, "source": _sha256(parts["source"].encode())}
    document = {
        "schema": SCHEMA,
        "digest": digest,
        "binary": binary.name,
        "bytes": binary.stat().st_size,
        "sha256": _checksum(binary),
        "parts": labelled,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return json.dumps(document, indent=2) + "\n"


def verified(path: Path, digest: str) -> Path:
    """The binary of the sound entry ``path``.

    Raises one of ``UNSOUND`` for one that is damaged or that another user may have
    changed.
    """
    status = path.lstat()
    if not directories.is_private(status):
        raise ValueError("it is not a directory that only its user can write")
    directories.require_own_file(path / MANIFEST, status)
    document = _parse((path / MANIFEST).read_bytes(), digest)
    binary = path / document["binary"]
    directories.require_own_file(binary, status)
    if binary.stat().st_size != document["bytes"]:
        raise ValueError("its binary has another size")
    if _checksum(binary) != document["sha256"]:
        raise ValueError("its binary does not match its checksum")
    return binary


def check(digest: str, files: Mapping[str, bytes]) -> None:
    """Raises ValueError unless ``files``, by name, are all of the entry ``digest``.

    This finds damage. Whether the binary does what the source says nobody can tell.
    """
    if unknown := sorted(set(files) - FILES):
        raise ValueError(f"an entry has no file {unknown[0]!r}")
    try:
        document = _parse(files[MANIFEST], digest)
        source, binary = files[compiler.SOURCE].decode(), files[document["binary"]]
        parts = {**document["parts"], "source": source}
        same_source = document["parts"]["source"] == _sha256(source.encode())
        bytes_, sha256 = document["bytes"], document["sha256"]
    except KeyError as error:
        raise ValueError(f"{error.args[0]} is missing") from None
    except (TypeError, RecursionError) as error:
        raise ValueError(f"its manifest cannot be read: {error}") from None
    if not same_source or digest_of(parts) != digest:
        raise ValueError("its source and parts do not match its name")
    if compiler.binary(source) != document["binary"]:
        raise ValueError("its source is not that of its binary")
    if (len(binary), _sha256(binary)) != (bytes_, sha256):
        raise ValueError("its binary does not match its checksum")


def read(path: Path) -> dict[str, bytes]:
    """The files of an entry, by name; OSError where they cannot be read."""
    files = (path / name for name in sorted(FILES))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def describe(path: Path) -> tuple[str, str]:
    """The architecture and the kernel of an entry, as its own files have them.

    "?" where they cannot be read.
    """
    try:
        document = _parse((path / MANIFEST).read_bytes(), path.name)
        source = (path / compiler.SOURCE).read_text()
        return str(document["parts"]["arch"]), compiler.kernel(source) or "?"
    except UNSOUND:
        return "?", "?"


def _parse(content: bytes, digest: str) -> dict[str, Any]:
    """Raises ValueError, KeyError or TypeError for one that is not ``digest``'s."""
    document: dict[str, Any] = json.loads(content)
    if document["schema"] != SCHEMA or document["digest"] != digest:
        raise ValueError("its manifest is another entry's")
    if document["binary"] not in compiler.BINARIES:
        raise ValueError(f"its binary is {document['binary']!r}")
    return document


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
