# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
from fake_nvcc import FakeNvcc, wait_for

from jax_bolt._src import arch
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import compiler

SM90 = arch.from_name("sm_90a")


@pytest.fixture
def fake(tmp_path) -> FakeNvcc:
    return FakeNvcc(tmp_path / "cuda, with space")


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out, with space"
    path.mkdir()
    return path


def test_the_command(fake):
    command = compiler.command(fake.toolchain(), SM90)
    start = command.index(str(fake.nvcc))
    assert command[:start] in ([], [command[0], "-n", "10"])
    assert command[start + 1 :] == [
        *("-std=c++17", "-O3", "-DNDEBUG"),
        "-gencode=arch=compute_90a,code=sm_90a",
        *(
            "--expt-relaxed-constexpr",
            "-shared",
            "-Xcompiler=-fPIC,-fvisibility=hidden",
        ),
        *("-cudart=static", "-Xlinker=--exclude-libs=ALL", "-ccbin=/usr/bin/c++"),
        *("-Iwork/own", "-Iwork/cutlass", "-Iwork/cutlass_util"),
        *("-o", "kernel.so", "source.cu"),
    ]


def test_the_command_for_a_cubin(fake):
    command = compiler.command(fake.toolchain(), SM90, "cubin")
    start = command.index(str(fake.nvcc))
    assert command[start + 1 :] == [
        *("-std=c++17", "-O3", "-DNDEBUG"),
        "-gencode=arch=compute_90a,code=sm_90a",
        *("--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v"),
        "-ccbin=/usr/bin/c++",
        *("-Iwork/own", "-Iwork/cutlass", "-Iwork/cutlass_util"),
        *("-o", "kernel.cubin", "source.cu"),
    ]


def test_a_source_says_what_it_becomes(fake, out):
    assert compiler.artifact("int x;\nJAX_BOLT_KERNEL(A<1, 2>)\n") == "module"
    assert compiler.artifact("// JAX_BOLT_DEVICE_KERNEL(A)\n") == "module"
    source = "int x;\nJAX_BOLT_DEVICE_KERNEL(A<1, 2>)\n"
    assert compiler.artifact(source) == "cubin"
    binary = compiler.compile(fake.toolchain(), source, SM90, out)
    assert binary == out / "kernel.cubin"
    assert sorted(p.name for p in out.iterdir()) == [
        *("build.log", "kernel.cubin", "source.cu")
    ]


def test_a_spill_is_noted(fake, out, caplog):
    caplog.set_level("INFO")
    lines = ("0 bytes stack frame, 0 bytes spill stores", "72 bytes spill stores, 8")
    for i, line in enumerate(lines):
        place = out / str(i)
        place.mkdir()
        compiler.compile(fake.toolchain(), f"// SAY {line}\n", SM90, place)
    (record,) = caplog.records
    assert record.getMessage() == f"{out / '1'}: 72 bytes spill stores, 8"


def test_an_older_architecture_has_no_feature_suffix(fake):
    command = compiler.command(fake.toolchain(), arch.from_name("sm_80"))
    assert "-gencode=arch=compute_80,code=sm_80" in command


def test_flags_of_the_environment_are_part_of_the_flags(monkeypatch):
    plain = compiler.flags(SM90)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-allow-unsupported-compiler '-DA=1 2'")
    changed = compiler.flags(SM90)
    assert changed == (*plain, "-allow-unsupported-compiler", "-DA=1 2")


def test_compile_leaves_source_log_and_binary(fake, out):
    binary = compiler.compile(fake.toolchain(), "int x;\n", SM90, out)
    assert binary == out / "kernel.so"
    assert sorted(p.name for p in out.iterdir()) == [
        *("build.log", "kernel.so", "source.cu")
    ]
    assert (out / "source.cu").read_text() == "int x;\n"
    assert "-O3" in (out / "build.log").read_text()


