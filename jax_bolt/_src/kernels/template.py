# SPDX-License-Identifier: Apache-2.0
"""What a kernel template is: a C++ header and the knowledge of how to use it."""

from __future__ import annotations

from typing import Protocol

from .. import ir
from ..arch import GpuArch
from .config import Config


class Template(Protocol):
    """A module of this package, one for each kernel header of ``cc/include``."""

    @property
    def name(self) -> str: ...
    @property
    def header(self) -> str: ...

    def supports(self, region: ir.Region, arch: GpuArch) -> str | None:
        """Why no config can run ``region``, or None."""
        ...

    def configs(self, region: ir.Region, arch: GpuArch) -> tuple[Config, ...]:
        """The configs worth trying for a supported region, the likeliest first."""
        ...

    def instantiate(self, region: ir.Region, config: Config, arch: GpuArch) -> str:
        """The C++ type to compile."""
        ...
