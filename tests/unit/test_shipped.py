# SPDX-License-Identifier: Apache-2.0
"""Shipped tuning results: what is in the package, and how it gets there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import ship_results
from jax_bolt._src import arch, ir, kernels, paths, plan, region_text
from jax_bolt._src.jit import toolchain
from jax_bolt._src.tune import db

H200 = arch.of_device("9.0", "NVIDIA H200", 132)


def shipped() -> list[Path]:
    return sorted(paths.shipped_tuning().glob("*"))


def check(path: Path) -> None:
    """What a config that was renamed, or a hand that edited a file, would break."""
    results = db.parse(path.read_bytes())
    assert path.name == db.file_name(results.device)
    assert len(results.entries) == len(json.loads(path.read_bytes())["entries"]) > 0
    device = db.arch_of(results.device)
    for text, entry in results.entries.items():
        region = region_text.parse(text)
        assert db.is_verified(entry), text
        if entry.choice == "kernel":
            names = f"{entry.template} {entry.config} ({entry.form})"
            assert plan.chosen(region, device, entry), f"{text}: no {names}: tune again"


def test_what_is_shipped_can_be_used():
    for path in shipped():
        check(path)


def region(n: int) -> ir.Region:
    problem = ir.GemmProblem(m=256, n=n, k=256, dtype="bf16")
    return ir.Region(problem=problem, epilogue=ir.Epilogue((ir.Op("acc"),), 0, "bf16"))


def entry(n: int = 256, **changes: object) -> db.Entry:
    made = plan.heuristic(region(n), H200)
    assert isinstance(made, plan.Plan)
    found = db.Entry(
        choice="kernel",
        form=made.candidate.form.name,
        template=made.candidate.template.name,
        config=made.candidate.config.text,
        sources=toolchain.sources(kernels.HEADERS),
        compiler="nvcc 13.0.88",
        time_us=2.0,
        xla_time_us=3.0,
        error=1e-3,
        xla_error=1e-3,
    )
    return dataclasses.replace(found, **changes)  # pyright: ignore


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    good = {region(256): entry(), region(8): entry(8, choice="xla")}
    bad = {
        region(16): entry(16, error=1.0),
        region(24): entry(24, sources="others"),
        region(32): entry(32, config="gone"),
    }
    db.Database(tmp_path / "tuned").put(H200, {**good, **bad})
    return tmp_path


def test_what_was_tuned_becomes_a_shipped_file(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "shipped_tuning", lambda: tmp_path / "data" / "tuned")
    assert ship_results.main([str(cache)]) == 0
    printed = capsys.readouterr().out
    assert "2 of 5 results" in printed
    for reason in ("not verified", "other headers", "there is no implicit_gemm_sm90"):
        assert reason in printed
    (path,) = shipped()
    check(path)
    (cache / "tuned" / path.name).unlink()
    with pytest.raises(SystemExit):
        ship_results.main([str(cache)])


@pytest.mark.parametrize(
    "change",
    [
        {"config": "gone"},
        {"template": "gone"},
        {"form": "gone"},
        {"error": 1.0},
        {"choice": "gone"},
    ],
)
def test_the_check_finds_what_is_wrong(tmp_path, change):
    key = db.device_key(H200)
    path = tmp_path / db.file_name(key)
    path.write_text(db.text(key, {region(256).text: entry()}))
    check(path)
    path.write_text(db.text(key, {region(256).text: entry(**change)}))
    with pytest.raises(AssertionError):
        check(path)
