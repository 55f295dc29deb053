# SPDX-License-Identifier: Apache-2.0
"""What a kernel template is: a C++ header and the knowledge of how to use it."""

from __future__ import annotations

from typing import Literal, Protocol, TypeAlias

from .. import ir
from ..arch import GpuArch
from .config import Config
from .recipe import Recipe

Artifact: TypeAlias = Literal["module", "cubin"]
"""What a TU is compiled to: a shared object with its own host code, or device code
alone, launched by a recipe."""


class Elsewhere(str):
    """A reason that says nothing of the region: the template is for other GPUs, for
    other work or for another form of it."""

    __slots__ = ()


class Template(Protocol):
    """A module of this package, one for each kernel header of ``cc/include``."""

    @property
    def name(self) -> str: ...
    @property
    def header(self) -> str: ...
    @property
    def artifact(self) -> Artifact: ...

    def supports(self, region: ir.Region, arch: GpuArch) -> str | None:
        """Why no config can run ``region``, or None; see ``Elsewhere``."""
        ...

    def configs(self, region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
        """The configs worth trying for a supported region, the likeliest first."""
        ...

    def space(self, region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
        """All configs for a supported region, the likeliest first."""
        ...

    def instantiate(self, region: ir.Region, config: Config, arch: GpuArch) -> str:
        """The C++ type to compile."""
        ...

    def reasoning(self, region: ir.Region, config: Config, arch: GpuArch) -> str:
        """Why the config stands where it does in ``configs``."""
        ...

    def micros(self, region: ir.Region, config: Config, arch: GpuArch) -> float:
        """About how many µs a launch takes: what a plan without a GPU goes by."""
        ...


class CubinTemplate(Template, Protocol):
    """A template whose ``artifact`` is "cubin"."""

    def prologue(self, region: ir.Region) -> str | None:
        """The C++ type of a kernel that the recipe launches first, or None."""
        ...

    def recipe(
        self, region: ir.Region, config: Config, arch: GpuArch, *, held: bool = False
    ) -> Recipe:
        """How to launch what ``instantiate`` names on the region's sizes.

        ``held``: no kernel that may still run when this one starts writes its filter or
        its per-channel inputs, so that it may read them at once.
        """
        ...


class ChainTemplate(Protocol):
    """A template of two regions back to back; its artifact is a cubin. Members are as
    a ``CubinTemplate``'s, with the chain in the region's place."""

    @property
    def name(self) -> str: ...
    @property
    def header(self) -> str: ...
    @property
    def artifact(self) -> Artifact: ...

    def supports(self, chain: ir.Chain, arch: GpuArch) -> str | None: ...
    def configs(self, chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]: ...
    def space(self, chain: ir.Chain, arch: GpuArch) -> tuple[Config, ...]: ...
    def instantiate(self, chain: ir.Chain, config: Config, arch: GpuArch) -> str: ...
    def reasoning(self, chain: ir.Chain, config: Config, arch: GpuArch) -> str: ...
    def micros(self, chain: ir.Chain, config: Config, arch: GpuArch) -> float: ...
    def prologue(self, chain: ir.Chain) -> str | None: ...
    def recipe(
        self, chain: ir.Chain, config: Config, arch: GpuArch, *, held: bool = False
    ) -> Recipe: ...
