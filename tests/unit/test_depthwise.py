# SPDX-License-Identifier: Apache-2.0
"""The depthwise kernel: what it takes, and that its plans, run in NumPy, are right."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from pathlib import Path

import depthwise_emulator as emulator
import jax.numpy as jnp
import numpy as np
import pytest
from region_cases import depthwise_problem as conv

from jax_bolt._src import arch, evaluate, forms, ir, plan
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import conv_sm80, depthwise, depthwise_tiles, gemm_sm80
from jax_bolt._src.kernels import implicit_gemm_sm90 as family
from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.depthwise_rank import estimate, steps_and_lines
from jax_bolt._src.kernels.depthwise_tiles import Shape, Tile

SM80, SM86, SM90A = (arch.from_name(n) for n in ("sm_80", "sm_86", "sm_90a"))
PLAIN = ir.Epilogue((ir.Op("acc"),), 0, "bf16")
# acc * vector_0 + side_0
FULL = ir.Epilogue(
    (
        ir.Op("acc"),
        *(ir.Op("vector", attr=0), ir.Op("mul", (0, 1))),
        *(ir.Op("side", attr=0), ir.Op("add", (2, 3))),
    ),
    4,
    "bf16",
    vectors=(ir.Vector("f32"),),
    sides=("bf16",),
)


def region(problem: ir.Problem, epilogue: ir.Epilogue = PLAIN) -> ir.Region:
    return ir.Region(problem=problem, epilogue=epilogue)


PROBLEMS = [
    conv(2, 9, 11, 16, 3),
    conv(1, 7, 7, 40, 7),
    conv(1, 12, 5, 8, 5),
    # strides: of both parities, larger than the filter, unequal
    conv(2, 14, 14, 24, 3, stride=(2, 2)),
    conv(1, 13, 15, 16, 5, stride=(2, 2), padding=(1, 2, 1, 2)),
    conv(1, 9, 10, 16, 3, stride=(3, 2), padding=(2, 1, 0, 3)),
    conv(1, 11, 12, 8, 1, stride=(2, 2), padding=(0, 0, 0, 0)),
    conv(1, 13, 9, 8, 2, stride=(4, 3), padding=(0, 0, 0, 0)),
    # dilation, with strides that share a factor with it and that do not
    conv(1, 12, 10, 16, 3, dilation=(2, 2), padding=(2, 2, 2, 2)),
    conv(1, 15, 13, 8, 3, dilation=(2, 3), stride=(2, 2), padding=(2, 1, 3, 2)),
    conv(1, 15, 12, 8, 3, dilation=(3, 1), stride=(2, 1), padding=(3, 3, 1, 1)),
    # rectangular filters, no padding, more than the filter needs, and whole rows of it
    conv(1, 8, 12, 16, 1, 5),
    conv(1, 12, 8, 16, 5, 1),
    conv(2, 6, 7, 8, 3, padding=(0, 0, 0, 0)),
    conv(1, 3, 3, 8, 3, padding=(0, 0, 0, 0)),
    conv(1, 3, 4, 8, 3, padding=(5, 4, 4, 3)),
    conv(1, 2, 2, 8, 5, stride=(2, 2), padding=(7, 6, 4, 4)),
    conv(1, 1, 1, 64, 7),
    # channels that no 16 bytes divide, and that fill no tile
    conv(1, 6, 9, 3, 3),
    conv(1, 6, 9, 18, 3),
    conv(1, 5, 6, 33, 3),
    conv(1, 5, 6, 36, 3, stride=(2, 2)),
    conv(1, 5, 6, 72, 3),
    # several output channels of an input channel
    conv(1, 6, 7, 8, 3, k=24),
    conv(1, 5, 9, 17, 3, k=34, stride=(2, 2)),
    # float32, and filters too large for registers
    conv(1, 7, 8, 20, 3, dtype="f32"),
    conv(1, 6, 6, 5, 5, dtype="f32"),
    conv(1, 12, 13, 8, 13),
    conv(1, 9, 14, 16, 11, 9, padding=(5, 5, 4, 4)),
]


def sample(asked: ir.Region, device: arch.GpuArch) -> list[Tile]:
    """The first candidates, and tiles of some widths and numbers of outputs, whose
    strips are rows or not."""
    found = [Tile.of(config) for config in depthwise.configs(asked, device)[:2]]
    rng = random.Random(asked.text)
    groups: dict[int, dict[tuple[int, int], list[Tile]]] = {}
    for tile in depthwise_tiles.tiles_of(asked, device):
        kind = groups.setdefault(tile.whole, {})
        kind.setdefault((tile.width, tile.outputs), []).append(tile)
    for whole, kind in groups.items():
        some = rng.sample(list(kind.values()), min(1 if whole else 4, len(kind)))
        found += [rng.choice(group) for group in some]
    return found


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.text)
def test_plans_give_the_convs_result(problem):
    asked = region(problem, FULL)
    assert depthwise.supports(asked, SM90A) is None
    rng = np.random.default_rng(0)
    x = rng.integers(-4, 5, (problem.n, problem.h, problem.w, problem.c)).astype("f4")
    w = rng.integers(-4, 5, (problem.r, problem.s, problem.k)).astype("f4")
    side = rng.integers(-4, 5, (problem.rows, problem.k)).astype("f4")
    vector = rng.integers(1, 4, problem.k).astype("f4")
    given = [jnp.asarray(each) for each in (x, w, side, vector)]
    truth = evaluate.evaluate(asked, given[0], given[1], given[2:3], given[3:])

    def apply(sums, places, channels):
        return sums * vector[channels] + side.reshape(-1)[places]

    for tile in sample(asked, SM90A):
        text = depthwise.instantiate(asked, tile.config(), SM90A)
        recipe = depthwise.recipe(asked, tile.config(), SM90A)
        item = ir.ITEM_BYTES[problem.dtype]
        got = emulator.run(text, item, recipe, x, w, apply)
        np.testing.assert_array_equal(
            got.reshape(problem.rows, problem.k), truth, err_msg=tile.config().text
        )


def test_a_filter_with_gaps_and_rows_that_no_tap_reads():
    """What the emulator's cases have to reach."""
    shapes = [
        Shape(Tile.of(depthwise.configs(region(p), SM90A)[0]), region(p))
        for p in PROBLEMS
    ]
    assert any(s.rows_read < s.problem.stride[0] for s in shapes)
    assert any(not s.resident for s in shapes) and any(s.resident for s in shapes)
    assert any(s.pitch > s.tile.channels * s.item for s in shapes)
    assert {s.piece for s in shapes} == {2, 4, 8, 16}
    assert any(s.chunks > 1 for s in shapes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"groups": 1}, "not a depthwise conv"),
        ({"groups": 8}, "groups of 2 input channels"),
        ({"filter_layout": "krsc"}, "not innermost"),
        ({"h": 0}, "empty"),
        ({"padding": (-1, 0, 0, 0)}, "negative padding"),
        ({"h": 2**21}, "an extent above"),
        ({"r": 41, "s": 41, "padding": (20,) * 4}, "no tile of a 41x41 filter"),
    ],
)
def test_refusals_have_a_reason(changes, words):
    problem = dataclasses.replace(conv(2, 9, 9, 16, 3), **changes)
    reason = depthwise.supports(region(problem), SM80)
    assert reason is not None and words in reason


