# SPDX-License-Identifier: Apache-2.0
"""The Hopper chain: its plans, run by an emulator, give the right results."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import chain_emulator as emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_implicit_gemm as single
from test_implicit_gemm import HOPPER, PLAIN, SIDE, SMALL, conv, gemm, hwio

from jax_bolt._src import arch, evaluate, forms, ir, plan
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import chain_rank, chain_sm90, chain_tiles
from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.config import Config
from jax_bolt._src.tune import isolate

# acc * vector_0 + vector_1, and a side input added to that.
AFFINE = ir.Epilogue(
    (
        ir.Op("acc"),
        *(ir.Op("vector", attr=0), ir.Op("mul", (0, 1))),
        *(ir.Op("vector", attr=1), ir.Op("add", (2, 3))),
    ),
    4,
    "bf16",
    vectors=(ir.Vector("f32"), ir.Vector("f32")),
)
RESIDUAL = dataclasses.replace(
    AFFINE,
    ops=(*AFFINE.ops, ir.Op("side", attr=0), ir.Op("add", (4, 5))),
    result=6,
    sides=("bf16",),
)
APPLY: dict[ir.Epilogue, emulator.Apply] = {
    PLAIN: single.APPLY[PLAIN],
    SIDE: single.APPLY[SIDE],
    AFFINE: lambda acc, vectors, sides: [acc * vectors[0] + vectors[1]],
    RESIDUAL: lambda acc, vectors, sides: [acc * vectors[0] + vectors[1] + sides[0]],
}
KINDS = (
    (RESIDUAL, AFFINE, True),
    (PLAIN, PLAIN, False),
    (AFFINE, RESIDUAL, True),
    (AFFINE, PLAIN, False),
    (PLAIN, SIDE, False),
    (SIDE, AFFINE, False),
    (AFFINE, AFFINE, True),
)


def chain(
    problem: ir.Problem,
    channels: int,
    first: ir.Epilogue = PLAIN,
    second: ir.Epilogue = PLAIN,
    stored: bool = True,
    b_layout: ir.Layout = "row",
) -> ir.Chain:
    """``problem``, and a product over what it makes, of so many ``channels``."""
    read = gemm(problem.rows, channels, problem.channels, b_layout=b_layout)
    return ir.Chain(
        first=ir.Region(problem=problem, epilogue=first),
        second=ir.Region(problem=read, epilogue=second),
        stored=stored,
    )


# The first problem, the second one's channels, and how its filter lies.
PROBLEMS: list[tuple[ir.Problem, int, ir.Layout]] = [
    (gemm(1, 8, 8), 8, "row"),
    (gemm(300, 256, 64), 64, "row"),
    (gemm(129, 512, 128, b_layout="col"), 128, "col"),
    (gemm(70, 256, 256), 256, "col"),
    (gemm(200, 64, 200), 16, "row"),
    (gemm(333, 128, 576), 64, "row"),
    (gemm(700, 32, 96, b_layout="col"), 96, "row"),
    (gemm(90, 200, 72), 40, "col"),
    (gemm(260, 136, 24), 72, "row"),
    (conv(2, 7, 9, 64, 256, 1), 64, "row"),
    (hwio(conv(2, 14, 14, 48, 48)), 48, "row"),
    (conv(1, 28, 28, 64, 64), 64, "col"),
    (hwio(conv(2, 13, 12, 48, 48, stride=(2, 2))), 48, "row"),
    (conv(2, 14, 14, 64, 64, stride=(2, 2)), 200, "row"),
    (conv(1, 14, 14, 64, 128), 64, "col"),
    (hwio(conv(2, 16, 18, 3, 48, stride=(2, 2), padding=(0, 1, 0, 1))), 48, "row"),
    (conv(2, 9, 9, 24, 72, 1, stride=(2, 2)), 24, "row"),
    (conv(3, 7, 7, 128, 64), 256, "row"),
]


def operands(taken: ir.Chain) -> tuple[dict, list[np.ndarray]]:
    """Small integers, whose sums are exact in any order, and the expected outputs."""
    rng = np.random.default_rng(len(taken.text))

    def some(count: int) -> np.ndarray:
        return rng.integers(-2, 3, count).astype(np.float32)

    products: list[np.ndarray] = []
    loaded: list[np.ndarray] = []  # side inputs that no region makes
    vectors: list[list[np.ndarray]] = []
    expected: list[np.ndarray] = []
    for region, made in zip(taken.regions, (-1, *taken.joints), strict=True):
        problem, epilogue = region.problem, region.epilogue
        a, b = map(some, problem.operand_elements)
        sides = [some(problem.rows * problem.channels) for _ in epilogue.sides]
        if made is None:
            a = expected[-1]
        else:
            products.append(a)
        products.append(b)
        loaded += [side for i, side in enumerate(sides) if i != made]
        if made is not None and made >= 0:
            sides[made] = expected[-1]
        vectors.append([some(problem.channels) for _ in epilogue.vectors])
        inputs = jax.tree.map(jnp.asarray, (a, b, sides, vectors[-1]))
        expected.append(np.asarray(evaluate.evaluate(region, *inputs)).reshape(-1))
    numbers = (recipes.A, recipes.B, *map(recipes.side, range(recipes.MAX_SIDES)))
    given = dict(zip(numbers, [*products, *loaded], strict=False))
    # First, second, shortcut.
    ordered = (*vectors[-2:], *vectors[:-2])
    kept = expected[-2 if taken.stored else -1 :]
    return {"operands": given, "vectors": ordered}, kept


def check(taken: ir.Chain, config: Config, gpu: arch.GpuArch, seed: int = 0) -> None:
    given, expected = operands(taken)
    launch = emulator.Launch(
        chain_sm90.recipe(taken, config, gpu),
        chain_sm90.instantiate(taken, config, gpu),
        elements=[output.size for output in expected],
        applies=[APPLY[r.epilogue] for r in (*taken.regions[-2:], *taken.regions[:-2])],
        prologue=chain_sm90.prologue(taken),
        seed=seed,
        **given,
    ).run()
    np.testing.assert_array_equal(launch.writes, 1, config.text)
    for got, want in zip(launch.outputs, expected, strict=True):
        np.testing.assert_array_equal(got, want, config.text)


def sample(taken: ir.Chain, gpu: arch.GpuArch, count: int) -> list[Config]:
    """Some of all tiles, ranked or not."""
    tiles = list(chain_tiles.tiles_of(taken, gpu))
    chosen = random.Random(taken.text).sample(tiles, min(count, len(tiles)))
    kinds = {(t.warpgroups, t.cluster, t.rings.resident, t.ahead): t for t in tiles}
    return [tile.config() for tile in dict.fromkeys((*kinds.values(), *chosen))]


@pytest.mark.parametrize(
    "index", range(len(PROBLEMS)), ids=lambda i: PROBLEMS[i][0].text
)
def test_what_the_kernel_computes(index):
    problem, channels, b_layout = PROBLEMS[index]
    first, second, stored = KINDS[index % len(KINDS)]
    taken = chain(problem, channels, first, second, stored, b_layout)
    assert chain_sm90.supports(taken, HOPPER) is None
    for seed, config in enumerate(chain_sm90.configs(taken, HOPPER)[:3]):
        check(taken, config, HOPPER, seed)
    for seed, config in enumerate(sample(taken, SMALL, 6)):
        check(taken, config, SMALL, seed)


def joined(
    shortcut: ir.Problem,
    first: ir.Problem,
    channels: int,
    *,
    stored: bool = True,
    epilogues: tuple[ir.Epilogue, ...] = (AFFINE, RESIDUAL, AFFINE),
) -> ir.Chain:
    """``chain``, its first product merged with a ``shortcut``'s."""
    read = gemm(first.rows, channels, first.channels)
    regions = [
        ir.Region(problem=problem, epilogue=epilogue)
        for problem, epilogue in zip((shortcut, first, read), epilogues, strict=True)
    ]
    merged = ir.Chain(first=regions[0], second=regions[1], stored=False, side=0)
    return ir.Chain(first=merged, second=regions[2], stored=stored)


