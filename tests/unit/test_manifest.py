# SPDX-License-Identifier: Apache-2.0
"""An entry of the kernel store that comes from elsewhere."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_nvcc import FakeNvcc

from jax_bolt._src.errors import CacheError
from jax_bolt._src.jit import manifest
from jax_bolt._src.jit.store import Store


@pytest.fixture
def entry(fake: FakeNvcc, tmp_path: Path) -> Path:
    """An entry of another store."""
    return fake.build(Store(tmp_path / "elsewhere")).parent


def test_it_is_as_good_as_one_built_here(kernels, fake, entry):
    files = manifest.read(entry)
    assert kernels.add(entry.name, files)
    found = kernels.find(entry.name)
    assert found == kernels.root / entry.name / "kernel.so"
    assert manifest.read(found.parent) == files
    assert stat.S_IMODE(found.parent.stat().st_mode) == 0o700
    assert not kernels.add(entry.name, files), "it is there"
    assert fake.build(kernels) == found
    assert len(fake.calls) == 1
    found.write_text("damaged")
    assert kernels.add(entry.name, files)
    assert kernels.find(entry.name) == found
    assert not list(kernels.root.glob(".build-*"))


def saying(**changes: object) -> Callable[[dict[str, bytes]], None]:
    """Has the manifest say something else, or nothing."""

    def change(files: dict[str, bytes]) -> None:
        document = json.loads(files["manifest.json"])
        for name, value in changes.items():
            if value is None:
                del document[name]
            else:
                document[name] = value
        files["manifest.json"] = json.dumps(document).encode()

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda f: f.update({"kernel.so": b"int y;"}), "does not match its checksum"),
        (lambda f: f.update({"kernel.so": b"int x"}), "does not match its checksum"),
        (lambda f: f.update({"source.cu": b"int y;"}), "do not match its name"),
        (lambda f: f.update({"source.cu": b"\xff"}), "utf-8"),
        (lambda f: f.pop("kernel.so"), "kernel.so is missing"),
        (lambda f: f.pop("source.cu"), "source.cu is missing"),
        (lambda f: f.pop("manifest.json"), "manifest.json is missing"),
        (lambda f: f.update({"../kernel.so": b""}), "no file '../kernel.so'"),
        (lambda f: f.update({"manifest.json": b"["}), "Expecting value"),
        (lambda f: f.update({"manifest.json": b"[]"}), "cannot be read"),
        (lambda f: f.update({"manifest.json": b"[" * 100_000}), "cannot be read"),
        (saying(schema=2), "another entry's"),
        (saying(digest="0" * 64), "another entry's"),
        (saying(parts={}), "source is missing"),
        (saying(parts=[]), "cannot be read"),
        (saying(sha256=None), "sha256 is missing"),
        (saying(binary=["kernel.so"]), "cannot be read"),
        (saying(binary="source.cu"), "its binary is 'source.cu'"),
    ],
)
def test_one_that_is_not_whole_is_refused(kernels, entry, change, reason):
    files = manifest.read(entry)
    change(files)
    with pytest.raises(ValueError, match=reason):
        kernels.add(entry.name, files)
    assert not kernels.root.exists()


def test_one_whose_parts_were_changed_is_refused(kernels, entry):
    files = manifest.read(entry)
    document = json.loads(files["manifest.json"])
    document["parts"]["arch"] = "sm_80"
    files["manifest.json"] = json.dumps(document).encode()
    with pytest.raises(ValueError, match="do not match its name"):
        kernels.add(entry.name, files)


def test_one_that_cannot_be_stored(kernels, entry):
    files = manifest.read(entry)
    with pytest.raises(CacheError, match=r"cannot be stored in .*JAX_BOLT_CACHE_DIR"):
        Store(entry / "kernel.so" / "below a file").add(entry.name, files)
    kernels.root.mkdir(parents=True)
    kernels.root.chmod(0o777)
    with pytest.raises(CacheError, match="chmod go-w"):
        kernels.add(entry.name, files)
    assert not list(kernels.root.iterdir())
