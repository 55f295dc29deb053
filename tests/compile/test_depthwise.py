# SPDX-License-Identifier: Apache-2.0
"""The depthwise kernel: its code run on the CPU thread by thread, and by nvcc."""

from __future__ import annotations

import ctypes
import dataclasses
import random
import shutil
import struct
import subprocess
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from region_cases import depthwise_problem as conv

from jax_bolt._src import arch, evaluate, invoke, ir, options, paths
from jax_bolt._src.jit import codegen, compiler, toolchain
from jax_bolt._src.kernels import depthwise, depthwise_tiles
from jax_bolt._src.kernels import recipe as recipes
from jax_bolt._src.kernels.depthwise_tiles import Shape, Tile

HERE = Path(__file__).parent
SM80, SM86, SM90A = (arch.from_name(n) for n in ("sm_80", "sm_86", "sm_90a"))


def epilogue(out: ir.DType, *sides: ir.DType) -> ir.Epilogue:
    """max(acc * vector_0 + vector_1, 0) + the sum of the side inputs."""
    ops = [
        *(ir.Op("acc"), ir.Op("vector", attr=0), ir.Op("mul", (0, 1))),
        *(ir.Op("vector", attr=1), ir.Op("add", (2, 3))),
        *(ir.Op("const", attr=0.0), ir.Op("max", (4, 5))),
    ]
    for i, dtype in enumerate(sides):
        last = len(ops) - 1
        if dtype == "bool":
            ops += [ir.Op("side", attr=i), ir.Op("select", (last + 1, 5, last))]
        else:
            ops += [ir.Op("side", attr=i), ir.Op("add", (last, last + 1))]
    vectors = (ir.Vector("f32"), ir.Vector("bf16", scalar=True))
    return ir.Epilogue(tuple(ops), len(ops) - 1, out, vectors, sides)


def storing(made: ir.Epilogue, dtype: ir.DType) -> ir.Epilogue:
    """With the sum before the max as an auxiliary output."""
    return dataclasses.replace(made, auxiliary=(ir.Output(4, dtype),))


REGIONS = [
    ir.Region(problem=problem, epilogue=made)
    for problem, made in (
        (conv(2, 9, 11, 16, 3), epilogue("bf16", "bf16")),
        (conv(1, 9, 8, 40, 7), epilogue("f32")),
        (conv(1, 34, 6, 16, 7), epilogue("bf16")),
        (conv(1, 25, 6, 8, 6, 3, padding=(0, 0, 1, 1)), epilogue("bf16", "bf16")),
        (conv(1, 13, 15, 16, 5, stride=(2, 2), padding=(1, 2, 1, 2)), epilogue("bf16")),
        (
            conv(1, 15, 13, 8, 3, dilation=(2, 3), stride=(2, 2), padding=(2, 1, 3, 2)),
            epilogue("bf16", "f32", "bf16"),
        ),
        (conv(1, 9, 10, 8, 3, stride=(3, 4), padding=(5, 4, 4, 3)), epilogue("bf16")),
        (conv(1, 6, 9, 5, 3), epilogue("bf16", "bool")),
        (conv(1, 6, 9, 18, 3), epilogue("bf16", "bf16")),
        (conv(1, 6, 7, 12, 3, k=24), epilogue("bf16", "f32")),
        (conv(1, 7, 8, 20, 3, dtype="f32"), epilogue("f32", "f32")),
        (conv(1, 12, 9, 8, 13), epilogue("bf16")),
        (conv(1, 12, 9, 8, 13, dtype="f32"), epilogue("f32")),
        # rows of a strip or two: padding on both sides, with a stride, on one side
        (conv(2, 7, 7, 24, 7), epilogue("bf16", "bf16")),
        (conv(1, 13, 14, 16, 5, stride=(2, 2), padding=(1, 2, 1, 2)), epilogue("bf16")),
        (conv(1, 9, 6, 36, 7, 3, padding=(3, 3, 2, 0)), epilogue("bf16")),
        (conv(1, 7, 5, 8, 5, dilation=(2, 2), padding=(4, 4, 4, 4)), epilogue("bf16")),
        (conv(2, 9, 14, 16, 7), epilogue("bf16", "f32")),
        (conv(1, 8, 13, 40, 5, padding=(2, 2, 1, 3)), storing(epilogue("f32"), "bf16")),
        (conv(1, 9, 25, 16, 5, stride=(2, 2)), epilogue("bf16", "bf16")),
        (conv(1, 7, 10, 6, 3, k=12), epilogue("bf16")),
        (conv(1, 6, 11, 8, 13, dtype="f32"), epilogue("f32")),
        # outputs of padding alone
        (conv(1, 3, 2, 8, 5, padding=(4, 6, 6, 4)), epilogue("bf16")),
        (conv(2, 7, 9, 18, 3), storing(epilogue("bf16", "bf16"), "bf16")),
        (conv(1, 9, 8, 16, 5, stride=(2, 2)), storing(epilogue("bf16"), "f32")),
    )
]