JOINED = [
    joined(gemm(300, 256, 64), gemm(300, 256, 64), 64),
    joined(gemm(129, 512, 256), gemm(129, 512, 128), 128, stored=False),
    joined(
        hwio(conv(3, 14, 14, 256, 512, 1, stride=(2, 2))),
        hwio(conv(3, 7, 7, 128, 512, 1)),
        128,
    ),
    joined(
        hwio(conv(2, 9, 9, 40, 136, 1, stride=(2, 2))),
        hwio(conv(2, 5, 5, 200, 136, 1)),
        72,
        epilogues=(PLAIN, SIDE, PLAIN),
    ),
    joined(gemm(70, 64, 24), gemm(70, 64, 8), 200, stored=False),
    joined(gemm(1, 8, 8), gemm(1, 8, 8), 8),
]


@pytest.mark.parametrize("taken", JOINED, ids=lambda taken: taken.made.problem.text)
def test_what_the_kernel_computes_with_a_shortcut(taken: ir.Chain) -> None:
    assert chain_sm90.supports(taken, HOPPER) is None
    for seed, config in enumerate(chain_sm90.configs(taken, HOPPER)[:3]):
        check(taken, config, HOPPER, seed)
    for seed, config in enumerate(sample(taken, SMALL, 8)):
        check(taken, config, SMALL, seed)


