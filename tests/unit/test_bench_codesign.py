# SPDX-License-Identifier: Apache-2.0
"""The RepVGG study: its variants, the file, the table and the exit code."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

import flax.linen as nn

import jax_bolt
from benchmarks import bench_models, codesign, floor
from benchmarks.models import models
from benchmarks.models.repvgg import RepVGG
from jax_bolt._src import ir

pytestmark = pytest.mark.usefixtures("as_users_run_it")


def freeze(apply: Any, variables: Any, bias: float = 0.0) -> Any:
    return jax.jit(lambda x: apply(variables, x) + bias)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments for a run over very small models."""
    monkeypatch.setenv("XLA_FLAGS", "")
    make = functools.partial(RepVGG, stages=(1,), widths=(8,), stem=8, num_classes=8)
    monkeypatch.setitem(codesign._MODULES, "a0", make)
    sizes = ["--quick", "--batch", "2", "--image", "16"]
    return [*sizes, "--out", str(tmp_path)]


def written(folder: Path) -> Any:
    (path,) = folder.glob("codesign-*.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("variant", codesign.VARIANTS, ids=lambda v: v.name)
def test_the_convs_of_a_variant(variant):
    model = variant.built
    shapes = models.shapes(model, 1, 64, jnp.float16)
    assert len(floor.roots(*shapes)) == model.roots
    sites = jax_bolt.explain(*shapes, arch="sm_90a").sites
    ones = [s for s in sites if "r1s1" in s.problem]
    assert len(ones) == variant.pointwise
    activation = getattr(nn, variant.activation).__name__  # hard_swish's is hard_silu
    assert {s.epilogue for s in ones} <= {f"conv1x1+bias+{activation}"}
    for one in ones:
        # As wide as what it comes after.
        assert one.region is not None
        problem = one.region.problem
        assert isinstance(problem, ir.ConvProblem) and problem.c == problem.k


def test_parameters_of_the_plain_models():
    """The paper's table 5, in millions; with the classifier."""
    for model, millions in {"a0": 8.31, "a1": 12.79, "b0": 14.34}.items():
        (variant,) = (v for v in codesign.VARIANTS if v.name == f"{model}-relu")
        variables = models.shapes(variant.built, 1, 64)[1]
        count = sum(leaf.size for leaf in jax.tree.leaves(variables))
        assert round(count / 1e6, 2) == millions


def test_names_are_of_one_variant_each():
    names = [variant.name for variant in codesign.VARIANTS]
    assert len(set(names)) == len(names) == 13
    for variant in codesign.VARIANTS:
        assert variant.paper <= variant.plain
        assert variant.activation in codesign._GAINS


def test_tuning_all_at_once_is_tuning_each():
    settings = bench_models.Settings(batch=2, image=32)
    chosen = [v for v in codesign.VARIANTS if v.name.startswith("a0-hard")]
    ready, images = codesign.make(chosen, settings, jax_bolt.freeze)
    assert images.dtype == jnp.float16

    def regions(fun: Any) -> set[str]:
        sites = jax_bolt.explain(fun, images, arch="sm_90a").sites
        return {site.region.text for site in sites if site.region}

    together = regions(lambda x: [each.frozen(x) for each in ready])
    assert together == set().union(*(regions(each.frozen) for each in ready))


def test_a_run_writes_the_file_and_the_table(tiny, tmp_path, capsys):
    assert codesign.main(tiny, freeze) == 0
    document = written(tmp_path)
    results = document["variants"]
    assert len(results) == 7
    assert document["settings"]["dtype"] == "float16"
    for result in results.values():
        for timed in result["variants"].values():
            assert timed["img_s_wall"] == pytest.approx(2e3 / timed["wall_ms"])
    assert results["a0-gelu"]["paper"]["paper"] == 5645
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if line.startswith("RepVGG-A0 softplus"))
    assert row.split()[-3:] == ["5453", "0.92", "72.57"]
    assert any("1.00" in line for line in lines if "A0 relu " in line)


def test_one_variant_alone(tiny, tmp_path):
    assert codesign.main([*tiny, "--only", "gelu"], freeze) == 0
    assert list(written(tmp_path)["variants"]) == ["a0-gelu"]


def test_wrong_results_fail_the_run(tiny, tmp_path, capsys):
    biased = functools.partial(freeze, bias=1.0)
    assert codesign.main([*tiny, "--only", "gelu"], biased) == 1
    assert "off plain jax.jit" in capsys.readouterr().err


def test_a_failing_variant_is_recorded_and_the_run_goes_on(tiny, tmp_path, capsys):
    def broken(apply: Any, variables: Any) -> Any:
        def call(x: Any) -> Any:
            raise RuntimeError("boom")

        return call

    assert codesign.main(tiny, broken) == 1
    results = written(tmp_path)["variants"]
    assert len(results) == 7
    assert all(
        "boom" in r["variants"][codesign.FROZEN]["error"] for r in results.values()
    )
    assert "boom" in capsys.readouterr().err


def test_ratios_are_of_the_same_model_without_more():
    def result(name: str, jit: float, bolt: float) -> dict[str, Any]:
        model = name.partition("-")[0]
        return {
            "title": name,
            "paper": {
                "name": name, "model": model, "paper": 50, "plain": 100, "top1": 70.0
            },
            "variants": {
                codesign.PLAIN: {"img_s_queued": jit, "img_s_wall": 1.0},
                codesign.FROZEN: {"img_s_queued": bolt, "img_s_wall": 1.0},
            },
        }  # fmt: skip

    text = codesign.table(
        {
            "a0-relu": result("a0-relu", 100.0, 200.0),
            "a0-gelu": result("a0-gelu", 80.0, 180.0),
            "a1-gelu": result("a1-gelu", 80.0, 160.0),
        }
    )
    _, gelu, other = text.splitlines()[2:]
    assert gelu.split()[1:6] == ["80", "180", "2.25", "0.90", "0.80"]
    assert other.split()[1:6] == ["80", "160", "2.00", "-", "-"]
    assert gelu.split()[-3:] == ["50", "0.50", "70.00"]
