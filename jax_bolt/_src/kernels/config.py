# SPDX-License-Identifier: Apache-2.0
"""A kernel template's choices as data, and what all templates know of C++ types."""

from __future__ import annotations

import dataclasses

from .. import ir

CPP_TYPES: dict[str, str] = {
    "bf16": "cutlass::bfloat16_t",
    "f16": "cutlass::half_t",
    "f32": "float",
    "bool": "bool",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Config:
    """One candidate of a template: tile shape, stages, whatever the template varies.

    Compile-time choices only; sizes are the problem's. ``text`` is canonical and
    goes into the tuning database.
    """

    template: str
    params: tuple[tuple[str, int | str], ...]

    @staticmethod
    def of(template: str, **params: int | str) -> Config:
        return Config(template, tuple(params.items()))

    @property
    def text(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.params)

    def __getitem__(self, name: str) -> int | str:
        return dict(self.params)[name]


def alignment(extent: int, dtype: ir.DType) -> int:
    """Elements one access of at most 16 bytes may take along ``extent``."""
    limit = 16 // ir.ITEM_BYTES[dtype]
    return min(extent & -extent, limit)


def epilogue_limit(epilogue: ir.Epilogue) -> str | None:
    """Why the C ABI cannot carry the epilogue's operands, or None."""
    for what, count, limit in (
        ("per-channel inputs", len(epilogue.vectors), ir.MAX_VECTORS),
        ("side inputs", len(epilogue.sides), ir.MAX_SIDES),
        ("auxiliary outputs", len(epilogue.auxiliary), ir.MAX_AUXILIARY),
    ):
        if count > limit:
            return f"{count} {what}, more than {limit}"
    return None
