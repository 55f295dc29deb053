# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt doctor``, on machines that lack one thing or another."""

from __future__ import annotations

import contextvars
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_nvcc import FakeNvcc
from fakes import Build

import jax_bolt
from jax_bolt._src import api, arch, base, cli, compat, doctor_command, options, paths
from jax_bolt._src.errors import CompileError
from jax_bolt._src.jit import loader, store
from jax_bolt._src.tune import db
from jax_bolt._src.warm import gpus

H200 = ("9.0", "NVIDIA H200")
DEVICE = namedtuple("Device", "device_kind")("NVIDIA H200")


@pytest.fixture
def nvcc(
    fake: FakeNvcc, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeNvcc]:
    monkeypatch.setattr(store, "_failures", {})
    for name in ("CUDA_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    # The environment is the test's own after it.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with options.options(cuda_home=fake.home):
        yield fake


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with an H200, on which nothing is run in earnest."""
    monkeypatch.setattr(gpus, "look", lambda: ("580.1", [H200]))
    monkeypatch.setattr(compat, "cuda_device", lambda: DEVICE)
    monkeypatch.setattr(api, "optimize", pretended(lambda y: y))


def pretended(change: Callable) -> Callable:
    """``optimize`` that says it loaded a kernel, whose result is ``change`` of XLA's"""

    def optimize(fun, **given):
        assert given == {"on_miss": "heuristic", "on_error": "raise"}

        def call(*args):
            store.count("loaded")
            return change(fun(*args))

        return call

    return optimize


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """What is said by subject, as "state text fix"; ``wrong`` names what is wrong."""

    def doctor(*arguments: str, wrong: tuple[str, ...] = ()) -> dict[str, str]:
        capsys.readouterr()
        status = cli.main(["doctor", *arguments])
        printed, said = capsys.readouterr()
        assert said == ""
        found: dict[str, str] = {}
        subject = ""
        for line in printed.splitlines()[1:-2]:
            if line[:6].strip():
                subject = line[7:17].strip()
                assert subject not in found or subject in ("GPU", "options")
            found[subject] = f"{found.get(subject, '')} {line}"
        states = {s for s, text in found.items() if re.search(r" wrong  +\w", text)}
        assert states == set(wrong), printed
        assert status == bool(wrong)
        assert ("Nothing stops kernels" in printed) == (not wrong)
        return found

    return doctor


def test_a_machine_that_has_all(nvcc, gpu, doctor):
    found = doctor()
    assert (
        list(found)
        == (
            "options launcher driver GPU compiler cache tuned sm_90a library JAX kernel"
        ).split()
    )
    assert "580.1" in found["driver"]
    assert "NVIDIA H200, compute capability 9.0 (sm_90a)" in found["GPU"]
    assert str(nvcc.nvcc) in found["compiler"] and "CUTLASS 4." in found["compiler"]
    assert "note" in found["library"] and "0 of " in found["library"]
    assert "`python -m jax_bolt warm` " in found["library"]


def test_the_library_is_there(nvcc, gpu, doctor, monkeypatch):
    monkeypatch.setattr(gpus, "look", lambda: ("1", [("8.0", "NVIDIA A100")]))
    assert cli.main(["warm", "--arch", "sm_80"]) == 0
    count = len(base.sources(arch.from_name("sm_80"))) + 2
    found = doctor()
    assert f"{count} of {count} kernels" in found["library"]
    assert "ok" in found["library"]
    assert f"{count} kernels, " in found["cache"]


def test_no_gpu_is_wrong_unless_an_architecture_is_named(nvcc, doctor, monkeypatch):
    def look():
        raise OSError("libnvidia-ml.so.1: no such file")

    monkeypatch.setattr(gpus, "look", look)
    assert "--arch sm_90a" in doctor(wrong=("driver",))["driver"]
    found = doctor("--arch", "sm_90a")
    assert not {"driver", "GPU", "JAX", "kernel"} & set(found)
    assert "a kernel compiles" in found["sm_90a"]
    assert "`python -m jax_bolt warm --arch sm_90a`" in found["library"]
    found = doctor("--arch", "sm_75", wrong=("sm_75",))
    assert "8.0 and up" in found["sm_75"]


def test_the_driver_sees_no_gpu(nvcc, doctor, monkeypatch):
    monkeypatch.setattr(gpus, "look", lambda: ("580.1", []))
    assert "nvidia-smi" in doctor(wrong=("GPU",))["GPU"]


def test_a_gpu_without_kernels_is_a_note_beside_one_with(
    nvcc, gpu, doctor, monkeypatch
):
    old = ("6.0", "Tesla P100")
    monkeypatch.setattr(gpus, "look", lambda: ("580.1", [old, H200]))
    assert "note" in doctor()["GPU"]
    for seen in (old, ("7.5", "Tesla T4")):
        monkeypatch.setattr(gpus, "look", lambda seen=seen: ("580.1", [seen]))
        printed = doctor_states(doctor_command._findings(options.current(), None))
        assert ("wrong", "GPU") in printed and ("note", "GPU") in printed


def doctor_states(findings) -> list[tuple[str, str]]:
    return [(finding.state, finding.subject) for finding in findings]


def test_no_compiler(nvcc, gpu, doctor):
    with options.options(cuda_home=nvcc.home / "missing"):
        found = doctor(wrong=("compiler",))
    assert "correct the option cuda_home" in found["compiler"]
    assert "kernel" not in found


def test_no_host_compiler(nvcc, gpu, doctor, monkeypatch):
    monkeypatch.setenv("PATH", str(nvcc.home))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("NVCC_CCBIN", raising=False)
    assert "install g++" in doctor(wrong=("compiler",))["compiler"]


def test_a_compiler_that_fails(nvcc, gpu, doctor):
    nvcc.nvcc.write_text(nvcc.nvcc.read_text().replace("grep -q FAIL", "true"))
    found = doctor(wrong=("sm_90a",))
    assert "FAIL is not defined" in found["sm_90a"] and "CXX" in found["sm_90a"]
    assert "kernel" not in found


def test_a_compiler_that_is_too_old_for_the_gpu(tmp_path, nvcc, doctor):
    old = FakeNvcc(tmp_path / "old", "12.4.99")
    with options.options(cuda_home=old.home):
        found = doctor("--arch", "sm_100a", wrong=("sm_100a",))
    assert "sm_100a needs 12.8 or newer" in found["sm_100a"]


def test_the_launcher_is_missing(nvcc, gpu, doctor, monkeypatch):
    def native():
        raise CompileError("no module: reinstall jax_bolt")

    monkeypatch.setattr(loader, "native", native)
    assert "reinstall" in doctor(wrong=("launcher",))["launcher"]


def test_jax_sees_no_gpu(nvcc, gpu, doctor, monkeypatch):
    monkeypatch.setattr(compat, "cuda_device", lambda: None)
    assert "pip install" in doctor(wrong=("JAX",))["JAX"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES" in doctor(wrong=("JAX",))["JAX"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "unset JAX_PLATFORMS, which is cpu" in doctor(wrong=("JAX",))["JAX"]


def test_a_kernel_that_fails_or_is_wrong_or_does_not_run(
    nvcc, gpu, doctor, monkeypatch
):
    def fails(y):
        raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")

    def says_nothing(y):
        raise RuntimeError

    for change, said in (
        (fails, "NO_BINARY_FOR_GPU"),
        (says_nothing, "report this"),
        (lambda y: y * 1.5, "differs from XLA's by 5.0e-01"),
        (lambda y: y * np.nan, "differs"),
    ):
        monkeypatch.setattr(api, "optimize", pretended(change))
        assert said in doctor(wrong=("kernel",))["kernel"]
    monkeypatch.setattr(api, "optimize", lambda fun, **given: fun)
    assert "ran on XLA" in doctor(wrong=("kernel",))["kernel"]


def test_caches(nvcc, gpu, doctor, cache_dir, monkeypatch):
    assert not cache_dir.exists()
    doctor()
    assert not cache_dir.exists()  # it only looks
    kernels = paths.kernel_root(options.current())
    kernels.mkdir(parents=True)
    kernels.chmod(0o777)
    assert "chmod go-w" in doctor(wrong=("cache",))["cache"]
    kernels.rmdir()
    kernels.write_text("")
    assert "remove it" in doctor(wrong=("cache",))["cache"]
    kernels.unlink()
    with options.options(cache_dir="/proc/self/nowhere"):
        found = doctor()["cache"]
        assert "note" in found and "free" not in found
        assert "/proc/self/nowhere/kernels cannot be created: " in found
        assert "set JAX_BOLT_CACHE_DIR to another" in found
    assert list(cache_dir.iterdir()) == []
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9, 9, 2**20))
    assert "1 MiB free" in doctor()["cache"]
    monkeypatch.setattr(doctor_command.os, "access", lambda path, mode: False)
    assert "read-only" in doctor()["cache"]

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    finding = doctor_command._cache(options.current())
    assert finding.state == "wrong" and "Permission denied" in finding.text


