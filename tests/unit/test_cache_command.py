# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt cache``, and the archives it writes and reads."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_nvcc import FakeNvcc
from fresh_python import environ

from jax_bolt._src import arch, archive, cli, options, paths, plan
from jax_bolt._src.jit import codegen, manifest
from jax_bolt._src.jit.store import Store
from jax_bolt._src.tune import db
from jax_bolt._src.tune import target as targets

H200 = arch.of_device("9.0", "NVIDIA H200", 132)
DEVICE = db.device_key(H200)
KERNEL = (
    "JAX_BOLT_DEVICE_KERNEL(jax_bolt::gemm::Sm90<Epilogue, cutlass::bfloat16_t, 64>)\n"
)
CAST = codegen.cast_source("bfloat16")
OTHER = "int unused;"


def entry(digest: str = "", **changes) -> db.Entry:
    made = db.Entry(
        choice="kernel",
        template="gemm_sm80",
        config="tile=64x64x64",
        digest=digest,
        sources="headers",
        compiler="nvcc 13",
        time_us=2.0,
        xla_time_us=3.0,
        error=1e-3,
        xla_error=1e-3,
    )
    return dataclasses.replace(made, **changes)


class Cache:
    """The user's cache, as the command line sees it."""

    def __init__(self, fake: FakeNvcc) -> None:
        self.fake = fake

    @property
    def kernels(self) -> Store:
        return Store(paths.kernel_root(options.current()))

    @property
    def results(self) -> db.Database:
        return db.Database(paths.tuning_root(options.current()))

    @property
    def entries(self) -> dict[str, db.Entry]:
        found = {}
        for results in self.results.all():
            assert results.device == DEVICE
            found.update(results.entries)
        return found

    def save(self, **entries: db.Entry) -> None:
        results = db.Results(device=DEVICE, entries=entries)
        self.results.merge(results, lambda entry: True)

    def fill(self) -> tuple[str, str, str]:
        """The digests of a winner, of a cast and of a kernel nobody needs."""
        sources = (KERNEL, CAST, OTHER)
        winner, cast, other = (
            self.fake.build(self.kernels, source).parent.name for source in sources
        )
        self.save(problem=entry(winner), slow=entry(choice="xla"))
        return winner, cast, other

    @property
    def digests(self) -> set[str]:
        return {kept.path.name for kept in self.kernels.entries()}


