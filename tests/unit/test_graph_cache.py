# SPDX-License-Identifier: Apache-2.0
"""Sequences as CUDA graphs, on a driver that counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from fakes import FAKES, Build


@pytest.fixture
def calls(build: Build) -> Any:
    driver = build("cuda.cc", "libcuda.so.1")
    kernel = build("kernel.cc", "kernel.so")

    def run(count: int, **env: str) -> dict[str, Any]:
        env = {"LD_LIBRARY_PATH": str(driver.parent), "JAX_PLATFORMS": "cpu"} | env
        done = subprocess.run(
            [sys.executable, "-P", str(FAKES / "graphs.py"), str(kernel), str(count)],
            env=os.environ | env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_the_second_call_on_the_same_buffers_is_a_graph(calls: Any) -> None:
    seen = calls(3)
    assert seen["graphs"] == [0, 1, 2, 2, 3, 4]
    assert seen["launches"] == [5, 10, 15, 20, 25, 30]
    # The driver's kernels compute without a stream alone: both first calls did.
    assert [seen["sums"][i] for i in (0, 3)] == [10.0, 30.0]


@pytest.mark.parametrize(
    "failing",
    [
        *("cuStreamIsCapturing", "cuStreamCreate", "cuStreamBeginCapture_v2"),
        *("cuStreamEndCapture", "cuGraphInstantiateWithFlags", "cuGraphLaunch"),
        "captured launch",
    ],
)
def test_what_cannot_be_a_graph_is_launched(calls: Any, failing: str) -> None:
    seen = calls(3, FAKE_CUDA_FAIL=failing)
    assert seen["graphs"] == [0] * 6
    assert seen["launches"] == [5, 10, 15, 20, 25, 30]
    assert seen["sums"] == [10.0] * 3 + [30.0] * 3
