# SPDX-License-Identifier: Apache-2.0
"""From a region and tuning results to a kernel, without a device."""

import dataclasses

import pytest

from jax_bolt._src import arch, ir, plan
from jax_bolt._src.kernels import gemm_sm80
from jax_bolt._src.tune import db

H100 = arch.from_name("sm_90a")


def region(problem=None, **epilogue):
    problem = problem or ir.GemmProblem(m=512, n=256, k=64, dtype="bf16")
    fields = {"ops": (ir.Op("acc"),), "result": 0, "out_dtype": "bf16"} | epilogue
    return ir.Region(problem=problem, epilogue=ir.Epilogue(**fields))


CONV = ir.ConvProblem(n=2, h=9, w=9, c=64, k=64, r=3, s=3, dtype="bf16")


def test_hopper_has_one_family_for_convs_and_products():
    for problem, form in ((None, "direct"), (CONV, "hwio")):
        made = plan.heuristic(region(problem), H100)
        assert isinstance(made, plan.Plan)
        assert made.candidate.template.name == "implicit_gemm_sm90"
        assert made.candidate.form.name == form
        assert made.candidate.recipe
        # Ampere's templates are candidates only without it, and have no recipe.
        found, reasons = plan.candidates(region(problem), H100)
        assert not any(c.template.name.endswith("sm80") for c in found)
        assert any("sm80: implicit_gemm_sm90 takes it" in r for r in reasons)
        found, _ = plan.candidates(region(problem), H100, ("implicit_gemm_sm90",))
        stock = [c for c in found if c.template.artifact == "module"]
        assert stock and not any(c.recipe for c in stock)


def test_a_transposed_operand_is_turned_for_the_family():
    transposed = dataclasses.replace(region().problem, a_layout="col")
    found, _ = plan.candidates(region(transposed), H100)
    assert {(c.template.name, c.form.name) for c in found} == {
        ("implicit_gemm_sm90", "k_major")
    }


def test_what_the_family_refuses_has_other_templates():
    mask = region(sides=("bool",), ops=(ir.Op("acc"), ir.Op("side", attr=0)))
    found, _ = plan.candidates(mask, H100)
    assert {c.template.name for c in found} == {"gemm_sm80"}


def test_a_filter_is_not_transposed_for_the_kernel_that_takes_it_as_it_lies():
    found, _ = plan.candidates(region(CONV), H100)
    assert {c.form.name for c in found} == {"hwio"}
    found, _ = plan.candidates(region(dataclasses.replace(CONV, dtype="f32")), H100)
    assert {c.form.name for c in found} == {"krsc"}


def test_a_pointwise_conv_is_a_product():
    pointwise = dataclasses.replace(CONV, r=1, s=1)
    made = plan.heuristic(region(pointwise), H100)
    assert isinstance(made, plan.Plan)
    assert made.candidate.form.name == "pixels"
    assert made.candidate.form.region.problem == ir.GemmProblem(
        m=162, n=64, k=64, dtype="bf16"
    )


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_100a", "sm_120a"])
def test_other_architectures_have_a_path(name):
    for problem in (None, CONV):
        made = plan.heuristic(region(problem), arch.from_name(name))
        assert isinstance(made, plan.Plan)
        assert made.candidate.template.name.endswith("sm80")


def test_an_architecture_without_kernels_gives_the_reason():
    made = plan.heuristic(region(), arch.from_name("sm_75"))
    assert isinstance(made, plan.Rejection)
    assert "sm_80 or later" in made.reason


@pytest.mark.parametrize("problem", [None, CONV, dataclasses.replace(CONV, r=1, s=1)])
def test_a_refusal_is_of_the_templates_that_could_have_taken_it(problem):
    made = plan.heuristic(region(problem), arch.from_name("sm_75"))
    assert isinstance(made, plan.Rejection)
    assert made.reason.count(":") == 2 and "sm75" not in made.reason
    assert "not a" not in made.reason and "needs sm_90a" not in made.reason
    grouped = dataclasses.replace(CONV, groups=4)
    for name in ("sm_80", "sm_90a"):
        _, reasons = plan.candidates(region(grouped), arch.from_name(name))
        text = "; ".join(reasons)
        assert "groups of 16 input channels, not of one" in text
        assert "not a matrix product" not in text and "needs sm_90a" not in text


