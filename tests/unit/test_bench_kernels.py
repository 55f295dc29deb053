# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark without a GPU: its problems, its table, and its bookkeeping."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import (
    bench_kernels,
    environment,
    floor,
    kernel_problems,
    kernel_table,
    kernel_times,
)
from jax_bolt._src import arch, compat, forms, ir, resolve
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import isolate, measure

CEILINGS = floor.Ceilings(flops=800e12, bandwidth=4e12)
VGG = ["--models", "vgg16", "--batches", "1", "--image", "32"]
ONE_CONV = [*VGG, "--only", "h32w32c64 k64r3s3"]


def _site(*shape: Any, **kw: Any) -> Any:
    return cases._conv(*shape, **kw).site()


def _result(name: str, kind: str, library: float, **more: Any) -> dict[str, Any]:
    result = {
        "short": name,
        "epilogue": "conv3x3+bn",
        "class": kind,
        "batch": 32,
        "floor_us": 5.0,
        "templates": {"conv_sm80": {"us": 10.0, "moves_input": False}},
        "ours_us": 10.0,
        "in_program_us": 12.5,
        "library_us": library,
        "region_us": 25.0,
    }
    result |= more
    return result | {"ratios": kernel_table.ratios(result)}


# Problems ---------------------------------------------------------------------------


def test_models_share_no_problem_twice() -> None:
    names = ["repvgg_a0", "vgg16"]
    found = kernel_problems.collect(names, [1, 2], 32, "bfloat16")
    texts = [problem.region.text for problem in found]
    assert len(set(texts)) == len(texts)
    # 23 and 16 roots at each of two batch sizes.
    assert sum(sum(problem.where.values()) for problem in found) == 2 * (23 + 16)
    assert {problem.batch for problem in found} == {1, 2}


def test_bert_has_four_products_at_two_sizes() -> None:
    found = kernel_problems.collect(["bert_base"], [1, 8], 224, "float16")
    sizes = [
        (p.m, p.n, p.k)
        for p in (problem.region.problem for problem in found)
        if isinstance(p, ir.GemmProblem) and p.dtype == "f16"
    ]
    once = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    assert sizes == [(m, *nk) for m in (1280, 4096) for nk in once]
    sides = [len(problem.region.epilogue.sides) for problem in found[:4]]
    assert sides == [0, 1, 0, 1]
    assert found[2].label == "dot+bias+erf"


def test_convs_in_groups_are_one_region_each() -> None:
    epilogues = {"convnext": "bias", "mobilenet": "bn+relu", "efficientnet": "bn+silu"}
    epilogues["resnext50"] = "bn+relu"
    for name, layers in kernel_problems.GROUPED.items():
        depthwise = name.endswith("depthwise")
        found = kernel_problems.collect([name], [32], 224, "bfloat16")
        problems = [p.region.problem for p in found]
        assert [
            (p.h, p.k, p.r, p.stride[0], p.groups)
            for p in problems
            if isinstance(p, ir.ConvProblem) and p.n == 32
        ] == [layer if len(layer) == 5 else (*layer, layer[1]) for layer in layers]
        kinds = {kernel_problems.classify(p.region, CEILINGS) for p in found}
        expected = (kernel_problems.GROUPED_CONV, kernel_problems.DEPTHWISE_CONV)
        assert kinds == {expected[depthwise]}
        candidates = kernel_problems.candidates(
            found[0], arch.from_name("sm_90a"), (), quick=True
        )
        template = "depthwise" if depthwise else "implicit_gemm_sm90"
        assert [c.template.name for c in candidates] == [template] * 2
        labels = {problem.label.partition("+")[2] for problem in found}
        assert labels == {epilogues[name.partition("_")[0]]}


def test_floor_counts_side_inputs_and_the_real_output() -> None:
    region = _site(2, 8, 8, 64, 32, 3, 3).region
    (bare,) = floor.of_problems([region.problem])
    assert len(region.epilogue.sides) == 1
    found = kernel_problems.root(region)
    assert found.flops == bare.flops
    assert found.bytes == bare.bytes + 2 * (2 * 8 * 8 * 32)


@pytest.mark.parametrize(
    ("shape", "options", "expected"),
    [
        ((1, 8, 8, 64, 64, 3, 3), {}, kernel_problems.CONV3X3),
        ((1, 8, 8, 3, 64, 3, 3), {}, kernel_problems.STEM),
        ((1, 8, 8, 64, 64, 5, 5), {}, kernel_problems.OTHER),
        ((1, 8, 8, 64, 64, 1, 1), {}, kernel_problems.MEMORY),
        ((32, 28, 28, 4096, 4096, 1, 1), {"stride": 2}, kernel_problems.COMPUTE),
    ],
)
def test_classes(shape: Any, options: Any, expected: str) -> None:
    region = _site(*shape, **options).region
    assert kernel_problems.classify(region, CEILINGS) == expected


