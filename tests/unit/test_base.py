# SPDX-License-Identifier: Apache-2.0
"""Base programs: which there are, and what they stand for."""

from __future__ import annotations

import dataclasses

import pytest

from jax_bolt._src import arch as arch_
from jax_bolt._src import base, ir, plan
from jax_bolt._src.jit import compiler
from jax_bolt._src.kernels.implicit_gemm_tiles import Tile

HOPPER = arch_.from_name("sm_90a")
RELU = (
    ir.Op("acc"),
    ir.Op("vector", attr=0),
    ir.Op("mul", (0, 1)),
    ir.Op("logistic", (2,)),
)


def region(sides: int = 0, out: ir.DType = "bf16", **changes: object) -> ir.Region:
    """ResNet's 3x3 conv at 14x14, with an epilogue that no base program has."""
    problem = ir.ConvProblem(
        **{"n": 32, "h": 14, "w": 14, "c": 256, "k": 256, "r": 3, "s": 3},
        **{"padding": (1, 1, 1, 1), "dtype": "bf16", "filter_layout": "hwio"},
    )
    problem = dataclasses.replace(problem, **changes)
    ops, last = list(RELU), len(RELU) - 1
    for i in range(sides):
        ops += [ir.Op("side", attr=i), ir.Op("add", (last, len(ops)))]
        last = len(ops) - 1
    epilogue = ir.Epilogue(
        tuple(ops), last, out, (ir.Vector("f32"),), (problem.dtype,) * sides
    )
    return ir.Region(problem=problem, epilogue=epilogue)


def stand_ins(region: ir.Region, arch: arch_.GpuArch = HOPPER) -> list:
    found, _ = plan.candidates(region, arch)
    return [(c, base.stand_in(c)) for c in found]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("sm_90a", 250, 320), ("sm_80", 10, 30), ("sm_120a", 10, 30), ("sm_75", 0, 0)],
)
def test_the_library_of_an_architecture(name: str, least: int, most: int) -> None:
    sources = base.sources(arch_.from_name(name))
    assert least <= len(sources) <= most
    assert len(set(sources)) == len(sources)
    kinds = {compiler.artifact(source) for source in sources}
    assert kinds <= ({"cubin"} if name == "sm_90a" else {"module"})


@pytest.mark.parametrize("sides", [0, 1])
def test_candidates_have_programs(sides: int) -> None:
    pairs = stand_ins(region(sides))
    known = [(c, stand) for c, stand in pairs if stand is not None]
    assert len(known) > len(pairs) / 4
    for candidate, stand in known:
        assert stand.source in base.sources(HOPPER)
        assert stand.source != candidate.source
        # The same launch of other code: block, cluster, shared memory.
        assert stand.recipe[:6] == candidate.recipe[:6]
        assert stand.config == candidate.config
        epilogue = stand.form.region.epilogue
        assert (len(epilogue.vectors), len(epilogue.sides)) == (1, sides)


def test_a_second_side_input_is_left_out() -> None:
    epilogues = {
        s.form.region.epilogue.text for _, s in stand_ins(region(2)) if s is not None
    }
    one = {
        s.form.region.epilogue.text for _, s in stand_ins(region(1)) if s is not None
    }
    assert epilogues == one


def test_half_floats_are_timed_by_the_programs_of_bfloat16() -> None:
    stands = [s for _, s in stand_ins(region(out="f16", dtype="f16")) if s is not None]
    assert stands
    assert {s.form.region.problem.dtype for s in stands} == {"bf16"}


@pytest.mark.parametrize(
    "other",
    [
        region(out="f32"),  # writes twice as much
        region(out="f32", dtype="f32", filter_layout="krsc"),
        region(c=16),  # less than a chunk: fewer products
        region(c=3, h=224, w=224, r=7, s=7, stride=(2, 2), padding=(3, 3, 3, 3)),
    ],
    ids=["wide result", "tf32", "few channels", "stem"],
)
def test_what_no_program_stands_for(other: ir.Region) -> None:
    # In its space-to-depth form a stem is a conv like others.
    pairs = [p for p in stand_ins(other) if p[0].form.name != "space_to_depth"]
    assert pairs
    assert [s for _, s in pairs if s is not None] == []


@pytest.mark.parametrize("channels", [96, 80, 112])
def test_programs_of_full_chunks_time_those_that_are_not(channels: int) -> None:
    pairs = stand_ins(region(c=channels, k=channels))
    known = [(c, stand) for c, stand in pairs if stand is not None]
    assert len(known) > len(pairs) / 4
    for candidate, stand in known:
        assert stand.recipe == candidate.recipe
        tile = dataclasses.replace(Tile.of(candidate.config), zeros=True)
        assert stand.config == tile.config()
        # Not even without its epilogue would the region's own kernel be in the library.
        own = dataclasses.replace(stand, config=candidate.config)
        assert own.source not in base.sources(HOPPER)


def test_stock_templates() -> None:
    pairs = stand_ins(region(1, filter_layout="krsc"), arch_.from_name("sm_80"))
    known = [s for _, s in pairs if s is not None]
    assert len(known) == len(pairs) > 0
    assert {len(s.form.region.epilogue.sides) for s in known} == {0}


def test_by_rank_come_the_first_few_of_a_template() -> None:
    found, _ = plan.candidates(region(), HOPPER)
    first = plan.likeliest(found)
    assert len(first) < len(found)
    assert first == found[: len(first)]
