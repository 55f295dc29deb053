# SPDX-License-Identifier: Apache-2.0
"""The model benchmark's bookkeeping: ratios, failures, the file and the exit code."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_models, second_process
from benchmarks.models import models
from benchmarks.models.repvgg import RepVGG

EXACT = {"relative_l2": 0.01, "max_abs": 0.1, "first_call_s": 1.0}


def _result(jit: float, fusion: float | None, bolt: float, error: float = 0.01) -> Any:
    variants = {
        "jit": {**EXACT, "queued_ms": jit, "wall_ms": 2 * jit},
        "jit_conv_fusion": {"error": "no such option"},
        "jax_bolt": {
            **EXACT,
            "queued_ms": bolt,
            "wall_ms": 2 * bolt,
            "relative_l2": error,
        },
        "jax_bolt+freeze": {
            **EXACT,
            "queued_ms": bolt / 2,
            "wall_ms": bolt,
            "relative_l2": error / 2,
        },
    }
    if fusion is not None:
        variants["jit_conv_fusion"] = {**EXACT, "queued_ms": fusion}
    result = {"title": "Model", "floor_ms": 0.5, "variants": variants}
    return result | {"ratios": bench_models.ratios(result)}


class StandIn:
    """Plain jax.jit under the optimized function's interface."""

    def __init__(self, apply: Any, bias: float = 0.0):
        self._run = jax.jit(lambda variables, x: apply(variables, x) + bias)

    def __call__(self, *args: Any) -> Any:
        return self._run(*args)

    def explain(self, *args: Any) -> StandIn:
        return self

    def to_json(self) -> str:
        return json.dumps({"sites": [{"name": "stem", "kernel": "k"}]})


def freeze(apply: Any, variables: Any, bias: float = 0.0) -> Any:
    return functools.partial(StandIn(apply, bias), variables)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments for a run over one very small model."""
    monkeypatch.setenv("XLA_FLAGS", "")
    make = functools.partial(RepVGG, stages=(1,), widths=(8,), stem=8)
    monkeypatch.setitem(models.MODELS, "tiny", models.Model("Tiny", make, 3))
    sizes = ["--quick", "--batch", "2", "--image", "16"]
    return [*sizes, "--models", "tiny", "--out", str(tmp_path)]


def _written(folder: Path) -> Any:
    (path,) = folder.glob("models-*.json")
    return json.loads(path.read_text())


def test_ratios_are_against_plain_and_the_better_xla() -> None:
    found = _result(2.0, 1.6, 0.8)["ratios"]
    assert found["jit_over_bolt_queued_ms"] == pytest.approx(2.5)
    assert found["best_xla_over_bolt_queued_ms"] == pytest.approx(2.0)
    assert found["bolt_over_floor_queued_ms"] == pytest.approx(1.6)
    assert found["error"] == pytest.approx(1.0)
    assert found["best_xla_over_frozen_queued_ms"] == pytest.approx(4.0)
    assert found["jit_over_frozen_wall_ms"] == pytest.approx(5.0)
    assert found["error_frozen"] == pytest.approx(0.5)


def test_refused_fusion_flag_is_no_failure() -> None:
    result = _result(2.0, None, 1.0)
    assert bench_models.problems(result) == []
    assert result["ratios"]["best_xla_over_bolt_queued_ms"] == pytest.approx(2.0)


@pytest.mark.parametrize(("error", "fails"), [(0.0125, False), (0.0126, True)])
def test_larger_error_is_a_failure(error: float, fails: bool) -> None:
    assert bool(bench_models.problems(_result(2.0, 1.6, 0.8, error))) is fails


def test_nan_is_a_failure() -> None:
    assert bench_models.problems(_result(2.0, 1.6, 0.8, float("nan")))


@pytest.mark.parametrize("key", ["error", "trace_error"])
@pytest.mark.parametrize("variant", ["jit", "jax_bolt", "jax_bolt+freeze"])
def test_failed_variant_is_a_failure(variant: str, key: str) -> None:
    result = _result(2.0, 1.6, 0.8)
    result["variants"][variant][key] = "RuntimeError: boom"
    assert bench_models.problems(result) == [f"{variant}: RuntimeError: boom"]


def test_table_has_the_geometric_mean_of_device_times() -> None:
    results = {
        "a": _result(2.0, 1.0, 1.0),
        "b": _result(8.0, 4.0, 1.0),
        "c": {"error": "MemoryError: none left"},
    }
    text = bench_models.table(results)
    assert "geometric mean, jit/bolt, queued: 4.000" in text
    assert "geometric mean, XLA/bolt, queued: 2.000" in text
    assert "geometric mean, XLA/frozen, queued: 4.000" in text
    assert "MemoryError: none left" in text


def test_run_writes_the_file(tiny: list[str], tmp_path: Path) -> None:
    assert bench_models.main(tiny, StandIn, freeze) == 0
    document = _written(tmp_path)
    result = document["models"]["tiny"]
    assert result["roots"] == 3
    assert result["report"]["sites"][0]["name"] == "stem"
    assert result["ratios"]["error"] == pytest.approx(1)
    ours = ("jax_bolt", "jax_bolt+freeze")
    assert set(result["variants"]) == {"jit", "jit_conv_fusion", *ours}
    for variant in ("jit", *ours):
        assert result["variants"][variant]["wall_ms"] > 0
    assert document["environment"]["versions"]["jax"] == jax.__version__
    assert document["settings"]["batch"] == 2


def test_wrong_results_fail_the_run(tiny: list[str], tmp_path: Path) -> None:
    assert bench_models.main(tiny, functools.partial(StandIn, bias=1.0), freeze) == 1
    assert _written(tmp_path)["models"]["tiny"]["ratios"]["error"] > 2


def test_wrong_frozen_results_fail_the_run(tiny: list[str], tmp_path: Path) -> None:
    assert bench_models.main(tiny, StandIn, functools.partial(freeze, bias=1.0)) == 1
    assert _written(tmp_path)["models"]["tiny"]["ratios"]["error_frozen"] > 2


def test_failing_model_is_recorded_and_the_run_goes_on(
    tiny: list[str], tmp_path: Path
) -> None:
    def broken(apply: Any) -> Any:
        def call(*args: Any) -> Any:
            raise RuntimeError("boom")

        return call

    assert bench_models.main(tiny, broken, freeze) == 1
    variants = _written(tmp_path)["models"]["tiny"]["variants"]
    assert variants["jax_bolt"]["error"] == "RuntimeError: boom"
    assert variants["jit"]["wall_ms"] > 0


@pytest.mark.parametrize(
    ("compiled", "tuned", "seconds", "count"),
    [(0, 0, 3.9, 0), (1, 0, 3.0, 1), (0, 2, 3.0, 1), (0, 0, 4.1, 1), (1, 1, 9.0, 3)],
)
def test_second_process_failures(
    compiled: int, tuned: int, seconds: float, count: int
) -> None:
    counters = {"compiled": compiled, "tuned": tuned}
    bolt = {"first_call_s": seconds, "counters": counters}
    assert len(second_process.failures({"first_call_s": 3.0}, bolt)) == count


def test_a_run_that_is_cut_short_keeps_what_it_measured(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_models, "_kernels", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench_models.main(tiny, StandIn, freeze)
    variants = _written(tmp_path)["models"]["tiny"]["variants"]
    assert all(variant["wall_ms"] > 0 for variant in variants.values())