def test_short_names() -> None:
    conv = _site(2, 15, 13, 64, 128, 3, 3, stride=(2, 1), dilation=2).region.problem
    assert kernel_problems.short(conv) == "2x15x13 64>128 3x3 s2x1 d2x2"
    depthwise = cases.DEPTHWISE[0].site().region.problem
    assert kernel_problems.short(depthwise) == "2x15x13 40>40 3x3 s1 g40"
    gemm = ir.GemmProblem(m=4, n=5, k=6, batch=3, dtype="bf16", b_layout="col")
    assert kernel_problems.short(gemm) == "3x4x5x6 row,col"


@pytest.mark.parametrize(
    ("shape", "options", "form", "moves"),
    [
        ((1, 8, 8, 64, 64, 3, 3), {}, "krsc", False),
        ((1, 8, 8, 60, 64, 3, 3), {}, "krsc", True),
        ((1, 8, 8, 3, 64, 3, 3), {"stride": 2}, "space_to_depth", True),
        ((1, 8, 8, 64, 64, 1, 1), {}, "pixels", False),
        ((1, 8, 8, 60, 64, 1, 1), {}, "pixels_k_major", True),
        ((1, 8, 8, 64, 64, 1, 1), {"stride": 2}, "strided_pixels", True),
    ],
)
def test_which_forms_move_the_input(
    shape: Any, options: Any, form: str, moves: bool
) -> None:
    site = _site(*shape, **options)
    assert forms.form(site.region, form) is not None
    assert kernel_problems.moves_input(site, form) is moves


# The library ------------------------------------------------------------------------

BARE = [
    *(case for case in cases.GEMMS if "->" in case.name and len(case.args) == 2),
    cases._conv(2, 9, 11, 16, 24, 3, 3, bare=True, stride=2),
    cases._conv(2, 9, 8, 16, 24, 5, 3, bare=True, padding=((0, 3), (2, 0)), dilation=2),
    cases._conv(2, 7, 7, 24, 40, 1, 1, bare=True),
    cases._conv(2, 7, 7, 24, 40, 1, 1, bare=True, stride=2),
    cases.Case(
        "depthwise",
        lambda x, w: cases.conv(x, w, stride=2, groups=16),
        (cases.shape(2, 9, 8, 16), cases.shape(5, 3, 1, 16)),
    ),
]


@pytest.mark.parametrize("case", BARE, ids=str)
def test_library_functions_compute_the_root(case: cases.Case) -> None:
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1)
    (result,) = reference_fun(site.reference)(*operands.sets[0])
    expected = result.astype(jnp.float32)
    found = kernel_times.library_functions(site)
    problem = site.region.problem
    if isinstance(problem, ir.ConvProblem):
        assert set(found) == ({"conv", "dot"} if problem.is_gemm else {"conv"})
    for fun, prepare in found.values():
        got = jax.jit(fun)(*prepare(*operands.roles(0)[:2])).astype(jnp.float32)
        got = got.reshape(expected.shape)
        np.testing.assert_allclose(got, expected, rtol=2e-2, atol=2e-2)


def test_small_problems_get_more_sets() -> None:
    site = cases.GEMMS[1].site()
    wanted = 10 * site.region.bytes_moved
    assert len(kernel_times.rotating_operands(site, wanted).sets) == 20
    assert len(kernel_times.rotating_operands(site, 1).sets) == 2
    assert len(kernel_times.rotating_operands(site, 10**9).sets) == 32


# The table --------------------------------------------------------------------------


def test_ratios_are_over_ours() -> None:
    ratios = _result("a", kernel_problems.CONV3X3, 15.0)["ratios"]
    assert ratios["library"] == pytest.approx(1.5)
    assert ratios["region"] == pytest.approx(2.5)
    assert ratios["region_in_program"] == pytest.approx(2.0)
    assert ratios["floor"] == pytest.approx(2.0)
    assert kernel_table.ratios({"library_us": 3.0}) == {}


def test_row_shows_what_is_there() -> None:
    moved = {"conv_sm80": {"us": 10.0, "moves_input": True}}
    text = kernel_table.row(
        _result("8x8", kernel_problems.STEM, 15.0, templates=moved, copy_us=3.5),
        ["gemm_sm80", "conv_sm80"],
    )
    words = text.split()
    expected = "8x8 conv3x3+bn 5.0 - 10.0* 3.5 15.0 25.0 12.5 1.50 2.50 2.00"
    assert words == expected.split()
    head, _ = kernel_table.header(["gemm_sm80", "conv_sm80"]).splitlines()
    assert len(head) == len(text)