def test_what_it_does_not_run_on_and_cannot_carry():
    problem = conv(2, 9, 9, 16, 3)
    reason = depthwise.supports(region(problem), arch.from_name("sm_75"))
    assert reason is not None and "sm_75" in reason
    gemm = ir.GemmProblem(m=8, n=8, k=8, dtype="bf16")
    assert depthwise.supports(region(gemm), SM80) == "not a depthwise conv"
    many = dataclasses.replace(PLAIN, vectors=(ir.Vector("f32"),) * 9)
    assert "9 per-channel" in str(depthwise.supports(region(problem, many), SM80))


@pytest.mark.parametrize("template", [conv_sm80, family, gemm_sm80])
@pytest.mark.parametrize("layout", ["krsc", "hwio"])
@pytest.mark.parametrize("groups", [4, 32])
def test_no_other_template_takes_groups(template, layout, groups):
    problem = conv(2, 9, 9, 32, 3, groups=groups, filter_layout=layout)
    assert template.supports(region(problem), SM90A) is not None
    assert (
        template.supports(region(dataclasses.replace(problem, groups=1)), SM90A)
        != (template.supports(region(problem), SM90A))
        or template is gemm_sm80
    )


@pytest.mark.parametrize("device", [SM80, SM86, SM90A], ids=lambda a: a.name)
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.text)
def test_candidates_are_distinct_and_fit(problem, device):
    asked = region(problem, FULL)
    configs = depthwise.configs(asked, device)
    assert 1 <= len(configs) <= 16 and len(set(configs)) == len(configs)
    for config in configs:
        shape = Shape(Tile.of(config), asked)
        assert Tile.of(config).config() == config
        assert shape.shared_bytes <= device.smem_per_block
        assert shape.registers <= 208 and shape.takes
        assert shape.ctas(device) * shape.tile.threads <= 2048
        recipe = depthwise.recipe(asked, config, device)
        assert recipe.programmatic == (device.sm >= 90)
        assert recipe.pointers == (
            *(recipes.A, recipes.B, recipes.D),
            *(recipes.side(0), recipes.vector(0), recipes.NULL),
        )