def test_a_refusal_by_templates_of_other_work_alone_is_theirs(monkeypatch):
    monkeypatch.setattr(plan.kernels, "TEMPLATES", (gemm_sm80,))
    found, reasons = plan.candidates(region(CONV), H100)
    assert not found
    assert "gemm_sm80 (hwio): not a matrix product" in reasons


def test_disabled_templates_are_not_used():
    found, reasons = plan.candidates(region(), H100, ("gemm_sm80",))
    assert {c.template.name for c in found} == {"implicit_gemm_sm90"}
    assert "gemm_sm80 is disabled" in reasons


def test_every_ragged_size_has_a_candidate():
    for m, n, k in [(1, 1, 1), (3, 1000, 2048), (7, 5, 9), (1, 8, 3)]:
        for dtype in ("bf16", "f16", "f32"):
            problem = ir.GemmProblem(m=m, n=n, k=k, dtype=dtype)
            assert plan.candidates(region(problem), H100)[0], problem.text


NOW = plan.Origin("now", "nvcc 1")


def entry(candidate, **changes):
    fields = {
        "choice": "kernel",
        "form": candidate.form.name,
        "template": candidate.template.name,
        "config": candidate.config.text,
        "sources": "now",
        "compiler": "nvcc 1",
        "time_us": 3.0,
        "xla_time_us": 4.0,
    }
    return db.Entry(**fields | changes)


def test_a_tuned_choice_is_found_again():
    candidates, _ = plan.candidates(region(), H100)
    for candidate in candidates:
        made = plan.tuned(region(), H100, entry(candidate), NOW)
        assert isinstance(made, plan.Plan)
        assert made.provenance == "user"
        assert made.candidate.source == candidate.source


def test_a_stale_choice_is_none():
    candidate = plan.candidates(region(), H100)[0][0]
    assert (
        plan.tuned(region(), H100, entry(candidate), plan.Origin("later", "nvcc 1"))
        is None
    )
    newer = plan.Origin("now", "nvcc 2")
    assert plan.tuned(region(), H100, entry(candidate), newer) is None
    gone = entry(candidate, config="tile=1x1x1")
    assert plan.tuned(region(), H100, gone, NOW) is None
    disabled = (candidate.template.name,)
    assert plan.tuned(region(), H100, entry(candidate), NOW, disabled) is None


def test_xla_wins_where_it_was_faster():
    candidate = plan.candidates(region(), H100)[0][0]
    made = plan.tuned(region(), H100, entry(candidate, choice="xla"), NOW)
    assert isinstance(made, plan.Rejection)
    assert "4.0 µs" in made.reason and "3.0 µs" in made.reason


def test_without_a_compiler_any_compilers_kernel_will_do():
    candidate = plan.candidates(region(), H100)[0][0]
    made = plan.tuned(region(), H100, entry(candidate), plan.Origin("now", None))
    assert isinstance(made, plan.Plan)


@pytest.mark.parametrize("problem", [None, CONV], ids=["gemm", "conv"])
@pytest.mark.parametrize("disable", [(), ("implicit_gemm_sm90",)], ids=str)
def test_a_choice_holds_where_others_are_likelier_now(problem, disable):
    asked = region(problem)
    first = plan.candidates(asked, H100, disable)[0][0]
    known, listed = (
        first.template,
        {c.text for c in first.template.configs(asked, H100)},
    )
    everything = known.space(first.form.region, H100)
    assert listed <= {config.text for config in everything}
    for config in (everything[0], everything[-1]):
        made = plan.named(asked, H100, first.form.name, known.name, config.text)
        assert isinstance(made, plan.Candidate) and made.config == config
    assert plan.named(asked, H100, first.form.name, known.name, "pixels=1") is None