def test_tuning_results_are_counted(nvcc, doctor, cache_dir):
    results = db.Database(paths.tuning_root(options.current()))
    entry = db.Entry(choice="xla", xla_time_us=1.0)
    for device in ("NVIDIA H200 132 SMs sm_90a", "NVIDIA A100 108 SMs sm_80"):
        results.merge(db.Results(device=device, entries={"r": entry}), lambda e: True)
    found = doctor("--arch", "sm_90a")["tuned"]
    assert "2 tuning results, 1 of sm_90a" in found


def test_an_unknown_variable_is_a_note(nvcc, gpu, doctor, monkeypatch):
    monkeypatch.setenv("JAX_BOLT_ONMISS", "xla")
    found = doctor()["options"]
    assert "note" in found and "did you mean JAX_BOLT_ON_MISS?" in found


@pytest.fixture
def environment(fake, cache_dir, monkeypatch):
    """Sets variables, which are the only ones then, with a compiler among them."""
    for name in [name for name in os.environ if name.startswith("JAX_BOLT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(store, "_failures", {})
    monkeypatch.setattr(options, "_active", contextvars.ContextVar("a", default=None))

    def environment(**texts):
        for name, text in {"CUDA_HOME": str(fake.home), **texts}.items():
            monkeypatch.setenv(f"JAX_BOLT_{name}", text)
        options._environment.cache_clear()

    yield environment
    options._environment.cache_clear()


def test_all_bad_variables_are_told_and_the_rest_is_looked_at(
    environment, doctor, cache_dir, capsys
):
    environment(JOBS="many", ON_MISS="never", CACHE_DIR=str(cache_dir))
    found = doctor("--arch", "sm_90a", wrong=("options",))
    assert "JAX_BOLT_JOBS='many' must be a whole number" in found["options"]
    assert "JAX_BOLT_ON_MISS='never' must be one of" in found["options"]
    assert found["options"].count("wrong ") == 2
    # What is right counts, too, and is told.
    assert re.search(r"ok +options +JAX_BOLT_CACHE_DIR=\S+, JAX", found["options"])
    assert str(cache_dir) in found["cache"] and "a kernel compiles" in found["sm_90a"]
    assert cli.main(["doctor", "--arch", "sm_90a"]) == 1
    assert "every call raises ValueError" in capsys.readouterr().out
    with pytest.raises(ValueError, match="JAX_BOLT_"):
        options.current()
    assert cli.main(["cache", "size"]) == 2
    assert "JAX_BOLT_" in capsys.readouterr().err


def test_a_bad_variable_that_counts_at_import_alone_stops_nothing(environment, doctor):
    environment(WARM="sometimes")
    found = doctor("--arch", "sm_90a")
    assert "note" in found["options"] and "'sometimes' must be" in found["options"]
    assert "in the background" in found["options"]
    assert options.current().warm == "build"


def test_an_unknown_architecture(capsys):
    assert cli.main(["doctor", "--arch", "sm_1"]) == 2
    assert "unknown architecture 'sm_1'" in capsys.readouterr().err


def test_looking_for_gpus_reads_nvml(build: Build, monkeypatch):
    library = build("nvml.cc", "libnvidia-ml.so.1")
    real = gpus.ctypes.CDLL
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: real(str(library)))
    a100 = "NVIDIA A100-SXM4-40GB"
    driver, seen = gpus.look()
    assert driver == "580.00.01"
    assert seen == [("8.0", a100), ("8.0", a100), ("6.0", a100)]
    assert [found.name for found in gpus.architectures()] == ["sm_80"]


def test_the_small_kernel_is_right_where_it_runs(monkeypatch):
    """Without pretence: what ``doctor`` runs is a function that can be optimized."""
    monkeypatch.setattr(
        store, "stats", iter([{"loaded": 0}, {"loaded": 1}]).__next__, raising=True
    )
    assert doctor_command._runs().state == "ok"
    assert jax_bolt.optimize is api.optimize
