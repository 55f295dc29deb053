# SPDX-License-Identifier: Apache-2.0
"""The region timer on a driver whose time is a number, and XLA's CPU client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import pytest
from fakes import Build, program

from jax_bolt import _native


@pytest.fixture
def stopwatch(build: Build) -> Callable[..., dict[str, Any]]:
    driver = build("cuda.cc", "libcuda.so.1")

    def run(micros: int, late: int, **env: str) -> dict[str, Any]:
        seen = program(driver, "stopwatch.py", micros, late, **env)
        # Warm-up first; always whole rotations over the sets of operands.
        rotation = seen["executions"]
        assert rotation[:3] == [0, 1, 2] and len(rotation) % 3 == 0
        return seen

    return run


def rotations(seen: dict[str, Any]) -> int:
    return len(seen["executions"]) // 3


def test_time_per_region(stopwatch: Any) -> None:
    seen = stopwatch(100, 0)
    assert seen["micros"] == pytest.approx(100)
    # One to compile, one to estimate, then batches of about 2 ms.
    assert rotations(seen) == 2 + 7 * 7
    assert seen["unread"] == "the stopwatch has not been stopped"
    assert seen["objects"] == 0


def test_long_region(stopwatch: Any) -> None:
    seen = stopwatch(5000, 0)
    assert seen["micros"] == pytest.approx(5000)
    assert rotations(seen) == 2 + 7


def test_a_batch_the_host_could_not_queue_is_made_smaller(stopwatch: Any) -> None:
    seen = stopwatch(100, 2)  # the estimate's, and the first batch's
    assert seen["micros"] == pytest.approx(100)
    assert rotations(seen) == 2 + 7 + 7 * 3


def test_a_host_that_is_always_late(stopwatch: Any) -> None:
    seen = stopwatch(100, 1000)
    assert seen["micros"] == pytest.approx(100)
    assert rotations(seen) == 2 + 7 + 3 + 7 * 1


def test_a_mark_without_another_holds_the_device_up_for_a_moment(
    stopwatch: Any,
) -> None:
    seen = stopwatch(100, 0)
    assert 0.2 < seen["held_up_s"] < 10


@pytest.mark.parametrize(
    "failing",
    [
        *("cuLaunchHostFunc", "cuEventCreate", "cuEventRecord"),
        *("cuEventQuery", "cuEventElapsedTime"),
    ],
)
def test_errors(stopwatch: Any, failing: str) -> None:
    seen = stopwatch(100, 0, FAKE_CUDA_FAIL=failing)
    assert f"{failing}: CUDA_ERROR_FAKE" in seen["error"]


def test_handlers_register_for_cuda() -> None:
    handlers = _native.mark_handlers()
    jax.ffi.register_ffi_target("jax_bolt_test.mark", handlers, platform="CUDA")