@pytest.fixture
def cache(cache_dir: Path, fake: FakeNvcc, monkeypatch: pytest.MonkeyPatch) -> Cache:
    origin = plan.Origin("headers", "nvcc 13")
    monkeypatch.setattr(targets, "origin", lambda tools: origin)
    return Cache(fake)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that is to end with ``status``; what it printed, and said."""

    def run(*arguments: object, status: int = 0) -> str:
        capsys.readouterr()
        try:
            found = cli.main(["cache", *map(str, arguments)])
        except SystemExit as exit:
            found = exit.code
        printed, said = capsys.readouterr()
        assert found == status, said
        if status:
            assert "error: " in said and not printed
        return printed + said

    return run


# --- Looking and removing


def test_an_empty_cache(cache, run, cache_dir):
    assert run("ls").count("none") == 2
    assert "kernels         0  0 B  of 4.0 GiB" in run("size")
    assert "removed 0 kernels" in run("prune")
    assert "removed 0 kernels and 0 tuning results" in run("clear", "--yes")
    assert not cache_dir.exists(), "looking must not create anything"


def test_ls_says_what_is_there(cache, run):
    winner, cast, other = cache.fill()
    os.utime(cache.kernels.root / cast / "manifest.json")
    (cache.kernels.root / winner / "used").touch()
    os.utime(cache.kernels.root / winner / "used", (1e9, 1e9))
    printed = run("ls")
    lines = printed.splitlines()
    assert lines[0] == f"kernels in {cache.kernels.root}"
    assert re.search(
        rf"B +20\d\d-.* sm_90a +{cast[:12]} +0 +cast to bfloat16$", printed, re.M
    )
    assert re.search(rf"{other[:12]} +0 +\?$", printed, re.M)
    # What was tuned says it best; the last used comes first.
    assert "2001-09-09 " in lines[4]
    assert lines[4].endswith(f"{winner[:12]}        1  gemm_sm80 tile=64x64x64")
    tuned = printed.partition("tuning results in")[2]
    assert re.search(rf"^ +2 +1 +1  20\d\d-\d\d-\d\d  {DEVICE}$", tuned, re.M)


def test_ls_of_a_winner_that_is_not_there_and_of_damage(cache, run):
    winner, cast, _ = cache.fill()
    (cache.kernels.root / winner / "manifest.json").write_text("{")
    (cache.kernels.root / cast / "source.cu").unlink()
    assert re.search(rf"\? +{winner[:12]} +1 +gemm_sm80", run("ls"))
    assert re.search(rf"\? +{cast[:12]} +0 +\?", run("ls"))


def test_names_cannot_steer_the_terminal(cache, run):
    digest = cache.fake.build(cache.kernels, KERNEL).parent.name
    cache.save(problem=entry(digest, config="\x1b]0;title\x07"))
    assert "gemm_sm80 ?]0;title?" in run("ls")


def test_size(cache, run):
    cache.fill()
    printed = run("size")
    total = sum(kept.size for kept in cache.kernels.entries())
    assert re.search(rf"kernels +3  {total / 1024:.1f} KiB  of 4.0 GiB", printed)
    size = cache.results.path(H200).stat().st_size
    assert re.search(rf"tuning results +2  {size / 1024:.1f} KiB", printed)


def test_prune(cache, run):
    winner, cast, other = cache.fill()
    for number, digest in enumerate((cast, winner, other)):
        used = cache.kernels.root / digest / "used"
        used.touch()
        os.utime(used, (1000 + number, 1000 + number))
    assert "removed 0 kernels" in run("prune")
    sizes = {kept.path.name: kept.size for kept in cache.kernels.entries()}
    printed = run("prune", "--max-bytes", sizes[winner] + sizes[other])
    assert "removed 1 kernels" in printed and "2 of" in printed
    assert cache.digests == {winner, other}
    cache.kernels.find(other)
    assert "last ten minutes" in run("prune", "--max-bytes", "0.001K")
    assert cache.digests == {other}
    assert len(cache.entries) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7),
        ("1k", 1024),
        ("500M", 500 << 20),
        ("1.5GiB", 3 << 29),
        ("2GB", 2 << 30),
    ],
)
def test_sizes(cache, run, monkeypatch, text, size):
    asked = []
    monkeypatch.setattr(Store, "prune", lambda self, bound: asked.append(bound) or 0)
    run("prune", "--max-bytes", text)
    assert asked == [size]


@pytest.mark.parametrize("text", ["", "-1", "much", "2X", "1e3", "2 G B"])
def test_what_is_no_size(cache, run, text):
    assert "is no size such as 500M or 2G" in run(
        "prune", f"--max-bytes={text}", status=2
    )


def test_clear_asks(cache, run, monkeypatch):
    cache.fill()
    message = run("clear", status=2)
    assert "3 kernels and 2 tuning results in" in message and "--yes" in message
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)
    for answer in ("", "n", "no", "what?"):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        assert "nothing was removed" in run("clear", status=1)

    def end_of_input(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end_of_input)
    assert "nothing was removed" in run("clear", status=1)
    assert len(cache.digests) == 3 and len(cache.entries) == 2
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert "removed 3 kernels and 2 tuning results" in run("clear")
    assert not cache.digests and not cache.entries


def test_clear_says_when_it_could_not(cache, run, monkeypatch):
    cache.fill()
    monkeypatch.setattr("shutil.rmtree", lambda *args, **kwargs: None)
    assert "is it yours to write?" in run("clear", "--yes", status=1)


# --- Moving


def test_what_is_exported_is_imported(cache, run, tmp_path):
    winner, cast, other = cache.fill()
    entries, files = cache.entries, manifest.read(cache.kernels.root / winner)
    file = tmp_path / "cache.zip"
    assert "2 tuning results and 2 kernels" in run("export", file)
    with options.options(cache_dir=tmp_path / "other"):
        printed = run("import", file)
        assert f"{DEVICE}: 2 tuning results added, 0 replaced, 0 no" in printed
        assert "2 kernels added, 0 were there" in printed
        assert "note" not in printed
        assert cache.entries == entries
        assert cache.digests == {winner, cast}
        assert cache.kernels.find(winner)
        assert manifest.read(cache.kernels.root / winner) == files
        printed = run("import", file)
        assert "0 tuning results added, 0 replaced, 2 no better" in printed
        assert "0 kernels added, 2 were there" in printed
    assert cache.digests == {winner, cast, other}, "the first is as it was"


def test_exporting_more_and_less(cache, run, tmp_path):
    winner, cast, other = cache.fill()
    file = tmp_path / "cache.zip"

    def exported(*arguments) -> set[str]:
        run("export", "--force", *arguments, file)
        with archive.read(file) as opened:
            assert [len(results.entries) for results in opened.results] == [2]
            return set(opened.digests)

    assert exported() == {winner, cast}
    assert exported("--all") == {winner, cast, other}
    assert exported("--no-kernels") == set()
    assert "contradict" in run(
        "export", "--all", "--no-kernels", "--force", file, status=2
    )


def test_importing_without_kernels(cache, run, tmp_path):
    cache.fill()
    run("export", tmp_path / "cache.zip")
    with options.options(cache_dir=tmp_path / "other"):
        assert "kernels" not in run("import", "--no-kernels", tmp_path / "cache.zip")
        assert not cache.digests and len(cache.entries) == 2


def test_exporting_is_no_use_of_a_kernel(cache, run, tmp_path):
    winner, *_ = cache.fill()
    os.utime(cache.kernels.root / winner / "manifest.json")
    run("export", tmp_path / "cache.zip")
    assert not (cache.kernels.root / winner / "used").exists()


def test_export_leaves_out_what_is_damaged_or_gone(cache, run, tmp_path):
    winner, *_ = cache.fill()
    binary = cache.kernels.find(winner)
    binary.write_text("damaged")
    printed = run("export", tmp_path / "cache.zip")
    assert "1 kernels" in printed and "1 kernels are not in the store" in printed
    with archive.read(tmp_path / "cache.zip") as opened:
        assert winner not in opened.digests


def test_export_mistakes(cache, run, tmp_path):
    file = tmp_path / "cache.zip"
    assert "nothing was tuned yet" in run("export", file, status=1)
    assert not file.exists()
    cache.fill()
    file.write_text("precious")
    assert "add --force to replace it" in run("export", file, status=1)
    assert file.read_text() == "precious"
    run("export", "--force", file)
    assert zipfile.is_zipfile(file)
    assert "is no directory" in run("export", tmp_path / "no" / "x.zip", status=1)
    assert "FILE" in run("export", status=2)


def test_an_export_that_fails_leaves_nothing(cache, run, tmp_path, monkeypatch):
    cache.fill()
    (tmp_path / "out").mkdir()
    file = tmp_path / "out" / "cache.zip"
    file.write_text("the one of before")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive.os, "fsync", full)
    assert "No space left on device" in run("export", "--force", file, status=1)
    assert [path.name for path in file.parent.iterdir()] == ["cache.zip"]
    assert file.read_text() == "the one of before"


def test_what_is_better_is_taken(cache, run, tmp_path):
    with options.options(cache_dir=tmp_path / "other"):
        cache.save(
            faster=entry(time_us=1.0),
            slower=entry(time_us=2.5),
            void=entry(sources="other headers", time_us=1.0),
            new=entry(compiler="nvcc 12"),
        )
        # Not verified, as only someone's own hands would write it.
        document = json.loads(cache.results.path(H200).read_text())
        document["entries"]["doubtful"] = dataclasses.asdict(entry(error=None))
        cache.results.path(H200).write_text(json.dumps(document))
        run("export", tmp_path / "cache.zip")
    kept = {name: entry() for name in ("faster", "slower", "void")}
    cache.save(**kept)
    printed = run("import", tmp_path / "cache.zip")
    assert "1 tuning results added, 1 replaced, 2 no better" in printed
    assert "1 results are not used" in printed
    assert "2 results are of another jax_bolt, CUTLASS or nvcc" in printed
    new = entry(compiler="nvcc 12")
    assert cache.entries == kept | {"faster": entry(time_us=1.0), "new": new}


def test_importing_what_is_no_archive(cache, run, tmp_path, cache_dir):
    file = tmp_path / "cache.zip"
    assert f"No such file or directory: {file}" in run("import", file, status=1)
    assert "Is a directory" in run("import", tmp_path, status=1)
    for content in (b"", b"text", b"PK\x03\x04 and no more"):
        file.write_bytes(content)
        message = run("import", file, status=1)
        assert f"{file} is not a jax_bolt cache archive" in message
        assert "`python -m jax_bolt cache export FILE` makes one" in message
    assert not cache_dir.exists()


def test_an_archive_that_was_changed_leaves_the_cache_as_it_is(cache, run, tmp_path):
    cache.fill()
    file = tmp_path / "cache.zip"
    run("export", file)
    with zipfile.ZipFile(file, "a") as opened:
        opened.writestr("../evil", b"")
    with options.options(cache_dir=tmp_path / "other"):
        message = run("import", file, status=1)
        assert "nothing of it is used" in message and "'../evil'" in message
    assert not (tmp_path / "other").exists() and not (tmp_path / "evil").exists()


def test_importing_into_a_cache_that_others_can_write(cache, run, tmp_path):
    cache.fill()
    run("export", tmp_path / "cache.zip")
    root = tmp_path / "other" / "kernels"
    root.mkdir(parents=True)
    root.chmod(0o777)
    with options.options(cache_dir=tmp_path / "other"):
        assert f"chmod go-w '{root}'" in run("import", tmp_path / "cache.zip", status=1)
        assert not cache.entries and not list(root.iterdir())


# --- The program


def test_help_has_examples(run):
    for arguments in ((), *((name,) for name in ("ls", "size", "prune", "clear"))):
        assert "python -m jax_bolt cache " in run(*arguments, "--help")
    for name in ("export", "import"):
        assert f"  python -m jax_bolt cache {name} tuned.zip\n" in run(name, "--help")
    assert "only from those you would" in run("import", "--help")


def test_unknown_commands(run):
    assert "invalid choice: 'list'" in run("list", status=2)
    assert "required: ACTION" in run(status=2)


def program(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "jax_bolt", *map(str, arguments)],
        env=environ(**changes),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def test_the_program_itself(tmp_path):
    done = program("cache", "ls", JAX_BOLT_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"kernels in {tmp_path}/cache/kernels\n")
    done = program("cache", "clear", JAX_BOLT_CACHE_DIR=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (2, "")
    done = program("cache", "ls", JAX_BOLT_JOBS="many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "python -m jax_bolt: error: JAX_BOLT_JOBS='many' must be a whole number, at "
        "least 1\n"
    )


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    command = f"'{sys.executable}' -P -m jax_bolt cache ls | true"
    done = subprocess.run(
        ["bash", "-c", command],
        env=environ(JAX_BOLT_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
