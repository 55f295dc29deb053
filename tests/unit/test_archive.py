# SPDX-License-Identifier: Apache-2.0
"""What is read from an archive is what was written to it, or nothing is."""

from __future__ import annotations

import hashlib
import json
import random
import re
import stat
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jax_bolt._src import archive
from jax_bolt._src.errors import CacheError
from jax_bolt._src.jit import manifest
from jax_bolt._src.tune import db

RESULTS = db.Results(device="NVIDIA H200", entries={"problem": db.Entry(choice="xla")})


def read(path: Path) -> dict[str, dict[str, bytes]]:
    """The kernels of an archive."""
    with archive.read(path) as opened:
        return {digest: opened.kernel(digest) for digest in opened.digests}


@pytest.fixture
def good(kernels, fake, tmp_path) -> Path:
    """An archive of one tuning result and one kernel."""
    fake.build(kernels)
    path = tmp_path / "cache.zip"
    assert archive.write(path, [RESULTS], kernels.entries()) == (1, [])
    return path


@pytest.fixture
def forged(good) -> Callable[..., str]:
    """Why an archive is refused that something was done to.

    With ``seal`` it was done on purpose: the header says the same.
    """

    def forged(
        change: Callable[[dict[str, bytes]], None] = lambda members: None,
        describe: Callable[[zipfile.ZipInfo], None] = lambda member: None,
        seal: bool = False,
    ) -> str:
        with zipfile.ZipFile(good) as file:
            members = {name: file.read(name) for name in file.namelist()}
        change(members)
        if seal:
            header = json.loads(members["jax_bolt-cache.json"])
            header["members"] = {
                name: hashlib.sha256(content).hexdigest()
                for name, content in members.items()
                if name != "jax_bolt-cache.json"
            }
            members["jax_bolt-cache.json"] = json.dumps(header).encode()
        with zipfile.ZipFile(good, "w") as file:
            for name, content in members.items():
                member = zipfile.ZipInfo(name.rstrip("*"))
                describe(member)
                file.writestr(member, content)
        with pytest.raises(CacheError) as caught:
            read(good)
        assert str(good) in str(caught.value)
        return str(caught.value)

    return forged


def test_what_is_written_is_read(good, kernels):
    with archive.read(good) as opened:
        (results,) = opened.results
        (digest,) = opened.digests
        assert opened.kernel(digest) == manifest.read(kernels.root / digest)
    assert (results.device, results.entries) == (RESULTS.device, RESULTS.entries)
    assert "jax_bolt " in results.versions and results.date


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "name",
    [
        *("../evil", "/etc/passwd", "tuned/../../evil.json", "evil.pth", "kernels/"),
        *(f"kernels/{DIGEST}/", f"kernels/{DIGEST}/evil.so", "kernels/x/kernel.so"),
        *(f"kernels/{DIGEST}/../kernel.so", f"kernels/{DIGEST}/used", "tuned/a b.json"),
        *("tuned/.json", "tuned/a.json\n", "jax_bolt-cache.json/x", "C:\\evil"),
    ],
)
def test_an_archive_with_a_file_that_is_none_of_ours(forged, name):
    message = forged(lambda members: members.update({name: b""}))
    assert "no such file belongs into one" in message
    assert "nothing of it is used" in message


@pytest.mark.parametrize(
    "kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO, stat.S_IFDIR]
)
def test_an_archive_with_a_link_or_a_device(forged, kind):
    def describe(member: zipfile.ZipInfo) -> None:
        member.external_attr = (kind | 0o777) << 16

    assert "it is not a plain file" in forged(describe=describe)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_a_file_twice(forged):
    header = "jax_bolt-cache.json"
    assert "it is there twice" in forged(lambda m: m.update({header + "*": m[header]}))


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("_MAX_MEMBER_BYTES", "it is larger than"),
        ("_MAX_BYTES", "unpacked, it is larger than"),
        ("_MAX_MEMBERS", "members"),
    ],
)
def test_an_archive_of_absurd_size(forged, monkeypatch, limit, reason):
    monkeypatch.setattr(archive, limit, 3)
    assert reason in forged()


def test_a_member_that_unpacks_to_more_than_it_says(good):
    """What the directory says is checked first, and bounds the memory."""
    with zipfile.ZipFile(good, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("jax_bolt-cache.json", b"0" * (64 << 20))
    content = good.read_bytes()
    true, claimed = (size.to_bytes(4, "little") for size in (64 << 20, 16))
    assert content.count(true) == 2
    good.write_bytes(content.replace(true, claimed))
    tracemalloc.start()
    try:
        with pytest.raises(CacheError, match=r"jax_bolt-cache.json: "):
            read(good)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def change(match: str, content: bytes | None) -> Callable[[dict[str, bytes]], None]:
    """Replaces or removes the first member that matches."""

    def apply(members: dict[str, bytes]) -> None:
        name = next(name for name in members if re.search(match, name))
        if content is None:
            del members[name]
        else:
            members[name] = content

    return apply


@pytest.mark.parametrize(
    ("match", "content", "reason"),
    [
        (r"kernel\.so", b"other code", "does not match its checksum"),
        (r"kernel\.so", None, "kernel.so is missing"),
        (r"source\.cu", b"other", "do not match its name"),
        (r"manifest", b"{}", "schema is missing"),
        (r"manifest", None, "manifest.json is missing"),
        (r"tuned/", b"{", "Expecting property name"),
        (r"tuned/", b'{"schema": 9}', "schema 9"),
        (
            r"tuned/",
            b'{"schema": 1, "device": "A100", "entries": {}}',
            "it is of another device, 'A100'",
        ),
    ],
)
def test_an_archive_whose_content_was_changed(forged, match, content, reason):
    assert reason in forged(change(match, content), seal=True)


def test_an_archive_whose_header_says_otherwise(forged):
    header = "jax_bolt-cache.json"
    assert f"it has no {header}" in forged(change(header, None))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[", "jax_bolt-cache.json: "),
        (b'{"format": 1}', "jax_bolt-cache.json: 'members'"),
        (b'{"format": 2}', "use one version of jax_bolt"),
        (b'{"format": 1, "members": {}}', "is missing"),
    ],
)
def test_an_archive_with_another_header(forged, content, reason):
    assert reason in forged(change("jax_bolt-cache", content))


def test_an_archive_that_lost_a_member(forged):
    assert "build.log is missing" in forged(change(r"build\.log", None))


def test_an_archive_with_another_log(forged):
    reason = "build.log: it does not match its checksum"
    assert reason in forged(change(r"build\.log", b"all is well"))


def test_a_directory_that_points_before_the_file(good):
    with zipfile.ZipFile(good) as file:
        member = file.infolist()[0]
        member.header_offset = -2
        with pytest.raises(archive._Refused, match="Invalid argument"):
            archive._read(file, member.filename)


def test_no_damage_to_an_archive_goes_unseen(good):
    content = good.read_bytes()
    ((digest, kernel),) = read(good).items()
    rng = random.Random(0)
    refused = 0
    for _ in range(400):
        harmed = bytearray(content)
        if rng.random() < 0.3:
            del harmed[rng.randrange(len(harmed)) :]
        else:
            harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
        good.write_bytes(harmed)
        try:
            # A date, say, or a hint for unpackers.
            assert read(good) == {digest: kernel}
        except CacheError:
            refused += 1
    assert refused > 300
