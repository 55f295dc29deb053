# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt warm``."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_nvcc import FakeNvcc
from fresh_python import environ

from jax_bolt._src import arch, base, cli, ir, kernels, options, paths, plan
from jax_bolt._src.jit import directories, store, toolchain
from jax_bolt._src.tune import db
from jax_bolt._src.warm import gpus, library, usage

A100 = arch.of_device("8.0", "NVIDIA A100-SXM4-40GB")
COUNT = len(base.sources(A100)) + 2


@pytest.fixture
def nvcc(
    fake: FakeNvcc, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeNvcc]:
    monkeypatch.setattr(store, "_failures", {})
    with options.options(cuda_home=fake.home):
        yield fake


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a command that is to end with ``status``; what it printed, what it said."""

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        try:
            found = cli.main(["warm", *arguments])
        except SystemExit as exit:
            found = exit.code
        printed, said = capsys.readouterr()
        assert found == status, said
        return printed, said

    return run


def test_without_a_gpu(nvcc, run, cache_dir):
    printed, said = run("--arch", "sm_80")
    first, started, done = printed.splitlines()
    assert str(cache_dir / "kernels") in first and str(nvcc.nvcc) in first
    assert started == f"sm_80: {COUNT} kernels ..."
    assert re.fullmatch(
        rf"sm_80: 0 were there, {COUNT} were built and 0 failed, in \d+\.\d s", done
    )
    assert said == ""  # no bar where there is no terminal
    assert len(nvcc.calls) == COUNT
    assert len(list((cache_dir / "kernels").glob("*/cast.cubin"))) == 2
    printed, _ = run("--arch", "80", "--jobs", "3")
    assert f"{COUNT} were there, 0 were built" in printed
    assert len(nvcc.calls) == COUNT


def test_hopper_has_a_library_of_hundreds(nvcc, monkeypatch):
    hopper = arch.from_name("sm_90a")
    tools = toolchain.find(options.current())
    sources = library.sources(hopper, options.current(), tools)
    assert len(sources) == len(set(sources)) > 100
    assert set(base.sources(hopper)) < set(sources)


def test_the_gpus_of_this_machine(nvcc, run, monkeypatch):
    monkeypatch.setattr(gpus, "architectures", lambda: [A100])
    printed, _ = run()
    assert f"sm_80: 0 were there, {COUNT} were built" in printed
    monkeypatch.setattr(gpus, "architectures", list)
    _, said = run(status=1)
    assert "no GPU here is one that jax_bolt has kernels for: sm_80," in said


def test_no_gpu_and_no_name(nvcc, run):
    _, said = run(status=2)
    assert "no NVIDIA GPU is seen here (libnvidia-ml" in said
    assert "--arch sm_90a" in said and "sm_120" in said and "sm_75" not in said


def test_unknown_names(nvcc, run):
    _, said = run("--arch", "hopper", status=2)
    assert "unknown architecture 'hopper'; known: sm_80 (" in said
    _, said = run("--arch", "sm_75", status=1)
    assert "no kernels for sm_75" in said
    for jobs in ("0", "-1", "many"):
        run("--arch", "sm_80", "--jobs", jobs, status=2)
    assert not nvcc.calls


def test_no_compiler(nvcc, run):
    nvcc.nvcc.unlink()
    _, said = run("--arch", "sm_80", status=1)
    assert "there is no such file" in said and "JAX_BOLT_CUDA_HOME" in said


def test_an_old_compiler(nvcc, run):
    _, said = run("--arch", "sm_80")
    script = nvcc.nvcc.read_text().replace("13.0", "12.4")
    nvcc.nvcc.write_text(script)
    toolchain._find.cache_clear()
    toolchain._run.cache_clear()
    _, said = run("--arch", "sm_100a", status=1)
    assert "sm_100a needs 12.8 or newer" in said


def test_kernels_that_do_not_compile(nvcc, run):
    script = nvcc.nvcc.read_text()
    nvcc.nvcc.write_text(script.replace("grep -q FAIL", "grep -q CAST"))
    printed, said = run("--arch", "sm_80", status=1)
    assert f"{COUNT - 2} were built and 2 failed" in printed
    assert "kernels are missing. a kernel for sm_80 does not compile" in said
    assert "error: FAIL is not defined" in said


def test_a_cache_that_cannot_be_written(nvcc, run, cache_dir, tmp_path, monkeypatch):
    made = tmp_path / "temporary"
    made.mkdir(mode=0o700)
    monkeypatch.setattr(directories, "temporary", lambda: made)
    monkeypatch.setattr(directories, "has_temporary", lambda: True)
    monkeypatch.setattr(directories, "make", lambda root: "it is read-only")
    monkeypatch.setattr(directories, "warn_temporary", lambda root, problem: None)
    _, said = run("--arch", "sm_80", status=1)
    assert f"kernels cannot be stored in {cache_dir / 'kernels'}" in said
    assert len(nvcc.calls) < COUNT, "and no more of them are built"


def test_nothing_to_build_in_a_cache_that_is_read_only(nvcc, run, monkeypatch):
    run("--arch", "sm_80")

    def read_only(*_: Any) -> Path:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(usage, "complete", read_only)
    printed, _ = run("--arch", "sm_80")
    assert f"{COUNT} were there" in printed


def test_a_library_that_was_cleared_meanwhile_is_not_complete(nvcc):
    active = options.current()
    tools = toolchain.find(active)
    wanted = library.sources(A100, active, tools)[:3]
    kernels = store.Store(paths.kernel_root(active))
    steps: list[None] = []

    def step() -> None:
        steps.append(None)
        if len(steps) == len(wanted):
            kernels.clear()

    library.build(A100, wanted, active, tools, 1, step)
    assert not usage.complete(A100, active, tools).exists()
    library.build(A100, wanted, active, tools, 1)
    assert usage.complete(A100, active, tools).exists()


def test_the_program_itself(nvcc, cache_dir):
    done = subprocess.run(
        [sys.executable, "-P", "-m", "jax_bolt", "warm", "--arch", "sm_80"],
        env=environ(
            JAX_BOLT_CACHE_DIR=str(cache_dir), JAX_BOLT_CUDA_HOME=str(nvcc.home)
        ),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{COUNT} were built" in done.stdout


# --- What was in use when the compiler changed


def region(n: int) -> ir.Region:
    problem = ir.GemmProblem(m=256, n=n, k=256, dtype="bf16")
    ops = (ir.Op("acc"), ir.Op("const", attr=float(n)), ir.Op("add", (0, 1)))
    return ir.Region(problem=problem, epilogue=ir.Epilogue(ops, 2, "bf16"))


def chosen(n: int, **changes: Any) -> tuple[ir.Region, plan.Candidate, db.Entry]:
    made = plan.heuristic(region(n), A100)
    assert isinstance(made, plan.Plan)
    entry = db.Entry(
        choice="kernel",
        form=made.candidate.form.name,
        template=made.candidate.template.name,
        config=made.candidate.config.text,
        sources=toolchain.sources(kernels.HEADERS),
        compiler="nvcc 1.2",
    )
    return region(n), made.candidate, dataclasses.replace(entry, **changes)


def test_kernels_in_use_are_built_first_when_the_compiler_changed(nvcc):
    active = options.current()
    tools = toolchain.find(active)
    kernels = store.Store(paths.kernel_root(active))
    results = db.Database(paths.tuning_root(active))

    def use(n: int, days: float, **changes: Any) -> str:
        """A result with a kernel that was used so many days ago; its source."""
        problem, candidate, entry = chosen(n, **changes)
        stored = nvcc.build(kernels, f"int x{n};").parent
        when = time.time() - days * 86400
        (stored / "used").touch()
        os.utime(stored / "used", (when, when))
        entry = dataclasses.replace(entry, digest=stored.name)
        results.put(A100, {problem: entry})
        return candidate.source

    wanted = use(8, 1)
    use(16, 40)
    use(24, 1, compiler=f"nvcc {tools.version}")
    use(32, 1, choice="xla")
    use(40, 1, config="gone")
    results.put(arch.from_name("sm_90a"), {chosen(48)[0]: chosen(48)[2]})
    plain = base.sources(A100)
    assert wanted not in plain
    found = library.sources(A100, active, tools)
    assert found[0] == wanted
    assert len(found) == len(plain) + 3
    assert usage.RECENT_S == 30 * 86400