def test_summary_by_class_and_batch() -> None:
    conv, memory = kernel_problems.CONV3X3, kernel_problems.MEMORY
    failed = _result("d", conv, 0.0, ours_us=None, in_program_us=None)
    results = [
        _result("a", conv, 10.0),
        _result("b", conv, 40.0),
        _result("c", memory, 5.0, batch=None),
        failed,
    ]
    rows = kernel_table.summary(results)
    keys = [(row["class"], row["batch"]) for row in rows]
    assert keys == [(conv, "all"), (memory, "all"), (conv, "32"), (memory, "-")]
    library = rows[0]["library"]
    assert library["count"] == 2
    assert library["geometric_mean"] == pytest.approx(2.0)
    assert (library["lowest"], library["lowest_at"]) == (1.0, "a conv3x3+bn")
    text = kernel_table.summary_text(rows)
    assert "2.000   1.000  a conv3x3+bn" in text
    assert kernel_table.summary([]) == []


def test_summary_of_failures_has_no_mean() -> None:
    failed = _result("d", kernel_problems.OTHER, 0.0, ours_us=None, in_program_us=None)
    (row,) = kernel_table.summary([failed])
    assert row["library"] is None
    assert "other" not in kernel_table.summary_text([row])


# The command line -------------------------------------------------------------------


def test_plan_lists_problems_and_candidates(capsys: pytest.CaptureFixture) -> None:
    assert bench_kernels.main(["--plan", *ONE_CONV]) == 0
    problem, *candidates, last = capsys.readouterr().out.splitlines()
    assert problem.startswith("conv[bf16 n1h32w32c64 k64r3s3 st1x1")
    assert problem.endswith("conv3x3+bias+relu [3x3 conv; vgg16 x1]")
    assert any("conv_sm80 tile=" in line for line in candidates)
    # Some candidates differ in numbers that only the launch has: they share a kernel.
    found = re.fullmatch(r"1 problems, (\d+) candidates, (\d+) kernels .*sm_90a", last)
    assert found is not None
    assert int(found[1]) == len(candidates) >= int(found[2]) > 0


def test_plan_of_few_templates_and_quick(capsys: pytest.CaptureFixture) -> None:
    bert = ["--plan", "--models", "bert_large", "--only", "m1280n1024k4096"]
    assert bench_kernels.main([*bert, "--templates", "gemm_sm80", "--quick"]) == 0
    _, *candidates, _ = capsys.readouterr().out.splitlines()
    assert len(candidates) == 2
    assert all(line.strip().startswith("gemm_sm80") for line in candidates)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(compat, "cuda_device", lambda: None)
    assert bench_kernels.main(ONE_CONV) == 2
    assert "--plan" in capsys.readouterr().err
    assert bench_kernels.main([*ONE_CONV, "--only", "nothing"]) == 2
    assert "no problem contains 'nothing'" in capsys.readouterr().err


class Kernels:
    """A store that has every kernel; a digest is the source itself."""

    def digest(self, toolchain: Any, source: str, arch: Any) -> str:
        return source

    def build(self, tools: Any, sources: Any, arch: Any, jobs: Any, on_done: Any):
        for source in sources:
            on_done(source, Path("kernel"))


@dataclasses.dataclass
class Yardstick:
    """A kernel's error by its place among the candidates; XLA's is 1e-3."""

    of: Callable[[int], float]

    def errors(self, outputs: list[Any]) -> list[float]:
        (one,) = outputs
        return [1e-3 if isinstance(one, jax.Array) else self.of(one.position)]


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A device whose kernels take 4, 5, 6, ... µs and are exact; XLA's take 8."""
    target: Any = types.SimpleNamespace(
        arch=arch.from_name("sm_90a"),
        ordinal=0,
        disable=(),
        toolchain=None,
        kernels=Kernels(),
        digest=lambda source: source,
        jobs=1,
    )

    class Worker:
        """A kernel's place among the candidates is its time."""

        positions: dict[str, int] = {}  # noqa: RUF012

        def time(self, request: dict[str, Any], limit_s: float) -> isolate.Timing:
            position = self.positions.setdefault(request["digest"], len(self.positions))
            return isolate.Timing(4.0 + position, 0.0)

        def stop(self) -> None:
            self.positions.clear()

    worker = Worker()

    def executable(region: Any, candidate: Any, digest: str, *_: Any) -> Any:
        position = worker.positions[digest]
        return types.SimpleNamespace(position=position, form=candidate.form)

    def time_region(fun: Any, operands: measure.Operands, ordinal: int) -> measure.Run:
        found = [jax.jit(fun)(*values) for values in operands.sets]
        jax.block_until_ready(found)
        return measure.Run(8.0, found[0])

    def patch(module: Any, name: str, value: Any) -> None:
        monkeypatch.setattr(module, name, value)

    patch(compat, "cuda_device", lambda: jax.devices()[0])
    patch(environment, "has_gpu", lambda: True)
    patch(floor, "measure", lambda: floor.Ceilings(flops=800e12, bandwidth=1e12))
    patch(resolve, "target_for", lambda device, options: target)
    patch(kernel_times, "executable", executable)
    patch(isolate, "worker", lambda ordinal: worker)
    patch(measure, "time_region", time_region)
    patch(measure, "time_function", lambda fun, sets, ordinal: 8.0)
    patch(measure, "Yardstick", lambda operands: Yardstick(lambda position: 1e-3))
    patch(measure, "time_in_sequence", lambda kernel, *_: measure.Run(8.0, [kernel]))
    return [*ONE_CONV, "--templates", "conv_sm80", "--out", str(tmp_path)]