def test_the_worker_binds_all_three() -> None:
    """The shortcut's operands, then as side inputs the others', as the maps say."""
    # 3x7x7, 256 and 128 channels to 512, and these to 128.
    form = forms.chain_forms(JOINED[2])[0]
    config = chain_sm90.configs(form.region, HOPPER)[0]
    candidate = plan.ChainCandidate(form, chain_sm90, config, HOPPER)
    request = isolate.request_for(candidate, "d", Path("p"), 2, 3, verify=True)
    asked, pixels = request["operands"], 3 * 7 * 7
    sizes = [size // 2 for _, size, *_ in (*asked["ab"], *asked["sides"])]
    assert sizes[:2] == [3 * 14 * 14 * 256, 256 * 512]
    assert sizes[2:] == [pixels * 128, 128 * 512, 512 * 128]
    assert len(asked["vectors"]) == 6
    assert asked["output_bytes"] == [2 * pixels * 512, 2 * pixels * 128]
    maps = chain_sm90.recipe(form.region, config, HOPPER).maps
    assert [each.operand for each in maps] == [
        *(recipes.side(0), recipes.side(1), recipes.side(2)),
        *(recipes.output(0), recipes.output(1), recipes.A, recipes.B),
    ]


def test_two_slots_are_enough_with_a_shortcut() -> None:
    taken = JOINED[1]
    tiles = [t for t in chain_tiles.tiles_of(taken, SMALL) if t.group == 2]
    rings = dataclasses.replace(tiles[0].rings, stores=2)
    check(taken, dataclasses.replace(tiles[0], rings=rings).config(), SMALL)


def test_what_is_refused_with_a_shortcut() -> None:
    def refusal(one: ir.Problem, other: ir.Problem, **options: Any) -> str:
        return str(chain_sm90.supports(joined(one, other, 64, **options), HOPPER))

    one = conv(2, 7, 7, 64, 256, 1)
    assert "line" in refusal(conv(2, 7, 7, 64, 256), one)
    assert "two layouts" in refusal(hwio(one), one)
    assert "besides" in refusal(one, one, epilogues=(AFFINE, RESIDUAL, SIDE))
    wide = joined(gemm(64, 64, 64), gemm(64, 64, 64), 2048)
    assert "registers" in str(chain_sm90.supports(wide, HOPPER))


@pytest.mark.parametrize("ring", ["pixels", "filters", "stores"])
def test_rings_are_as_long_as_they_must_be(ring):
    """One stage less than the least, and warpgroups wait for ever."""
    taken = chain(gemm(300, 512, 128), 128, RESIDUAL, AFFINE)
    tile = next(t for t in chain_tiles.tiles_of(taken, SMALL) if not t.rings.resident)
    boxes, _ = chain_tiles.steps_of(tile, chain_tiles.shape_of(taken))
    least = {"pixels": boxes, "filters": 2 + tile.group, "stores": 2}
    rings = dataclasses.replace(tile.rings, **least)
    for seed in range(5):
        config = dataclasses.replace(tile, rings=rings).config()
        check(taken, config, SMALL, seed)
    short = dataclasses.replace(rings, **{ring: least[ring] - 1})
    with pytest.raises((emulator.Deadlock, AssertionError)):
        check(taken, dataclasses.replace(tile, rings=short).config(), SMALL)


@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        (chain(gemm(64, 64, 64), 12), "TMA"),
        (chain(gemm(64, 68, 64), 64), "TMA"),
        (chain(gemm(64, 64, 64, batch=2), 64), "batched"),
        (chain(gemm(64, 64, 64), 64, SIDE, SIDE), "2 side inputs"),
        (chain(gemm(64, 64, 64), 64, single.STORED), "auxiliary"),
        (chain(gemm(64, 64, 64), 64, PLAIN, single.WIDE), "f32"),
        (chain(gemm(64, 64, 64), 2048), "registers"),
    ],
)
def test_what_is_refused(taken, reason):
    assert reason in str(chain_sm90.supports(taken, HOPPER))


