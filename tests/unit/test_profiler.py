# SPDX-License-Identifier: Apache-2.0
"""The native module's profiler and device queries, on a driver that only counts."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fakes import FAKES, Build

from jax_bolt import _native

GEMM = 0


@pytest.fixture(scope="session")
def kernel(build: Build) -> Path:
    path = build("kernel.cc", "kernel.so")
    _native.load("profiled", str(path))
    return path


@pytest.fixture
def profile(build: Build, kernel: Path) -> Callable[..., dict[str, Any]]:
    driver = build("cuda.cc", "libcuda.so.1")

    def run(m: int, sets: int, repeats: int, **env: str) -> dict[str, Any]:
        numbers = [str(n) for n in (m, sets, repeats)]
        script = str(FAKES / "profile.py")
        command = [sys.executable, script, _native.__file__, str(kernel), *numbers]
        env = os.environ | {"LD_LIBRARY_PATH": str(driver.parent)} | env
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen = json.loads(done.stdout)
        # Whatever happened, nothing is left behind.
        assert (seen["retained"], seen["pushed"], seen["objects"]) == (0, 0, 0)
        assert seen["launches"] == 0  # those are XLA's alone
        return seen

    return run


def test_profile_replays_a_graph(profile: Any) -> None:
    seen = profile(20, 3, 5)
    assert seen["times"] == pytest.approx([20.0] * 5)
    assert seen["graph_launches"] == 6  # one untimed
    # One to load, one pass to estimate, then the captured rotation: whole rounds.
    captured = seen["rotation"][4:]
    assert seen["rotation"][:4] == [100, 100, 101, 102]
    assert captured == [100, 101, 102] * (len(captured) // 3)
    assert 2000 <= 20 * len(captured) <= 5000
    assert seen["run"] == 1
    assert seen["sm_count"] == 132


def test_profile_visits_every_set(profile: Any) -> None:
    seen = profile(4000, 4, 2)
    assert seen["rotation"][5:] == [100, 101, 102, 103]
    assert seen["times"] == pytest.approx([4000.0] * 2)


@pytest.mark.parametrize(
    "failing",
    [
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
        "captured launch",
    ],
)
def test_profile_without_a_graph(profile: Any, failing: str) -> None:
    seen = profile(20, 2, 3, FAKE_CUDA_FAIL=failing)
    assert seen["times"] == pytest.approx([25.0] * 3)  # with each launch's own cost
    assert seen["graph_launches"] == 0


@pytest.mark.parametrize(
    ("failing", "message"),
    [
        ("cuInit", "cuInit: CUDA_ERROR_FAKE (a fake failure)"),
        ("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRetain: "),
        ("cuCtxPushCurrent_v2", "cuCtxPushCurrent: "),
        ("cuStreamCreate", "cuStreamCreate: "),
        ("cuEventCreate", "cuEventCreate: "),
        ("fake_launch", "launch: a fake CUDA error (status 719)"),
        ("cuStreamSynchronize", "cuStreamSynchronize: CUDA_ERROR_FAKE"),
        ("cuGraphLaunch", "cuGraphLaunch: CUDA_ERROR_FAKE (a fake failure)"),
        ("cuEventElapsedTime", "cuEventElapsedTime: "),
    ],
)
def test_profile_reports_errors(profile: Any, failing: str, message: str) -> None:
    seen = profile(20, 2, 3, FAKE_CUDA_FAIL=failing)
    assert seen["error"].startswith(f"RuntimeError: {message}")
    assert "times" not in seen


def test_profile_refuses_bad_arguments(kernel: Path, profile: Any) -> None:
    assert profile(20, 2, 0)["error"].startswith("ValueError: profile needs at least")
    one = (0, 0, [0], [], [], 0)
    dims = [4, 3, 5, 1]
    with pytest.raises(ValueError, match="at least one set"):
        _native.profile("profiled", GEMM, dims, [], 0, 1)
    with pytest.raises(ValueError, match="too many side inputs"):
        _native.run("profiled", GEMM, dims, (0, 0, [0], [1] * 4, [], 0), 0)
    with pytest.raises(ValueError, match="too many per-channel inputs"):
        _native.run("profiled", GEMM, dims, (0, 0, [0], [], [1] * 13, 0), 0)
    with pytest.raises(RuntimeError, match="kernel absent is not loaded"):
        _native.run("absent", GEMM, dims, one, 0)


def test_device_info(profile: Any) -> None:
    seen = profile(20, 1, 1)
    want = {
        "name": "Fake H100",
        "uuid": "01112131415161718191a1b1c1d1e1f1",
        "compute_capability": "9.0",
        "sm_count": 132,
        "l2_bytes": 50 << 20,
        "smem_per_block": 232448,
        "driver_version": 13000,
        "total_bytes": 80 << 30,
        "free_bytes": None,  # no context yet
    }
    assert (seen["device"], seen["driver_version"]) == (want, 13000)
    active = profile(20, 1, 1, FAKE_CUDA_ACTIVE="1")["device"]
    assert active == want | {"free_bytes": 20 << 30}


def test_no_driver(kernel: Path) -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("this machine has a CUDA driver")
    assert _native.driver_version() is None
    for call in (
        lambda: _native.device_info(),
        lambda: _native.workspace_bytes("profiled", GEMM, [1] * 4, 0),
        lambda: _native.run("profiled", GEMM, [1] * 4, (0, 0, [0], [], [], 0), 0),
    ):
        with pytest.raises(RuntimeError, match=r"no CUDA driver: libcuda\.so\.1"):
            call()