def test_headers_are_reached_through_links(fake, out, monkeypatch):
    seen = {}

    def run(args, cwd, timeout_s, stop):
        for name in ("own", "cutlass", "cutlass_util"):
            seen[name] = (cwd / "work" / name).readlink()
        (cwd / "build.log").touch()
        (cwd / "kernel.so").touch()

    monkeypatch.setattr(compiler, "_run", run)
    toolchain = dataclasses.replace(
        fake.toolchain(), own_include=fake.home / "o", cutlass_include=fake.home / "c"
    )
    compiler.compile(toolchain, "", SM90, out)
    assert seen["own"] == fake.home / "o"
    assert seen["cutlass"] == fake.home / "c"
    assert seen["cutlass_util"] == fake.home / "include"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("FAIL", "status 2"),
        ("C7510", "serialised wgmma"),
        ("NOTHING", "wrote no kernel.so"),
        ("NOTHING\nJAX_BOLT_DEVICE_KERNEL(A)", "wrote no kernel.cubin"),
        ("C7510\nJAX_BOLT_DEVICE_KERNEL(A)", "serialised wgmma"),
    ],
)
def test_failures_carry_the_log(fake, out, source, message):
    with pytest.raises(CompileError, match=f"sm_90a.*{message}") as caught:
        compiler.compile(fake.toolchain(), source, SM90, out)
    assert caught.value.log == (out / "build.log").read_text()
    if source == "FAIL":
        assert "error: FAIL is not defined" in caught.value.log
        assert "error: FAIL is not defined" in str(caught.value)
    assert not (out / "work").exists()


def test_a_compile_error_pickles():
    error = pickle.loads(pickle.dumps(CompileError("what", "line 1\nline 2")))
    assert str(error) == "what\nline 1\nline 2"
    assert (error.message, error.log) == ("what", "line 1\nline 2")


def test_the_text_of_an_error_is_what_matters_of_the_log():
    inside = "  instantiation of something long\n" * 200
    log = f"nvcc -O3\nx.hpp(1): error: one\n{inside}x.hpp(2): error: {'two ' * 999}\n"
    error = CompileError("what", log)
    first, one, two = str(error).splitlines()
    assert (first, one) == ("what", "x.hpp(1): error: one")
    assert two.startswith("x.hpp(2): error: two two")
    assert len(two) == 300
    assert error.log == log


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_compiler_that_hangs_is_ended(fake, out):
    with pytest.raises(CompileError, match=r"longer than 0\.5 s"):
        compiler.compile(fake.toolchain(), "WAIT", SM90, out, timeout_s=0.5)
    wait_for(lambda: not _is_running(fake.calls[0]), 10)


def test_stopping_ends_the_compiler_soon(fake, out):
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    start = time.monotonic()
    with pytest.raises(CompileError, match="interrupted"):
        compiler.compile(fake.toolchain(), "WAIT", SM90, out, stop=stop)
    assert time.monotonic() - start < 30
    wait_for(lambda: not _is_running(fake.calls[0]), 10)


def test_where_memory_is_short_the_compiler_goes_first(fake, out):
    stop = threading.Event()

    def compile() -> None:
        with contextlib.suppress(CompileError):
            compiler.compile(fake.toolchain(), "WAIT", SM90, out, stop=stop)

    thread = threading.Thread(target=compile)
    thread.start()
    try:
        wait_for(lambda: fake.calls)
        score = Path(f"/proc/{fake.calls[0]}/oom_score_adj")
        wait_for(lambda: score.read_text() == "1000\n", 10)
    finally:
        stop.set()
        thread.join()


def test_no_host_compiler_is_said_before_anything_runs(fake, out):
    toolchain = dataclasses.replace(fake.toolchain(), host_compiler=None)
    with pytest.raises(CompileError, match=r"install g\+\+"):
        compiler.compile(toolchain, "int x;", SM90, out)
    assert fake.calls == []


def test_an_nvcc_that_cannot_run_is_an_error(fake, out, monkeypatch):
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    fake.nvcc.unlink()
    with pytest.raises(CompileError, match=r"cannot run .*nvcc"):
        compiler.compile(fake.toolchain(), "int x;", SM90, out)