def test_not_on_other_architectures():
    older = arch.from_name("sm_80")
    assert "sm_80" in str(chain_sm90.supports(chain(gemm(64, 64, 64), 64), older))


def test_configs_are_few_ordered_and_read_back():
    taken = chain(gemm(100352, 256, 64), 64, RESIDUAL, AFFINE)
    configs = chain_sm90.configs(taken, HOPPER)
    assert 3 <= len(configs) <= 12
    shape = chain_tiles.shape_of(taken)
    tiles = [chain_tiles.Tile.of(config) for config in configs]
    assert [tile.config() for tile in tiles] == list(configs)
    totals = [chain_rank.estimate(t, taken, shape, HOPPER).total for t in tiles]
    # The best of every kind follow the best of all.
    shares = [t.cluster > 1 for t in tiles].index(True)
    ahead = [bool(t.ahead) for t in tiles].index(True)
    many, plain = (
        next(
            i
            for i, t in enumerate(tiles)
            if (t.warpgroups > 2) == wide and t.cluster == 1 and not t.ahead
        )
        for wide in (True, False)
    )
    assert max(plain, many, shares, ahead) <= 5 and totals[0] == min(totals)
    assert totals[6:] == sorted(totals[6:])


def test_the_least_bytes_bound_the_estimate():
    taken = chain(gemm(100352, 256, 64), 64, RESIDUAL, AFFINE)
    shape = chain_tiles.shape_of(taken)
    for tile in chain_tiles.tiles_of(taken, HOPPER):
        found = chain_rank.estimate(tile, taken, shape, HOPPER)
        assert found.total > found.memory > 0


def test_sizes_are_not_in_the_source():
    short, long = (
        chain(gemm(m, 256, 64), 64, RESIDUAL, AFFINE) for m in (6272, 100352)
    )
    config = chain_sm90.configs(long, HOPPER)[0]
    texts = {
        codegen.chain_source(taken, chain_sm90, config, HOPPER)
        for taken in (short, long)
    }
    (text,) = texts
    assert '#include "jax_bolt/chain/sm90.hpp"' in text
    assert text.index("struct First") < text.index("struct Second")
