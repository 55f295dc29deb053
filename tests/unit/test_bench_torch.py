# SPDX-License-Identifier: Apache-2.0
"""The benchmark of PyTorch: the same models, and a table beside jax_bolt's times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import bench_torch
from benchmarks.models import models


def document(**queued_ms: float) -> dict[str, Any]:
    """What bench_models.py writes, of the frozen variant alone."""
    return {
        "environment": {"device": "NVIDIA H200"},
        "models": {
            name: {"variants": {bench_torch.FROZEN: {"queued_ms": ms}}}
            for name, ms in queued_ms.items()
        },
    }


def test_the_table() -> None:
    results: dict[str, Any] = {
        "resnet50": {"eager": {"queued_ms": 4.0}, "compiled": {"queued_ms": 1.5}},
        "vgg16": {"eager": {"queued_ms": 6.0}, "compiled": {"queued_ms": 4.0}},
        "repvgg_a0": {"error": "RuntimeError: no"},
    }
    text = bench_torch.beside(
        results, document(resnet50=0.75, vgg16=0.5), "NVIDIA H200"
    )
    _, first, second, failed, mean = text.splitlines()
    assert first.split() == ["resnet50", "4.000", "1.500", "0.750", "2.00"]
    assert second.split() == ["vgg16", "6.000", "4.000", "0.500", "8.00"]
    assert failed.split() == ["repvgg_a0", "nan", "nan"]
    assert mean.endswith(": 4.00")


def test_times_of_another_device_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"NVIDIA H200.*NVIDIA H100"):
        bench_torch.beside({}, document(resnet50=0.75), "NVIDIA H100")


def test_without_pytorch_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert bench_torch.main(["--out", str(tmp_path)]) == 2
    assert "needs PyTorch" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_result_that_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = str(tmp_path / "models.json")
    assert bench_torch.main(["--out", str(tmp_path), "--beside", missing]) == 2
    assert missing in capsys.readouterr().err


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", models.MEASURED)
def test_the_models_are_the_same(name: str) -> None:
    pytest.importorskip("torch", reason="compares PyTorch's models with Flax's")
    from benchmarks.models import pytorch

    _, variables, _ = models.shapes(name, 1)
    ours = sorted(x.size for x in jax.tree.leaves(variables["params"]))
    theirs = sorted(p.numel() for p in pytorch.build(name, 224).parameters())
    assert theirs == ours


def test_a_run_on_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="runs one of PyTorch's models")
    sizes = "--batch 2 --image 32 --runs 1 --models resnet18 --device cpu".split()
    assert bench_torch.main([*sizes, "--mode", "default", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())["models"]["resnet18"]
    assert set(found) == {bench_torch.EAGER, bench_torch.COMPILED}
    for variant in found.values():
        assert 0 < variant["relative_l2"] < bench_torch.MAX_ERROR
        assert variant["wall_ms"] > 0
