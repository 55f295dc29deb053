# SPDX-License-Identifier: Apache-2.0
"""What is tuned for, and into: a device, and the stores of kernels and results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import ir, kernels, plan
from ..arch import GpuArch
from ..errors import CompileError
from ..invoke import AnyExecutable, ChainExecutable, Executable, launched
from ..jit import loader, store, toolchain
from ..plan import AnyCandidate, ChainCandidate
from . import db


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """The device to tune for and the stores to tune into."""

    device: Any  # jax.Device
    ordinal: int  # CUDA's, in this process
    arch: GpuArch
    kernels: store.Store
    results: db.Database
    tools: toolchain.Toolchain | CompileError  # or why there is none
    origin: plan.Origin
    jobs: int | None
    disable: tuple[str, ...]

    @property
    def toolchain(self) -> toolchain.Toolchain:
        """Raises CompileError where there is none."""
        if isinstance(self.tools, CompileError):
            raise self.tools
        return self.tools

    def digest(self, source: str) -> str:
        """Of the kernel that is built from ``source``. Raises as ``toolchain``."""
        return self.kernels.digest(self.toolchain, source, self.arch)


def origin(tools: toolchain.Toolchain | CompileError) -> plan.Origin:
    """Raises CompileError where our headers or CUTLASS's are missing."""
    compiler = None if isinstance(tools, CompileError) else f"nvcc {tools.version}"
    regions, chains = kernels.HEADERS, kernels.CHAIN_HEADERS
    return plan.Origin(toolchain.sources(regions), compiler, toolchain.sources(chains))


def executable(
    region: ir.Work,
    candidate: AnyCandidate,
    digest: str,
    artifact: Path | CompileError,
    target: Any,
) -> AnyExecutable:
    """Loads a built kernel and asks it whether it takes the problem.

    Raises:
      CompileError: it was not built, cannot be loaded, or refuses.
    """
    if isinstance(artifact, CompileError):
        raise artifact
    loader.load(digest, artifact)
    kind, dims = launched(candidate.form.region)
    native = loader.native()
    try:
        recipe, held = candidate.recipe, candidate.held_recipe
    except ValueError as error:
        raise CompileError(f"{candidate.text} cannot be launched: {error}") from error
    reason = native.check(digest, kind, dims, recipe)
    if reason is not None:
        raise CompileError(f"{candidate.text} refuses the problem: {reason}")
    workspace = native.workspace_bytes(
        digest, kind, dims, target.ordinal, target.arch.sm_count, recipe
    )
    if isinstance(candidate, ChainCandidate):
        assert isinstance(region, ir.Chain)
        problems = tuple(each.problem for each in region.regions)
        launch = candidate.form, workspace, recipe, held
        return ChainExecutable(digest, problems, *launch)
    assert isinstance(region, ir.Region)
    launch = candidate.form, workspace, recipe, held
    return Executable(digest, region.problem, *launch)
