# SPDX-License-Identifier: Apache-2.0
"""What the Hopper GEMM takes, which tiles it tries, and the C++ type it names."""

from __future__ import annotations

import dataclasses

import pytest

from jax_bolt._src import arch, ir
from jax_bolt._src.kernels import gemm_sm90

HOPPER = arch.from_name("sm_90a")
PLAIN = ir.Epilogue((ir.Op("acc"),), 0, "bf16")


def region(
    *, out: ir.DType = "bf16", sides: tuple[ir.DType, ...] = (), **problem
) -> ir.Region:
    """acc + side_0 + ... of a product; 4096 x 1024 x 512 in bf16 unless said."""
    ops = [ir.Op("acc")]
    for i in range(len(sides)):
        ops += [ir.Op("side", attr=i), ir.Op("add", (len(ops) - 1, len(ops)))]
    default: dict = {"m": 4096, "n": 1024, "k": 512, "dtype": "bf16"}
    return ir.Region(
        problem=ir.GemmProblem(**(default | problem)),
        epilogue=ir.Epilogue(tuple(ops), len(ops) - 1, out, sides=sides),
    )


@pytest.mark.parametrize(
    "taken",
    [
        region(),
        region(dtype="f16", out="f16", batch=12, a_layout="col", b_layout="col"),
        region(dtype="f32", out="f32", b_layout="col"),
        region(out="f32", sides=("bf16", "f32")),
        region(m=1, n=8, k=8),
        region(m=2**31 - 2**13, n=64, k=8),
        region(k=513, a_layout="col"),  # K is contiguous in neither operand
        region(m=4095),  # nor is M in row-major A and D
    ],
    ids=lambda r: r.text,
)
def test_supported(taken):
    assert gemm_sm90.supports(taken, HOPPER) is None
    assert 1 <= len(gemm_sm90.configs(taken, HOPPER)) <= 5


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (region(dtype="f32", out="f32"), "K is contiguous"),
        (region(dtype="f32", a_layout="col", b_layout="col"), "K is contiguous"),
        (region(k=516), "A's rows of 516 bf16 are not a multiple of 16 bytes"),
        (region(k=516, a_layout="col", b_layout="col"), "B's rows of 516"),
        (region(n=1004), "B's rows of 1004"),
        (region(n=1004, b_layout="col"), "D's rows of 1004"),
        (region(n=1004, b_layout="col", out="f32", sides=("bf16",)), "side 0's rows"),
        (region(sides=("bf16", "bool")), "bool"),
        (region(out="bool"), "bool"),
        (region(sides=("bf16",) * 3), "3 side inputs, more than 2"),
        (region(m=0), "empty"),
        (region(k=0), "empty"),
        (region(m=2**31), "extent above"),
        (region(m=2**30, n=2**20, k=8), "too many tiles"),
        (
            ir.Region(
                problem=ir.ConvProblem(n=1, h=8, w=8, c=8, k=8, r=3, s=3, dtype="bf16"),
                epilogue=PLAIN,
            ),
            "not a matrix product",
        ),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_refused_with_a_reason(refused, reason):
    assert reason in (gemm_sm90.supports(refused, HOPPER) or "taken")


@pytest.mark.parametrize("name", ["sm_80", "sm_89", "sm_100a"])
def test_only_hopper(name):
    reason = gemm_sm90.supports(region(), arch.from_name(name))
    assert reason == f"needs sm_90a, not {name}"


def best(a_region: ir.Region) -> tuple[int, int]:
    """Rows and channels of the first config's tile."""
    rows, channels, _ = str(gemm_sm90.configs(a_region, HOPPER)[0]["tile"]).split("x")
    return int(rows), int(channels)


def test_configs_are_distinct_and_name_the_template():
    configs = gemm_sm90.configs(region(), HOPPER)
    assert len({config.text for config in configs}) == len(configs)
    # Each costs a minute of compiling.
    assert 1 <= len(configs) <= 2
    assert {config.template for config in configs} == {gemm_sm90.name}


def test_narrow_products_get_narrow_tiles():
    # As the first 1x1 convs of a ResNet-50: half of a wider tile would be thrown away.
    assert best(region(m=100352, n=64, k=64))[1] == 64


def test_few_tiles_get_smaller_ones():
    # 52 of the 132 SMs would have a tile of 128 x 128.
    rows, channels = best(region(m=1568, n=512, k=2048))
    assert rows * channels <= 64 * 128
    assert best(region(m=32, n=1000, k=2048)) == (64, 64)


def test_large_products_get_large_tiles():
    rows, channels = best(region(m=8192, n=8192, k=8192))
    assert rows * channels >= 128 * 128


def test_tiles_leave_shared_memory_to_the_operands():
    heavy = region(out="f32", sides=("f32", "f32"))
    widest = max(
        rows * channels
        for config in gemm_sm90.configs(heavy, HOPPER)
        for rows, channels, _ in [map(int, str(config["tile"]).split("x"))]
    )
    small = dataclasses.replace(HOPPER, smem_per_block=128 * 1024)
    assert widest >= 128 * 128
    for config in gemm_sm90.configs(heavy, small):
        rows, channels, _ = map(int, str(config["tile"]).split("x"))
        assert rows * channels < 128 * 256
    assert "shared memory" in (
        gemm_sm90.supports(heavy, dataclasses.replace(HOPPER, smem_per_block=2**15))
        or "taken"
    )


def test_the_type_follows_dtype_layout_and_config():
    product = region(dtype="f32", out="f32", b_layout="col")
    config = gemm_sm90.Config.of(
        gemm_sm90.name, tile="128x256x32", cluster="2x1", schedule="Cooperative"
    )
    assert gemm_sm90.instantiate(product, config, HOPPER) == (
        "jax_bolt::gemm::Sm90<Epilogue, float, cutlass::layout::RowMajor, "
        "cutlass::layout::ColumnMajor, 128, 256, 32, 2, 1, "
        "jax_bolt::gemm::Cooperative>"
    )


@pytest.mark.parametrize(("dtype", "depth"), [("bf16", 64), ("f32", 32)])
def test_depth_is_one_swizzled_row(dtype, depth):
    product = region(dtype=dtype, b_layout="col")
    for config in gemm_sm90.configs(product, HOPPER):
        assert str(config["tile"]).endswith(f"x{depth}")
