# SPDX-License-Identifier: Apache-2.0
"""The tuning benchmark's arithmetic, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import bench_tuning, kernel_problems
from jax_bolt._src import arch, base, plan

HOPPER = arch.from_name("sm_90a")


@pytest.fixture(scope="module")
def problem() -> Any:
    first, *_ = kernel_problems.collect(["bert_base"], [32], 224, "bfloat16")
    return first


def test_the_space_holds_every_candidate_best_first(problem):
    space = bench_tuning.whole_space(problem.site, HOPPER)
    listed, _ = plan.candidates(problem.region, HOPPER)
    assert space[0].config == listed[0].config
    assert {c.config.text for c in listed} < {c.config.text for c in space}
    # None is left out for want of a base program.
    assert all(base.plain(c) is not None for c in space)


def test_the_summary_counts_ratios_and_ranks():
    results = [
        {"ratio": 1.0, "rank": 1},
        {"ratio": 1.21, "rank": 9},
        {"ratio": 1.0, "rank": None},
        {"ratio": 1.0, "rank": 8},
    ]
    found = bench_tuning.summary(results)
    assert found["ratio_geomean"] == pytest.approx(1.21**0.25)
    assert found["ratio_max"] == 1.21
    assert found["in_top_8"] == 0.5


def test_a_model_is_tuned_in_three_processes(monkeypatch, capsys):
    ran: list[tuple[list[str], str]] = []

    def run(command: list[str], cache: Path) -> str:
        ran.append((command, cache.name))
        counters = dict.fromkeys(bench_tuning._COUNTED, len(ran))
        times = {"from_import_s": 2.0, "tune_s": 1.0, "spent_s": {"XLA": 0.5}}
        return json.dumps(times | {"counters": counters})

    monkeypatch.setattr(bench_tuning, "_run", run)
    args = bench_tuning._arguments(["--batch", "8", "--image", "64"])
    found = bench_tuning.cost_of("resnet50", args)
    assert [cache for _, cache in ran] == ["library", "library", "library", "cold"]
    assert "warm" in ran[0][0]
    assert all("8" in command and "64" in command for command, _ in ran[1:])
    assert found["library"]["counters"]["tuned"] == 2
    assert found["cold"]["counters"]["tuned"] == 4
    assert "resnet50, next: 2.0 s from the import" in capsys.readouterr().out


def test_the_drawn_problems_are_the_same_every_time():
    with jax.numpy_dtype_promotion("standard"):
        first, second = (bench_tuning.drawn_problems(3) for _ in range(2))
    assert [p.text for p in first] == [p.text for p in second]
    assert len({p.text for p in first}) == 3
