# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from fake_nvcc import FakeNvcc, toolchain, wait_for
from fresh_python import environ

from jax_bolt._src import arch
from jax_bolt._src.errors import CacheError, CompileError
from jax_bolt._src.jit import compiler, directories, store
from jax_bolt._src.jit.store import Store

SM90 = arch.from_name("sm_90a")


def build(kernels: Store, fake: FakeNvcc, source: str = "int x;") -> Path:
    return fake.build(kernels, source)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rename_binary(entry: Path, name: str) -> None:
    """Has the manifest name another file, and its checksum fit."""
    document = json.loads((entry / "manifest.json").read_text())
    other = entry / name
    other.write_text("not what was built")
    document["binary"], document["bytes"] = name, other.stat().st_size
    document["sha256"] = hashlib.sha256(other.read_bytes()).hexdigest()
    (entry / "manifest.json").write_text(json.dumps(document))


def link(path: Path) -> None:
    target = path.rename(path.parents[2] / path.name)
    path.symlink_to(target)


def test_an_entry_is_whole_and_found_again(kernels, fake):
    before = store.stats()
    binary = build(kernels, fake)
    assert binary.read_text() == "int x;"
    assert sorted(p.name for p in binary.parent.iterdir()) == [
        *("build.log", "kernel.so", "manifest.json", "source.cu")
    ]
    assert stat.S_IMODE(kernels.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(binary.parent.stat().st_mode) == 0o700
    manifest = json.loads((binary.parent / "manifest.json").read_text())
    assert manifest["digest"] == binary.parent.name
    assert manifest["parts"]["arch"] == "sm_90a"
    assert kernels.find(binary.parent.name) == binary
    assert build(kernels, fake) == binary
    assert len(fake.calls) == 1
    after = store.stats()
    assert after["compiled"] - before["compiled"] == 1
    assert after["found"] - before["found"] == 1


def test_what_was_never_built_is_not_found(kernels):
    assert kernels.find("0" * 64) is None
    assert kernels.entries() == []
    assert not kernels.root.exists(), "looking must not create anything"


@pytest.mark.parametrize(
    "change",
    [
        {"version": "13.1.0"},
        {"cutlass_version": "4.3.0"},
        {"abi_version": "2"},
    ],
)
def test_the_digest_depends_on_the_toolchain(fake, change):
    plain = fake.toolchain()
    changed = dataclasses.replace(plain, **change)
    assert store.digest(plain, "s", SM90) != store.digest(changed, "s", SM90)


def test_the_parts_of_a_module_are_what_they_were(fake):
    """A digest that changed would have every kernel of every cache built again."""
    source = "int x;\nJAX_BOLT_KERNEL(A)\n"
    parts = store.parts(fake.toolchain(), source, SM90)
    assert json.loads(parts.pop("flags")) == [
        *("-std=c++17", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a"),
        *(
            "--expt-relaxed-constexpr",
            "-shared",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ),
        *("-cudart=static", "-Xlinker=--exclude-libs=ALL"),
    ]
    assert parts.pop("headers") == hashlib.sha256().hexdigest()
    assert parts == {
        "schema": "1",
        "abi": "1",
        "arch": "sm_90a",
        "nvcc": "13.0.88",
        "cutlass": "4.2.0",
        "source": source,
    }


def test_a_cubin_is_stored_like_a_module(kernels, fake):
    source = "JAX_BOLT_DEVICE_KERNEL(A)\n"
    (binary,) = kernels.build(fake.toolchain(), [source], SM90).values()
    assert isinstance(binary, Path)
    assert (binary.name, binary.read_text()) == ("kernel.cubin", source)
    digest = store.digest(fake.toolchain(), source, SM90)
    assert kernels.find(digest) == binary
    as_module, as_cubin = (
        store.parts(fake.toolchain(), text, SM90) for text in ("s", source)
    )
    differing = {label for label in as_module if as_module[label] != as_cubin[label]}
    assert differing == {"flags", "source"}
    binary.write_text("damaged")
    assert kernels.find(digest) is None


def test_the_digest_depends_on_the_headers_that_are_included(tmp_path):
    def digest(case: str, **headers: str) -> str:
        include = tmp_path / case / "include" / "jax_bolt"
        include.mkdir(parents=True)
        for name, text in headers.items():
            (include / f"{name}.hpp").write_text(text)
        source = '#include "jax_bolt/gemm.hpp"\n'
        return store.digest(toolchain(tmp_path / case / "bin" / "nvcc"), source, SM90)

    gemm = '  # include "jax_bolt/math.hpp"\n'
    plain = digest("plain", gemm=gemm, math="1", conv="1")
    assert digest("other", gemm=gemm, math="1", conv="2") == plain
    assert digest("direct", gemm=gemm + " ", math="1", conv="1") != plain
    assert digest("nested", gemm=gemm, math="2", conv="1") != plain
    assert digest("missing", gemm=gemm, conv="1") != plain


def test_the_digest_depends_on_source_arch_and_flags_but_no_place(fake, monkeypatch):
    digest = store.digest(fake.toolchain(), "s", SM90)
    elsewhere = toolchain(Path("/elsewhere/bin/nvcc"))
    assert store.digest(elsewhere, "s", SM90) == digest
    assert store.digest(fake.toolchain(), "s ", SM90) != digest
    sm80 = arch.from_name("sm_80")
    assert store.digest(fake.toolchain(), "s", sm80) != digest
    h200 = arch.of_device("9.0", "NVIDIA H200", 100)
    assert store.digest(fake.toolchain(), "s", h200) == digest
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-lineinfo")
    assert store.digest(fake.toolchain(), "s", SM90) != digest


def test_results_come_in_order_once_each_and_are_told_as_they_end(kernels, fake):
    told = []
    sources = ["int a;", "FAIL", "int b;", "int a;"]
    results = kernels.build(
        fake.toolchain(), sources, SM90, 2, lambda key, result: told.append(key)
    )
    assert list(results) == [
        store.digest(fake.toolchain(), source, SM90) for source in sources[:3]
    ]
    assert sorted(told) == sorted(results)
    a, failed, b = results.values()
    assert isinstance(a, Path) and a.read_text() == "int a;"
    assert isinstance(b, Path) and b.read_text() == "int b;"
    assert isinstance(failed, CompileError)
    assert "FAIL is not defined" in failed.log


def test_compilers_run_at_once(kernels, fake):
    sources = ["WAIT 1", "WAIT 2", "WAIT 3"]
    watcher = threading.Thread(
        target=lambda: (wait_for(lambda: len(fake.calls) == 3), fake.release())
    )
    watcher.start()
    results = kernels.build(fake.toolchain(), sources, SM90, jobs=3)
    watcher.join()
    assert all(isinstance(result, Path) for result in results.values())


def test_a_failure_is_remembered_and_leaves_nothing(kernels, fake):
    for _ in range(2):
        (result,) = kernels.build(fake.toolchain(), ["FAIL"], SM90).values()
        assert isinstance(result, CompileError)
    assert len(fake.calls) == 1
    assert kernels.entries() == []
    assert not list(kernels.root.glob(".build-*"))


def test_a_missing_compiler_is_not_remembered(kernels, fake):
    without = dataclasses.replace(fake.toolchain(), host_compiler=None)
    (result,) = kernels.build(without, ["int x;"], SM90).values()
    assert isinstance(result, CompileError)
    assert build(kernels, fake).is_file()


@pytest.mark.parametrize(
    "harm",
    [
        lambda entry: damage(entry / "kernel.so"),
        lambda entry: (entry / "kernel.so").write_bytes(b""),
        lambda entry: (entry / "kernel.so").unlink(),
        lambda entry: (entry / "manifest.json").unlink(),
        lambda entry: (entry / "manifest.json").write_text("{"),
        lambda entry: (entry / "manifest.json").write_text("[]"),
        lambda entry: (entry / "manifest.json").write_text('{"schema": 1}'),
        lambda entry: (entry / "manifest.json").write_bytes(b"\xff\xfe"),
        lambda entry: (entry / "manifest.json").write_text("[" * 100_000),
        lambda entry: rename_binary(entry, "source.cu"),
        lambda entry: rename_binary(entry, "../kernel.so"),
        lambda entry: link(entry / "kernel.so"),
        lambda entry: link(entry / "manifest.json"),
        lambda entry: entry.chmod(0o770),
        lambda entry: entry.chmod(0o707),
        lambda entry: (shutil.rmtree(entry), entry.write_text("a file")),
    ],
)
def test_a_damaged_entry_is_passed_over_and_rebuilt(kernels, fake, harm):
    binary = build(kernels, fake)
    discarded = store.stats()["discarded"]
    harm(binary.parent)
    assert kernels.find(binary.parent.name) is None
    assert build(kernels, fake) == binary
    assert binary.read_text() == "int x;"
    assert len(fake.calls) == 2
    assert store.stats()["discarded"] == discarded + 1
    assert sorted(p.name for p in kernels.root.iterdir() if p.is_dir()) == [
        binary.parent.name
    ]


def test_an_entry_moved_to_another_name_or_linked_is_passed_over(kernels, fake):
    entry = build(kernels, fake).parent
    moved = entry.rename(entry.with_name("1" * 64))
    assert kernels.find(moved.name) is None
    entry.symlink_to(moved)
    assert kernels.find(entry.name) is None
    assert build(kernels, fake).parent == entry
    assert not entry.is_symlink()


def test_no_flipped_bit_and_no_cut_is_ever_loaded(kernels, fake):
    """Whatever find() returns is what was built, to the last bit."""
    binary = build(kernels, fake)
    rng = random.Random(0)
    refused = 0
    for path in (binary, binary.with_name("manifest.json")):
        content = path.read_bytes()
        for _ in range(300):
            harmed = bytearray(content)
            if rng.random() < 0.3:
                del harmed[rng.randrange(len(harmed)) :]
            else:
                harmed[rng.randrange(len(harmed))] ^= 1 << rng.randrange(8)
            path.write_bytes(harmed)
            found = kernels.find(binary.parent.name)
            assert found is None or found.read_text() == "int x;"
            # Of the manifest, some say nothing of the binary: its date, say.
            assert found is None or path != binary
            refused += found is None
        path.write_bytes(content)
    assert refused > 300
    assert kernels.find(binary.parent.name) == binary


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("name", ["", "kernel.so", "manifest.json"])
def test_what_another_user_owns_is_passed_over_and_rebuilt(kernels, fake, name):
    binary = build(kernels, fake)
    os.chown(binary.parent / name, 65534, 65534)
    assert kernels.find(binary.parent.name) is None
    assert build(kernels, fake) == binary
    assert (binary.parent / name).stat().st_uid == 0


@pytest.mark.parametrize("name", ["kernel.so", "manifest.json"])
@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_can_reach_and_write_is_passed_over(
    kernels, fake, name, mode
):
    binary = build(kernels, fake)
    (binary.parent / name).chmod(mode)
    # With a umask of 002 all files are like this, and their directory keeps others out.
    assert kernels.find(binary.parent.name) == binary
    binary.parent.chmod(0o755)
    assert kernels.find(binary.parent.name) is None
    assert build(kernels, fake) == binary
    assert stat.S_IMODE(binary.parent.stat().st_mode) == 0o700


def test_no_path_is_taken_for_a_digest(kernels, fake):
    binary = build(kernels, fake)
    elsewhere = binary.parent.rename(kernels.root.parent / "elsewhere")
    for name in ("../elsewhere", str(elsewhere)):
        document = json.loads((elsewhere / "manifest.json").read_text())
        document["digest"] = name
        (elsewhere / "manifest.json").write_text(json.dumps(document))
        assert kernels.find(name) is None


def test_only_the_users_own_directories_are_private(tmp_path, monkeypatch):
    assert directories.is_private(tmp_path.stat())
    file = tmp_path / "file"
    file.touch()
    assert not directories.is_private(file.stat())
    monkeypatch.setattr(directories.os, "geteuid", lambda: 4321)
    assert not directories.is_private(tmp_path.stat())
    with pytest.raises(CacheError, match=r"belongs to user \d+, .*chown -R 4321"):
        directories.require_private(tmp_path)


def test_as_many_compilers_as_a_container_has_cpus(kernels, fake, monkeypatch):
    """Of those it sees it may have a few, and memory for as many compilers."""
    parallel, seen = store._parallel, []

    def spy(build_one: Any, keys: Any, jobs: int, stop: Any) -> Any:
        seen.append(jobs)
        return parallel(build_one, keys, jobs, stop)

    monkeypatch.setattr(store, "_parallel", spy)
    monkeypatch.setattr(compiler, "cpus", lambda: 1.5)
    build(kernels, fake)
    assert seen == [2]


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_others_can_write_is_refused_with_the_fix(kernels, fake, mode):
    binary = build(kernels, fake)
    kernels.root.chmod(mode)
    fix = f"chmod go-w '{kernels.root}'"
    with pytest.raises(CacheError, match=fix):
        kernels.find(binary.parent.name)
    with pytest.raises(CacheError, match=fix):
        build(kernels, fake, "int y;")
    assert len(fake.calls) == 1
    assert subprocess.run(fix, shell=True, check=True).returncode == 0
    assert kernels.find(binary.parent.name) == binary


def test_a_cache_that_is_a_file_is_refused(kernels, fake):
    kernels.root.parent.mkdir()
    kernels.root.touch()
    with pytest.raises(CacheError, match="not a directory"):
        build(kernels, fake)


@pytest.fixture
def own_temporary(monkeypatch, tmp_path):
    """Undoes what falling back to the temporary cache does to the process."""
    monkeypatch.setattr(directories.tempfile, "tempdir", str(tmp_path))
    for function in (directories.temporary, directories.warn_temporary):
        function.cache_clear()
    yield
    for function in (directories.temporary, directories.warn_temporary):
        function.cache_clear()


@pytest.mark.parametrize("why", ["read-only", "cannot be made"])
def test_an_unwritable_cache_warns_once_and_kernels_live_in_the_process(
    kernels, fake, monkeypatch, caplog, own_temporary, why
):
    old = build(kernels, fake)
    chosen = kernels
    if why == "read-only":
        monkeypatch.setattr(directories.os, "access", lambda path, mode: False)
    else:
        chosen = Store(old / "below a file")
    caplog.set_level(logging.WARNING)
    first, second = build(chosen, fake, "int y;"), build(chosen, fake, "int z;")
    assert first.parents[1] == second.parents[1] == directories.temporary()
    assert stat.S_IMODE(directories.temporary().stat().st_mode) == 0o700
    assert chosen.find(first.parent.name) == first
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "JAX_BOLT_CACHE_DIR" in caplog.text
    if why == "read-only":
        assert build(kernels, fake) == old, "what is there is still read"


def test_a_compiler_that_finds_the_disk_full_is_not_the_kernels_fault(
    kernels, fake, own_temporary, caplog
):
    source = "FAIL\n// SAY ld: final link failed: No space left on device\n"
    (result,) = kernels.build(fake.toolchain(), [source], SM90).values()
    assert isinstance(result, CompileError)
    assert "cannot be stored" in str(result) and "No space left" in str(result)
    assert "make room there" in str(result)
    assert len(fake.calls) == 2, "once in the cache, once for this process alone"
    assert not store._failures, "a later call may try again"


def test_least_recently_used_goes_first(kernels, fake):
    binaries = [build(kernels, fake, f"int x{i}; {'/' * 5000}") for i in range(4)]
    now = time.time()
    # The oldest was used an hour ago, the others longer ago the later they were built.
    for binary, age in zip(binaries, (3600, 9000, 8000, 7000), strict=True):
        kernels.find(binary.parent.name)
        os.utime(binary.parent / "used", (now - age, now - age))
    assert [e.path for e in kernels.entries()] == [
        binaries[i].parent for i in (1, 2, 3, 0)
    ]
    sizes = {entry.path: entry.size for entry in kernels.entries()}
    removed = kernels.prune(sum(sizes.values()) - 1)
    assert removed == sizes[binaries[1].parent]
    assert [b.exists() for b in binaries] == [True, False, True, True]
    assert kernels.find(binaries[2].parent.name), "asking for it marks it as used"
    kernels.prune(0)
    assert [b.exists() for b in binaries] == [False, False, True, False]


def test_building_keeps_the_store_under_its_bound(kernels, fake):
    old = build(kernels, fake)
    kernels.find(old.parent.name)
    os.utime(old.parent / "used", (1, 1))
    new = build(Store(kernels.root, max_bytes=1), fake, "int y;")
    assert not old.exists()
    assert new.exists(), "what was just built is about to be loaded"


def test_clear_and_abandoned_builds(kernels, fake):
    binary = build(kernels, fake)
    kernels.build(fake.toolchain(), ["FAIL"], SM90)
    young, old = kernels.root / ".build-young", kernels.root / ".build-old"
    for path in (young, old):
        path.mkdir()
    os.utime(old, (1, 1))
    kernels.prune()
    assert (young.exists(), old.exists()) == (True, False)
    kernels.clear()
    assert not binary.exists()
    assert not young.exists()
    assert kernels.entries() == []
    calls = len(fake.calls)
    kernels.build(fake.toolchain(), ["FAIL"], SM90)
    assert len(fake.calls) == calls + 1, "failures are forgotten too"


def test_an_interrupt_ends_the_other_compilers(kernels, fake):
    def interrupt(key, result):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kernels.build(fake.toolchain(), ["int x;", "WAIT"], SM90, 2, interrupt)
    wait_for(lambda: not compiler._live)
    wait_for(lambda: not list(kernels.root.glob(".build-*")))
    assert [e.path.name for e in kernels.entries()] == [
        store.digest(fake.toolchain(), "int x;", SM90)
    ]
    assert not store._failures


BUILDER = """
import sys
from pathlib import Path
from fake_nvcc import toolchain
from jax_bolt._src import arch
from jax_bolt._src.jit import store
root, nvcc, ready = map(Path, sys.argv[1:4])
ready.touch()
result = store.Store(root).build(toolchain(nvcc), ["WAIT"], arch.from_name("sm_90a"))
print(store.stats()["compiled"], *result.values())
"""


def start_builder(kernels: Store, fake: FakeNvcc, ready: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BUILDER, kernels.root, fake.nvcc, ready],
        env=environ(),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_two_processes_build_one_key_once(kernels, fake, tmp_path):
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    builders = [start_builder(kernels, fake, path) for path in ready]
    wait_for(lambda: all(path.exists() for path in ready) and fake.calls)
    # Nothing of a build under way is visible.
    digest = store.digest(fake.toolchain(), "WAIT", SM90)
    assert kernels.find(digest) is None
    assert kernels.entries() == []
    time.sleep(0.3)  # for the other one to reach the lock
    fake.release()
    printed = [builder.communicate(timeout=60)[0].split() for builder in builders]
    assert sorted(words[0] for words in printed) == ["0", "1"]
    assert {words[1] for words in printed} == {str(kernels.find(digest))}
    assert len(fake.calls) == 1


def test_a_killed_builder_leaves_nothing_a_reader_can_see(kernels, fake, tmp_path):
    builder = start_builder(kernels, fake, tmp_path / "ready")
    wait_for(lambda: fake.calls)
    builder.send_signal(signal.SIGKILL)
    builder.communicate(timeout=60)
    digest = store.digest(fake.toolchain(), "WAIT", SM90)
    assert list(kernels.root.glob(".build-*"))
    assert kernels.find(digest) is None
    assert kernels.entries() == []
    fake.release()
    # Its lock went with it, its compiler did not: that one may still write, aside.
    assert build(kernels, fake, "WAIT").parent.name == digest
    assert len(fake.calls) == 2
