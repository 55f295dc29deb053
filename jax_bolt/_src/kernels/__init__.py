# SPDX-License-Identifier: Apache-2.0
"""Kernel templates: one module for each header of ``cc/include``, in order of trial."""

from __future__ import annotations

from collections.abc import Mapping

from . import (
    chain_sm90,
    conv_sm80,
    depthwise,
    gemm_sm80,
    implicit_gemm_sm90,
    merged_sm90,
)
from .template import ChainTemplate, Template

TEMPLATES: tuple[Template, ...] = (
    implicit_gemm_sm90,
    depthwise,
    gemm_sm80,
    conv_sm80,
)
HEADERS = tuple(template.header for template in TEMPLATES)
# Those that run two regions in one kernel.
CHAIN_TEMPLATES: tuple[ChainTemplate, ...] = (chain_sm90, merged_sm90)
CHAIN_HEADERS = tuple(template.header for template in CHAIN_TEMPLATES)
# Where the named template takes a region, these were not faster at any site of the
# benchmark's models; they serve what it refuses.
SUPERSEDED: Mapping[str, tuple[str, ...]] = {
    implicit_gemm_sm90.name: (gemm_sm80.name, conv_sm80.name)
}