def tiles(region: ir.Region) -> list[Tile]:
    """The first candidate, one in chunks of some rows, those whose strips are rows or
    halves of them, and others of two widths."""
    chosen = [Tile.of(depthwise.configs(region, SM90A)[0])]
    problem = region.problem
    assert isinstance(problem, ir.ConvProblem)
    chosen.append(dataclasses.replace(chosen[0], rows=-(-problem.p // 3)))
    rng = random.Random(region.text)
    every = list(depthwise_tiles.tiles_of(region, SM90A))
    for whole in (1, 2):
        if rows := [tile for tile in every if tile.whole == whole]:
            chosen.append(rng.choice(rows))
    for width in {tile.width for tile in every}:
        chosen.append(rng.choice([tile for tile in every if tile.width == width]))
    return list(dict.fromkeys(chosen))[:5]


def host_library(kernels: list[tuple[ir.Region, Tile]], folder: Path) -> ctypes.CDLL:
    """``run_<i>`` launches the i-th kernel."""
    lines = ['#include "jax_bolt/depthwise/depthwise.hpp"']
    for i, (region, tile) in enumerate(kernels):
        kernel = depthwise.instantiate(region, tile.config(), SM90A)
        kernel = kernel.replace("<Epilogue,", f"<Epilogue{i},")
        lines += [
            codegen.functor(region.epilogue, f"Epilogue{i}"),
            f'extern "C" void run_{i}(void const* params, int grid) {{',
            f"  jax_bolt::depthwise::launch<{kernel}>(params, grid);",
            "}",
        ]
    source, library = folder / "kernels.cc", folder / "kernels.so"
    source.write_text("\n".join(lines) + "\n")
    compile_ = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread"]
    include = [f"-I{HERE / 'on_cpu'}", f"-I{paths.own_include()}"]
    command = [*compile_, *include, "-o", str(library), str(source)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@dataclasses.dataclass
class Arrays:
    """A region's operands by number, as a recipe names them."""

    by_number: dict[int, np.ndarray]

    @staticmethod
    def of(region: ir.Region) -> Arrays:
        p, made = region.problem, region.epilogue
        assert isinstance(p, ir.ConvProblem)
        rng = np.random.default_rng(0)

        def drawn(dtype: ir.DType, *shape: int) -> np.ndarray:
            # Aligned as XLA's buffers are.
            kind = np.dtype(invoke.JAX_DTYPES[dtype])
            count = int(np.prod(shape))
            held = np.zeros(count * kind.itemsize + 64, np.uint8)
            start = -held.ctypes.data % 64
            array = held[start : start + count * kind.itemsize].view(kind)
            array[:] = rng.integers(0 if dtype == "bool" else -3, 2, count)
            return array.reshape(shape)

        full = (p.rows, p.k)
        return Arrays(
            {
                recipes.A: drawn(p.dtype, p.n, p.h, p.w, p.c),
                recipes.B: drawn(p.dtype, p.r, p.s, p.k),
                **{
                    recipes.output(i): drawn(output.dtype, *full)
                    for i, output in enumerate(made.outputs)
                },
                **{recipes.side(i): drawn(d, *full) for i, d in enumerate(made.sides)},
                **{
                    recipes.vector(i): drawn(v.dtype, 1 if v.scalar else p.k)
                    for i, v in enumerate(made.vectors)
                },
            }
        )

    def parameters(self, recipe: recipes.Recipe) -> bytes:
        """What the launcher fills in."""
        addresses = [
            self.by_number[i].ctypes.data if i != recipes.NULL else 0
            for i in recipe.pointers
        ]
        return struct.pack(
            f"{len(addresses)}Q{len(recipe.ints)}i4x", *addresses, *recipe.ints
        )

    def truth(self, region: ir.Region) -> list[np.ndarray]:
        """Of every output."""

        def several(first: int, count: int) -> list:
            return [jnp.asarray(self.by_number[first + i]) for i in range(count)]

        made = region.epilogue
        a, b = (jnp.asarray(self.by_number[i]) for i in (recipes.A, recipes.B))
        sides = several(recipes.side(0), len(made.sides))
        vectors = several(recipes.vector(0), len(made.vectors))
        found = evaluate.outputs(region, a, b, sides, vectors)
        return [np.asarray(value) for value in found]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_the_code_on_the_cpu(tmp_path):
    """All threads of all blocks, on integers, whose sums are exact."""
    kernels = [(region, tile) for region in REGIONS for tile in tiles(region)]
    shapes = [Shape(tile, region) for region, tile in kernels]
    assert any(s.leaves_out and s.tile.rows > s.slots and s.chunks > 1 for s in shapes)
    assert any(s.leaves_out and s.tile.rows < s.slots // 2 for s in shapes)
    for whole in (1, 2):
        some = [s for s in shapes if s.tile.whole == whole]
        assert len({s.tile.width for s in some}) > 1 and any(s.chunks > 1 for s in some)
    halves = [s for s in shapes if s.tile.whole == 2]
    assert {s.problem.q % s.tile.outputs == 0 for s in halves} == {True, False}
    assert any(s.multiplier > 1 for s in halves)
    assert {s.item for s in shapes if not s.resident} == {2, 4}
    library = host_library(kernels, tmp_path)
    for i, (region, tile) in enumerate(kernels):
        recipe = depthwise.recipe(region, tile.config(), SM90A)
        arrays = Arrays.of(region)
        getattr(library, f"run_{i}")(arrays.parameters(recipe), recipe.grid)
        for number, want in enumerate(arrays.truth(region)):
            got = arrays.by_number[recipes.output(number)]
            np.testing.assert_array_equal(
                got.astype("f4"),
                want.astype(got.dtype).astype("f4"),
                err_msg=f"{region.text} {tile}",
            )


def silu(region: ir.Region) -> ir.Region:
    """With a BatchNorm, a silu and a side input: the longest of usual epilogues."""
    ops = [ir.Op("acc")]
    for i, name in enumerate(("sub", "mul", "add")):
        last = len(ops) - 1
        ops += [ir.Op("vector", attr=i), ir.Op(name, (last, last + 1))]
    ops += [ir.Op("logistic", (6,)), ir.Op("mul", (6, 7))]
    ops += [ir.Op("side", attr=0), ir.Op("add", (8, 9))]
    dtype = region.problem.dtype
    made = ir.Epilogue(tuple(ops), 10, dtype, (ir.Vector("f32"),) * 3, (dtype,))
    return dataclasses.replace(region, epilogue=made)


@pytest.mark.parametrize(
    ("problem", "device"),
    [
        (conv(32, 56, 56, 96, 7), SM90A),
        (conv(32, 112, 112, 96, 3, stride=(2, 2)), SM80),
        (conv(32, 28, 28, 240, 5, dtype="f16"), SM86),
        (conv(32, 28, 28, 33, 3, dtype="f32"), SM90A),
        (conv(8, 28, 28, 64, 13), SM90A),
    ],
    ids=lambda value: getattr(value, "text", getattr(value, "name", "")),
)
def test_the_first_candidates_do_not_spill(tmp_path, problem, device):
    region = silu(ir.Region(problem=problem, epilogue=epilogue(problem.dtype)))
    found = toolchain.find(options.current())
    config = depthwise.configs(region, device)[0]
    source = codegen.source(region, depthwise, config, device)
    binary = compiler.compile(found, source, device, tmp_path)
    assert binary.suffix == ".cubin"
    log = (tmp_path / compiler.LOG).read_text()
    assert "0 bytes spill stores, 0 bytes spill loads" in log, log
    assert Shape(Tile.of(config), region).takes
