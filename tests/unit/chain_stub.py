# SPDX-License-Identifier: Apache-2.0
"""A template for chains that knows nothing of any kernel, and programs with chains."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jax_bolt._src import chain as chains
from jax_bolt._src import ir, options, program
from jax_bolt._src.arch import GpuArch
from jax_bolt._src.kernels.config import Config
from jax_bolt._src.kernels.recipe import A, B, D, Recipe
from jax_bolt._src.kernels.template import Artifact

name = "chain_stub"
header = "jax_bolt/stub.hpp"
artifact: Artifact = "cubin"


def supports(chain: ir.Chain, arch: GpuArch) -> str | None:
    del arch
    problem = chain.regions[0].problem
    depth = problem.k if isinstance(problem, ir.GemmProblem) else problem.c
    bad = [n for n in (depth, problem.channels) if n % 8]
    return f"{bad[0]} channels" if bad else None


def configs(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    del chain, arch
    return tuple(Config.of(name, pixels=n) for n in (64, 128))


def instantiate(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    del arch
    return f"jax_bolt::stub::Chain<{config['pixels']}, {int(chain.stored)}>"


def reasoning(chain: ir.Chain, config: Config, arch: GpuArch) -> str:
    del chain, arch
    return f"{config['pixels']} pixels"


def micros(chain: ir.Chain, config: Config, arch: GpuArch) -> float:
    del chain, config, arch
    return 1.0


def prologue(chain: ir.Chain) -> str | None:
    del chain
    return None


def space(chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]:
    return configs(chain, arch)


def recipe(
    chain: ir.Chain, config: Config, arch: GpuArch, *, held: bool = False
) -> Recipe:
    del config, arch
    return Recipe(threads=128, grid=chain.second.problem.rows, pointers=(A, B, D))


def shape(*dims: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype)


def conv(x: Any, w: Any, stride: int = 1) -> Any:
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def bottleneck(x: Any, residual: Any, up: Any, down: Any) -> tuple[Any, Any]:
    """Expand, residual and relu, and the next reduction: the first one is stored."""
    y = jax.nn.relu(conv(x, up) + residual)
    return jax.nn.relu(conv(y, down)), y


BOTTLENECK = (
    *(shape(32, 28, 28, 128), shape(32, 28, 28, 512)),
    *(shape(1, 1, 128, 512), shape(1, 1, 512, 128)),
)


def traced(fun: Any, *args: Any, disable: tuple[str, ...] = ()) -> Any:
    """The rewritten program."""
    return program.trace(fun, (), args, {}, options.Options(disable=disable))[0]


def pairs(fun: Any, *args: Any) -> list[chains.Chained]:
    """Of all sequences of a function."""
    done = traced(fun, *args)
    return [pair for found in chains.sequences(done.program) for pair in found]