def test_no_pointers_is_a_null_one():
    recipe = depthwise.recipe(region(PROBLEMS[0]), *_first(region(PROBLEMS[0])))
    assert recipe.pointers[3:] == (recipes.NULL,) * 3


def _first(asked: ir.Region):
    return depthwise.configs(asked, SM90A)[0], SM90A


def test_the_recipes_ints_are_the_kernels_sizes():
    """In the order of the header's struct."""
    path = Path(__file__).parents[2] / "cc/include/jax_bolt/depthwise/depthwise.hpp"
    (body,) = re.findall(r"struct Sizes \{(.*?)\};", path.read_text(), re.DOTALL)
    names = re.findall(r"(\w+)[,;]", re.sub(r"//.*|std::u?int32_t", "", body))
    assert tuple(names) == emulator.SIZES
    asked = region(conv(3, 20, 22, 96, 5, stride=(2, 1), padding=(1, 2, 3, 4)))
    config, device = _first(asked)
    made = depthwise.recipe(asked, config, device)
    sizes = dict(zip(names, made.ints, strict=True))
    p, tile = asked.problem, Tile.of(config)
    assert isinstance(p, ir.ConvProblem)
    assert (sizes["rows"], sizes["cols"]) == (p.p, p.q)
    assert (sizes["pad_top"], sizes["pad_left"]) == (1, 3)
    assert sizes["chunk_rows"] == tile.rows and sizes["multiplier"] == 1
    assert sizes["chunks"] * sizes["chunk_rows"] >= p.p
    assert sizes["col_tiles"] * tile.cols >= p.q
    assert sizes["channel_tiles"] * tile.channels >= p.c
    assert sizes["per_channel_tiles"] % 2**32 == -(-(2**32) // sizes["channel_tiles"])


@pytest.mark.parametrize("channels", [2**11, 2**20])
def test_quotients_of_blocks_numbers_are_exact(channels):
    """By products with inverses where these are exact, by divisions elsewhere."""
    asked = region(conv(8, 40, 700, channels, 3))
    tile = Tile(width=1, outputs=2, lanes=16, strips=2, stages=4, rows=3)
    grid = Shape(tile, asked).grid
    made = depthwise.recipe(asked, tile.config(), SM90A)
    sizes = dict(zip(emulator.SIZES, made.ints, strict=True))
    assert min(made.ints) >= -(2**31) and max(made.ints) < 2**31
    exact = []
    for name in ("multiplier", "chunks", "col_tiles", "channel_tiles"):
        base, inverse = sizes[name], sizes[f"per_{name}"] % 2**32
        if not inverse:
            assert base == 1 or base * grid > 2**32
            continue
        exact.append(name)
        last = grid // base * base
        for number in (0, base - 1, base, last - 1, last, grid - 1):
            assert number * inverse >> 32 == number // base
    many = ["chunks", "col_tiles", "channel_tiles"]
    assert exact == (many if channels == 2**11 else [])


def test_the_binary_depends_on_no_size():
    """Other images and batches, other numbers of chunks: one TU."""
    problem = conv(32, 56, 56, 96, 7)
    asked = region(problem)
    config, device = _first(asked)
    fewer = dataclasses.replace(Tile.of(config), rows=7).config()
    larger = region(conv(8, 112, 112, 192, 7))
    texts = {
        codegen.source(r, depthwise, c, device)
        for r, c in ((asked, config), (asked, fewer), (larger, config))
    }
    assert len(texts) == 1


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.text)
def test_spread_blocks_leave_no_room_for_one_more(problem):
    asked = region(problem)
    total = SM90A.smem_per_block + 1024
    found = [t for t in depthwise_tiles.tiles_of(asked, SM90A) if t.spread]
    for tile in found:
        shape = Shape(tile, asked)
        share = -(-shape.grid // SM90A.sm_count)
        made = depthwise.recipe(asked, tile.config(), SM90A)
        assert shape.shared_bytes <= made.smem_bytes <= SM90A.smem_per_block
        # Of blocks, in units of 128 bytes, and the system's own of each.
        taken = -(-made.smem_bytes // 128) * 128 + 1024
        assert share * taken <= total < (share + 1) * taken
        less = dataclasses.replace(tile, spread=0)
        assert Shape(less, asked).launch_bytes(SM90A) == shape.shared_bytes
        assert depthwise.instantiate(
            asked, less.config(), SM90A
        ) == depthwise.instantiate(asked, tile.config(), SM90A)
    assert found or Shape(Tile.of(depthwise.configs(asked, SM90A)[0]), asked).grid > 132
    assert not any(t.spread for t in depthwise_tiles.tiles_of(asked, SM80))


def test_the_first_spread_candidate_is_followed_by_itself_not_spread():
    for side, channels in ((56, 96), (28, 192), (14, 384), (7, 768)):
        asked = region(conv(32, side, side, channels, 7))
        tiles = [Tile.of(config) for config in depthwise.configs(asked, SM90A)]
        first = next(i for i, tile in enumerate(tiles) if tile.spread)
        assert first < 7
        assert tiles[first + 1] == dataclasses.replace(tiles[first], spread=0)


def test_padding_beside_rows_is_left_out_where_a_strip_reaches_it():
    def best(side: int, channels: int) -> Shape:
        asked = region(conv(32, side, side, channels, 7))
        return Shape(Tile.of(depthwise.configs(asked, SM90A)[0]), asked)

    assert best(7, 768).tile.whole == 1 and best(7, 768).inside == (3, 10)
    assert best(14, 384).tile.whole == 2 and best(14, 384).inside == (3, 13)
    assert best(56, 96).tile.whole == 0 and best(56, 96).inside == (0, 13)


def test_configs_name_whole_and_spread_where_they_are_set():
    plain = {"width": 1, "outputs": 7, "lanes": 32, "strips": 1, "stages": 4, "rows": 7}
    text = "width=1 outputs=7 lanes=32 strips=1 stages=4 rows=7"
    assert Tile(**plain).config().text == text
    for tile in (Tile(**plain), Tile(**plain, whole=2), Tile(**plain, spread=1)):
        assert Tile.of(tile.config()) == tile


@pytest.mark.parametrize(
    ("problem", "rows", "steps", "lines"),
    [
        # All rows: of an image, its edges' own are less. In chunks, both on average.
        (conv(1, 7, 7, 8, 7), 7, 7, 37),
        (conv(1, 28, 28, 8, 7), 28, 28, 184),
        (conv(1, 28, 28, 8, 7), 14, 17, 92),
        (conv(1, 14, 14, 8, 5, stride=(2, 2), padding=(1, 2, 1, 2)), 7, 8, 34),
    ],
    ids=lambda value: getattr(value, "text", str(value)),
)
def test_the_model_counts_lines_of_rows_that_are_there(problem, rows, steps, lines):
    asked = region(problem)
    base = Tile(width=1, outputs=7, lanes=8, strips=4, stages=4, rows=rows)
    assert steps_and_lines(problem, rows, True) == (steps, lines)
    # Where slots are not left out, every step has all lines.
    assert steps_and_lines(problem, rows, False) == (steps, steps * problem.r)
    found = estimate(base, asked, SM90A)
    assert found.steps == steps and found.products == 7 * problem.r * problem.s


def test_the_model_expects_uneven_blocks_unless_they_are_spread():
    asked = region(conv(32, 14, 14, 384, 7))
    tile = Tile(width=1, outputs=4, lanes=32, strips=2, stages=4, rows=14)
    shape = Shape(tile, asked)
    assert shape.grid == 768 and shape.share(SM90A) == 6 and shape.ctas(SM90A) == 8
    spread = dataclasses.replace(tile, spread=1)
    assert estimate(tile, asked, SM90A).blocks == 8
    assert estimate(spread, asked, SM90A).blocks == 6
    assert estimate(tile, asked, SM80).blocks == 8  # of 108 SMs, and it is their share


def test_registers_are_those_of_a_scheduler():
    """Three warps of 136 registers, not three and a half."""
    asked = region(conv(32, 28, 28, 192, 7))
    tile = Tile(width=1, outputs=7, lanes=32, strips=1, stages=4, rows=14)
    assert 128 < Shape(tile, asked).registers <= 168
    assert Shape(tile, asked).ctas(SM90A) == 12


def test_strips_of_a_warp_read_other_banks():
    for problem in PROBLEMS:
        asked = region(problem)
        for tile in depthwise_tiles.tiles_of(asked, SM90A):
            shape = Shape(tile, asked)
            bytes_ = tile.channels * shape.item
            if tile.lanes == 32 or bytes_ >= 128 or problem.stride[1] > 1:
                continue
            step = tile.outputs * shape.pitch
            strips = min(32 // tile.lanes, 128 // bytes_)
            starts = sorted(i * step % 128 for i in range(strips))
            apart = all(a + bytes_ <= b for a, b in itertools.pairwise(starts))
            # No pitch of a multiple of 16 bytes can part 2 of 64, or 4 of 32, further.
            assert apart or tile.outputs * 16 % bytes_ == 0, tile


def test_plans_take_the_depthwise_kernel_and_nothing_else():
    asked = region(dataclasses.replace(conv(8, 14, 14, 64, 3), filter_layout="krsc"))
    assert [f.name for f in forms.forms(asked)] == ["hwio"]
    for device in (SM80, SM90A):
        found, reasons = plan.candidates(asked, device)
        assert {c.template.name for c in found} == {"depthwise"}
        assert any("64 groups" in reason for reason in reasons)
        assert "µs" in found[0].reasoning
        assert found[0] == plan.named(
            asked, device, "hwio", "depthwise", found[0].config.text
        )
    found, reasons = plan.candidates(asked, SM90A, ("depthwise",))
    assert not found and "depthwise is disabled" in reasons
