# SPDX-License-Identifier: Apache-2.0
"""Sequences as CUDA graphs, on a driver that counts."""

from __future__ import annotations

from typing import Any

import pytest
from fakes import Build, program


@pytest.fixture
def calls(build: Build) -> Any:
    driver = build("cuda.cc", "libcuda.so.1")
    kernel = build("kernel.cc", "kernel.so")

    def run(count: int, operands: int = 2, more: int = 0, **env: str) -> dict[str, Any]:
        numbers = count, operands, more
        return program(driver, "graphs.py", kernel, *numbers, **env)

    return run


def test_the_second_call_on_the_same_buffers_is_a_graph(calls: Any) -> None:
    seen = calls(3)
    assert seen["graphs"] == [0, 0, 1, 2, 3, 4]
    assert seen["launches"] == [5, 10, 15, 20, 25, 30]
    # The driver's kernels compute without a stream alone: the first calls did.
    assert seen["sums"][:2] == [10.0, 20.0]


def test_more_buffers_than_graphs(calls: Any) -> None:
    """The first ones keep their graphs: none is made that only one call would use."""
    seen = calls(4, operands=40)
    assert seen["graphs"][39::40] == [0, 32, 64, 96]
    assert seen["launches"][-1] == 4 * 40 * 5


def test_graphs_that_are_not_used_make_room(calls: Any) -> None:
    seen = calls(3, operands=32, more=200)
    before, *_, after = seen["graphs"][95:]
    assert before == 64
    # The oldest one had been used 32 calls before the first of these.
    assert after - before == 200 - (128 - 32)


def test_no_graphs_beside_another_device(calls: Any) -> None:
    seen = calls(3, FAKE_CUDA_TWO_DEVICES="1")
    assert seen["graphs"] == [0] * 6
    assert seen["sums"] == [10.0, 20.0] * 3


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
    assert seen["sums"] == [10.0, 20.0] * 3