def _written(folder: Path) -> Any:
    (path,) = folder.glob("kernels-*.json")
    return json.loads(path.read_text())


def test_run_writes_the_file(
    pretended: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert bench_kernels.main(pretended) == 0
    document = _written(tmp_path)
    (result,) = document["problems"]
    assert result["failures"] == []
    assert result["where"] == {"vgg16": 1}
    assert result["best"] == "conv_sm80"
    assert (result["ours_us"], result["in_program_us"]) == (4.0, 8.0)
    assert result["ratios"]["library"] == result["ratios"]["region"] == 2.0
    assert result["memory_bound"] and result["copy_us"] == 8.0
    assert result["hot_us"] == 4.0
    rotated = [entry["rot_us"] for entry in result["candidates"]]
    assert rotated == [4.0 + i for i in range(len(rotated))]
    assert result["templates"]["conv_sm80"] == result["candidates"][0]
    assert document["summary"][0]["library"]["geometric_mean"] == pytest.approx(2.0)
    assert document["environment"]["versions"]["jax"] == jax.__version__
    assert document["settings"]["batches"] == [1]
    assert "3x3 conv" in capsys.readouterr().out


def test_wrong_kernels_never_count(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judge(of: Callable[[int], float]) -> None:
        monkeypatch.setattr(measure, "Yardstick", lambda operands: Yardstick(of))

    judge(lambda position: 1e-3 if position == 2 else 1e-2)
    assert bench_kernels.main(pretended) == 0
    (result,) = _written(tmp_path)["problems"]
    assert result["ours_us"] == 6.0
    accurate = [entry.get("accurate") for entry in result["candidates"]]
    assert accurate[:3] == [False, False, True] and not any(accurate[3:])

    judge(lambda position: 1e-2)
    assert bench_kernels.main(pretended) == 1
    (result,) = _written(tmp_path)["problems"]
    assert result["failures"] == ["no candidate ran and was accurate"]
    assert result["templates"] == {} and set(result["ratios"]) == set()


def test_failing_parts_are_recorded_and_the_rest_is_measured(
    pretended: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = isolate.worker(0)
    time = worker.time

    def fail(request: dict[str, Any], limit_s: float) -> isolate.Timing:
        timing = time(request, limit_s)
        if timing.micros == 4.0:
            raise isolate.Failed("launch failed")
        return timing

    def library_functions(site: Any) -> Any:
        raise MemoryError("none left")

    monkeypatch.setattr(worker, "time", fail)
    monkeypatch.setattr(kernel_times, "library_functions", library_functions)
    assert bench_kernels.main(pretended) == 1
    (result,) = _written(tmp_path)["problems"]
    assert result["failures"] == ["library: MemoryError: none left"]
    assert result["candidates"][0]["failure"] == "launch failed"
    assert result["ours_us"] == 5.0
    assert set(result["ratios"]) == {"region", "region_in_program", "floor"}


def test_spent_budget_stops_cleanly(
    pretended: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert bench_kernels.main([*pretended, "--budget-s", "0"]) == 0
    document = _written(tmp_path)
    assert document["problems"] == []
    assert len(document["not_reached"]) == 1
    assert "1 problems not reached" in capsys.readouterr().out


def test_kernels_not_compiled_in_time_are_errors() -> None:
    target: Any = types.SimpleNamespace(
        kernels=Kernels(),
        digest=lambda source: source,
        toolchain=None,
        arch=None,
        jobs=1,
    )
    names: Any = [types.SimpleNamespace(source=name) for name in ("a", "b")]
    built = kernel_times.build(names, target, kernel_times.Clock(0.0))
    assert built["a"] == ("a", Path("kernel"))
    assert isinstance(built["b"][1], kernel_times.CompileError)
