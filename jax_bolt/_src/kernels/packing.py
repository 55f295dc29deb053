# SPDX-License-Identifier: Apache-2.0
"""Convs on images of few channels: what the kernel's prologue makes of the operands.

TMA moves rows of 16 bytes, and an RGB pixel has 6. So a small kernel ahead of the
implicit GEMM writes blocks of stride x stride pixels as one pixel of all their channels
(the exact space-to-depth form), padded to 16 bytes, into the call's workspace; and the
filter to match. The conv has stride 1 then, and its padding in width is in the pixels,
so that a filter's row can be read as one wide pixel.
"""

from __future__ import annotations

import dataclasses
import math

from .. import forms, ir
from . import recipe
from .recipe import Recipe

_UNIT = 8  # elements of 16 bytes
_MOST_CHANNELS = 64  # of a packed pixel: one chunk of the kernel's
_THREADS = 256
_ALIGNMENT = 1024


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """How a conv's operands lie in the workspace; ``problem`` is the user's."""

    problem: ir.ConvProblem

    @staticmethod
    def of(problem: ir.ConvProblem) -> Packing | None:
        """None for a conv that needs none, or is not one for it."""
        p = problem
        fold = p.stride[0]
        if p.c % _UNIT == 0 or p.groups > 1:
            return None
        if p.filter_layout != "hwio" or p.dilation != (1, 1):
            return None
        if p.dtype == "f32":  # TF32 does not take filters as the prologue packs them
            return None
        if p.stride[1] != fold or fold * fold * p.c > _MOST_CHANNELS:
            return None
        if min(p.padding[0], p.padding[2]) < 0:
            return None
        found = Packing(p)
        if math.prod(found.image_shape[:3]) >= 2**31 - _THREADS:
            return None
        return found

    @property
    def fold(self) -> int:
        return self.problem.stride[0]

    @property
    def channels(self) -> int:
        """Of a packed pixel."""
        return -(-self.fold * self.fold * self.problem.c // _UNIT) * _UNIT

    @property
    def packed(self) -> ir.ConvProblem:
        """The conv that remains."""
        return forms.folded(self.problem, self.channels)

    @property
    def image_shape(self) -> tuple[int, int, int, int]:
        q = self.packed
        return q.n, q.h, q.w, q.c

    @property
    def filter_offset(self) -> int:
        """Bytes from the workspace's start to the packed filter."""
        size = math.prod(self.image_shape) * 2
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    @property
    def workspace_bytes(self) -> int:
        q = self.packed
        return self.filter_offset + q.r * q.s * q.c * q.k * 2

    @property
    def instance(self) -> str:
        """The C++ type that ``JAX_BOLT_PROLOGUE`` takes."""
        p = self.problem
        pairs = p.w % self.fold == 0 and (self.fold * p.c) % 2 == 0 == (p.w * p.c) % 2
        arguments = f"{p.c}, {self.fold}, {'true' if pairs else 'false'}"
        return f"jax_bolt::implicit_gemm::Pack<{arguments}>"

    def recipe(self) -> Recipe:
        """One thread for every packed pixel, and for eight elements of the filter."""
        p, q = self.problem, self.packed
        down, right = forms.folds(p)
        image_blocks = -(-math.prod(self.image_shape[:3]) // _THREADS)
        eighths = q.r * q.s * q.c * (q.k // _UNIT)
        return Recipe(
            threads=_THREADS,
            grid=image_blocks + -(-eighths // _THREADS),
            programmatic=True,
            pointers=(recipe.A, recipe.B, recipe.WORKSPACE),
            ints=(
                *(p.n, p.h, p.w, q.h, q.w, right.lead, p.r, p.s, p.k),
                *(q.r, q.s, down.shift, right.shift),
                *(self.filter_offset // 16, image_blocks),
            ),
        )
