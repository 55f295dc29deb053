# SPDX-License-Identifier: Apache-2.0
"""The benchmark of chains without a GPU: its pairs, its plan and its table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("flax")
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import bench_chains, chain_pairs
from jax_bolt._src import arch
from jax_bolt._src.tune import isolate

HOPPER = arch.from_name("sm_90a")


def pairs(*groups: str, batch: int = 32) -> list[chain_pairs.Pair]:
    return chain_pairs.collect(groups, batch, "bfloat16")


def test_bolts_pairs_are_chains_that_the_kernel_takes():
    found = pairs(chain_pairs.TABLE1, chain_pairs.TABLE2)
    assert [pair.paper for pair in found] == (
        [1.34, 1.28, 1.46, 1.10, 1.41, 1.87, 1.24, 1.12, 2.02]
    )
    for pair in found:
        assert not pair.site.region.stored
        candidates, reason = bench_chains.candidates(pair, HOPPER)
        assert candidates, (pair.name, reason)


def test_a_bottlenecks_result_is_stored_and_its_bytes_counted():
    first = pairs(chain_pairs.RESNET)[0]
    region = first.site.region
    assert region.stored and len(region.made.epilogue.sides) == 1
    blank = bench_chains.blank(first)
    assert 1.2 < blank["bytes_ratio"] < 1.4
    assert "-" in bench_chains.row(blank)


def test_a_first_block_is_compared_with_its_merged_pair():
    found = [p for p in pairs(chain_pairs.RESNET) if len(p.site.sites) == 3]
    assert [p.name for p in found][:2] == [
        "32x56x56 64>256 + 64>256 s1 > 64",
        "32x28x28 128>512 + 256>512 s2 > 128",
    ]
    *taken, wide = found
    assert bench_chains.candidates(wide, HOPPER)[0] == []  # 512 channels at the end
    for pair in taken:
        candidates, reason = bench_chains.candidates(pair, HOPPER)
        assert candidates, (pair.name, reason)
        for site in (pair.site.first, pair.site.second):
            assert bench_chains.own_candidates(site, HOPPER)
        assert 1.1 < bench_chains.blank(pair)["bytes_ratio"] < 1.7


def test_the_worker_can_be_asked():
    """The second filter is the first side input, and both results are written."""
    pair = pairs(chain_pairs.RESNET, batch=1)[0]
    candidate = bench_chains.candidates(pair, HOPPER)[0][0]
    request = isolate.request_for(candidate, "d", Path("p"), 2, 3, verify=True)
    operands = request["operands"]
    assert [size for _, size, *_ in operands["sides"]] == [
        64 * 256 * 2,
        56 * 56 * 256 * 2,
    ]
    assert operands["output_bytes"] == [56 * 56 * 256 * 2, 56 * 56 * 64 * 2]
    assert len(operands["vectors"]) == 8


def test_plan_and_refusals(capsys):
    assert bench_chains.main(["--plan", "--only", "64>256+res"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("resnet50: 32x56x56 64>256+res > 64\n    pixels=")
    assert bench_chains.main(["--plan", "--only", "nothing"]) == 2
