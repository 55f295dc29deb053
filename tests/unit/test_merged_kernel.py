# SPDX-License-Identifier: Apache-2.0
"""Merged shortcuts: what is taken, and how the kernel is launched."""

from __future__ import annotations

import dataclasses
from typing import Any

import chain_cases as cases
import implicit_gemm_emulator as emulator
import pytest

from jax_bolt._src import arch, forms, ir, plan
from jax_bolt._src.jit import codegen
from jax_bolt._src.kernels import merged_sm90
from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.implicit_gemm_tiles import Tile
from jax_bolt._src.tune import isolate

HOPPER = arch.from_name("sm_90a")


def chain_of(case: cases.Case) -> ir.Chain:
    """As the kernel takes it."""
    return forms.chain_forms(case.site().region)[0].region


@pytest.mark.parametrize("case", cases.MERGED, ids=str)
def test_every_tile_can_be_launched(case: cases.Case) -> None:
    chain = chain_of(case)
    assert merged_sm90.supports(chain, HOPPER) is None
    configs = merged_sm90.configs(chain, HOPPER)
    assert 1 <= len(configs) <= 12
    for config in configs:
        tile, made = Tile.of(config), merged_sm90.recipe(chain, config, HOPPER)
        assert made.smem_bytes <= HOPPER.smem_per_block // tile.ctas
        assert made.threads == 128 * (tile.warpgroups + 1)
        assert tile.rings.stores >= tile.blocks * tile.channel_blocks
        assert min(tile.rings.pixels, tile.rings.filters) >= 3
        # The first product's operands, the second one's, and the result.
        order = (recipes.A, recipes.B, recipes.side(0), recipes.side(1), recipes.D)
        assert tuple(each.operand for each in made.maps) == order
        assert made.pointers == tuple(map(recipes.vector, range(8)))
        # Two geometries, of the same tiles and the same stages.
        half = len(made.ints) // 2
        first, second = (
            emulator.geometry(ints) for ints in (made.ints[:half], made.ints[half:])
        )
        for name in ("channels", "tiles", "channel_tiles", "tile_cols"):
            assert getattr(first, name) == getattr(second, name)
        assert first.chunks == -(-depth(chain.regions[0]) // 64)
        assert second.chunks == -(-depth(chain.second) // 64)


def test_no_estimate_waits_for_the_shortcut() -> None:
    """It is a product, not a side input to load."""
    for case in cases.MERGED:
        image, one = merged_sm90._as_one(chain_of(case))
        assert one.epilogue.sides == ()
        a, b = one.problem.operand_elements
        moved = (a + b + one.problem.rows * one.problem.channels) * image.item
        assert one.bytes_moved == moved


def depth(region: ir.Region) -> int:
    return region.problem.operand_elements[1] // region.problem.channels


def test_what_is_refused() -> None:
    chain = chain_of(cases.MERGED[0])
    first, second = chain.first, chain.second

    def refusal(**changes: Any) -> str:
        return str(merged_sm90.supports(dataclasses.replace(chain, **changes), HOPPER))

    assert "needed elsewhere" in refusal(stored=True)
    wide = dataclasses.replace(second.epilogue, out_dtype="f32")
    assert "no tensors of f32" in refusal(
        second=dataclasses.replace(second, epilogue=wide)
    )
    added = dataclasses.replace(second.epilogue, sides=("bf16", "bf16"))
    assert "side inputs" in refusal(second=dataclasses.replace(second, epilogue=added))
    problem = ir.ConvProblem(
        n=3,
        h=14,
        w=14,
        c=64,
        k=256,
        r=3,
        s=3,
        padding=(1, 1, 1, 1),
        dtype="bf16",
        filter_layout="hwio",
    )
    assert "line" in refusal(first=dataclasses.replace(first, problem=problem))
    older = arch.from_name("sm_80")
    assert "sm_80" in str(merged_sm90.supports(chain, older))


def test_the_worker_binds_both_products() -> None:
    case = cases.MERGED[1]  # 5x7x7, 128 and 256 channels to 512, the second strided
    chain = case.site().region
    config = merged_sm90.configs(chain_of(case), HOPPER)[0]
    form = forms.chain_forms(chain)[0]
    candidate = plan.ChainCandidate(form, merged_sm90, config, HOPPER)
    request = isolate.request_for(candidate, "d", __file__, 2, 3, verify=True)  # pyright: ignore
    operands = request["operands"]
    sizes = [size for _, size, *_ in (*operands["ab"], *operands["sides"])]
    pixels = 5 * 7 * 7
    assert sizes == [2 * 128 * pixels, 2 * 128 * 512, 8 * 256 * pixels, 2 * 256 * 512]
    assert len(operands["vectors"]) == 8
    assert operands["output_bytes"] == [2 * 512 * pixels]


@pytest.mark.parametrize(
    ("channels", "last"),
    [((64, 320), 4), ((64, 96), 4), ((200, 72), 1), ((8, 24), 2), ((160, 112), 3)],
)
def test_products_of_the_last_chunk(channels: tuple[int, int], last: int) -> None:
    """As many as either product needs."""
    chain = chain_of(cases._shortcut(2, 9, *channels, 136))
    config = merged_sm90.configs(chain, HOPPER)[0]
    instance = merged_sm90.instantiate(chain, config, HOPPER)
    assert instance.endswith(f", {last}>")


def test_sizes_are_not_in_the_source() -> None:
    small, large = (chain_of(cases._shortcut(n, 14, 64, 64, 256)) for n in (3, 32))
    config = merged_sm90.configs(large, HOPPER)[0]
    texts = {
        codegen.chain_source(chain, merged_sm90, config, HOPPER)
        for chain in (small, large)
    }
    (text,) = texts
    assert '#include "jax_bolt/chain/merged_sm90.hpp"' in text
