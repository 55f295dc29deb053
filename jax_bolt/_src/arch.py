# SPDX-License-Identifier: Apache-2.0
"""GPU architectures and boards: what a plan and a compile need to know of a device.

Numbers are NVIDIA's published ones. ``from_name`` describes a board, or the usual one
of an architecture, so that plans can be made without a GPU; ``of_device`` describes a
real one.
"""

from __future__ import annotations

import dataclasses
import re

from .errors import UnsupportedError


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class GpuArch:
    """One kind of GPU. ``gpu`` is its device kind, None when only the name is known.

    ``smem_per_block`` and ``l2_bytes`` are bytes, ``bandwidth`` is bytes per second
    of device memory, ``sm`` is the compute capability without its dot (9.0 -> 90).
    ``peak_flops`` is FLOP/s of dense f16 and bf16 products with f32 accumulators, twice
    that of TF32; None where NVIDIA publishes none. ``board`` is the one whose numbers
    these are: that of ``gpu``, or the architecture's usual one.
    """

    name: str
    sm: int
    suffix: str
    gpu: str | None
    board: str
    sm_count: int
    smem_per_block: int
    l2_bytes: int
    bandwidth: float
    peak_flops: float | None

    @property
    def gencode(self) -> str:
        """nvcc's option for exactly this architecture."""
        number = f"{self.sm}{self.suffix}"
        return f"-gencode=arch=compute_{number},code=sm_{number}"

    @property
    def has_kernels(self) -> bool:
        """Whether any kernel is for it."""
        return self.sm >= _OLDEST_SM


@dataclasses.dataclass(frozen=True, slots=True)
class _Board:
    pattern: str  # searched for in the device kind, as whole words
    sm: int
    sm_count: int
    l2_mib: int
    gb_per_s: int
    tflops: int | None
    name: str = ""  # where the pattern is none

    @property
    def label(self) -> str:
        return self.name or self.pattern

    def matches(self, text: str) -> bool:
        # Users write RTX4090, and H100-PCIe.
        pattern = self.pattern.replace(" ", "[ -]?")
        return re.search(rf"\b(?:{pattern})\b", text, re.IGNORECASE) is not None


_OLDEST_SM = 80  # that kernels are for: they copy with cp.async

# compute capability without its dot -> opt-in shared memory per block, KiB
_SHARED_KIB: dict[int, int] = {
    75: 64,
    80: 163,
    86: 99,
    87: 163,
    89: 99,
    90: 227,
    100: 227,
    103: 227,
    110: 227,
    120: 99,
    121: 99,
}

# The first row of an architecture is what its bare name stands for; of the rows
# whose pattern matches a device kind the first counts, so longer names come first.
# Of two boards in a row the faster one's peak stands: it makes a lower floor.
_BOARDS: tuple[_Board, ...] = (
    _Board("T4", 75, 40, 4, 320, 65),
    _Board("RTX 2080 Ti", 75, 68, 6, 616, 54),
    _Board("A100.*80GB", 80, 108, 40, 2039, 312, "A100 80GB"),
    _Board("A100", 80, 108, 40, 1555, 312),
    _Board("A30", 80, 56, 24, 933, 165),
    _Board("A10|A10G", 86, 72, 6, 600, 125, "A10"),
    _Board("A40", 86, 84, 6, 696, 150),
    _Board("RTX A6000", 86, 84, 6, 768, 155),
    _Board("RTX 3090", 86, 82, 6, 936, 71),
    _Board("Orin", 87, 16, 4, 205, None),
    _Board("L4", 89, 58, 48, 300, 121),
    _Board("L40S?", 89, 142, 96, 864, 362, "L40S"),
    _Board("RTX 4090", 89, 128, 72, 1008, 165),
    _Board("RTX 6000 Ada", 89, 142, 96, 960, 364),
    _Board("H100 80GB HBM3", 90, 132, 50, 3350, 989, "H100 SXM"),
    _Board("H100 PCIe", 90, 114, 50, 2039, 756),
    _Board("H100 NVL", 90, 132, 50, 3938, 835),
    _Board("H100", 90, 132, 50, 3350, 989, "H100 SXM"),
    _Board("H200", 90, 132, 50, 4800, 989),
    _Board("GH200", 90, 132, 50, 4000, 989),
    _Board("H20", 90, 78, 60, 4000, 148),
    _Board("H800", 90, 132, 50, 3350, 989),
    _Board("B200|GB200", 100, 148, 126, 8000, 2500, "B200"),
    _Board("B300|GB300", 103, 148, 126, 8000, 2500, "B300"),
    _Board("Thor", 110, 20, 32, 273, None),
    _Board("RTX PRO 6000", 120, 188, 128, 1792, 504),
    _Board("RTX 5090", 120, 170, 96, 1792, 210),
    _Board("GB10", 121, 48, 24, 273, None),
)


def from_name(name: str) -> GpuArch:
    """The architecture of ``"sm_90a"``, ``"sm_90"`` or ``"90"``, on its usual board, or
    that of a board, such as ``"H200"`` or ``"NVIDIA H100 PCIe"``.

    Raises UnsupportedError on a name that is none of these.
    """
    for board in _BOARDS:
        if board.matches(str(name)):
            return _arch(board.sm, None, board, None)
    parts = re.fullmatch(r"(?:sm_)?(\d+)(a?)", str(name))
    if parts is None or int(parts[1]) not in _SHARED_KIB:
        raise UnsupportedError(f"unknown architecture {name!r}; known: {_known()}")
    sm = int(parts[1])
    if parts[2] and not _suffix(sm):
        raise UnsupportedError(f"unknown architecture {name!r}; did you mean sm_{sm}?")
    return _arch(sm, None, _usual(sm), None)


def of_device(
    compute_capability: str, device_kind: str, sm_count: int | None = None
) -> GpuArch:
    """The architecture of a device as JAX describes it ("9.0", "NVIDIA H200").

    ``sm_count`` is the device's own where known, else its board's published one.
    Raises UnsupportedError on a compute capability jax_bolt does not know.
    """
    parts = re.fullmatch(r"(\d+)\.(\d)", compute_capability)
    sm = int(parts[1]) * 10 + int(parts[2]) if parts else 0
    if sm not in _SHARED_KIB:
        raise UnsupportedError(
            f"jax_bolt has no kernels for {device_kind}, of compute capability "
            f"{compute_capability!r}; it has them for {_capabilities()}"
        )
    for board in _BOARDS:
        if board.sm == sm and board.matches(device_kind):
            return _arch(sm, device_kind, board, sm_count)
    return _arch(sm, device_kind, _usual(sm), sm_count)


def known() -> tuple[str, ...]:
    """The names ``from_name`` accepts, oldest first."""
    return tuple(f"sm_{sm}{_suffix(sm)}" for sm in _SHARED_KIB)


def with_kernels() -> tuple[str, ...]:
    """Those of ``known()`` that kernels are for."""
    return tuple(name for name in known() if from_name(name).has_kernels)


def _capabilities() -> str:
    return ", ".join(f"{sm // 10}.{sm % 10}" for sm in _SHARED_KIB if sm >= _OLDEST_SM)


def _known() -> str:
    """Names that kernels are for, with their boards."""
    boards: dict[int, dict[str, None]] = {}
    for board in _BOARDS:
        boards.setdefault(board.sm, {})[board.label] = None
    names = [(name, from_name(name).sm) for name in with_kernels()]
    return ", ".join(f"{name} ({', '.join(boards[sm])})" for name, sm in names)


def _suffix(sm: int) -> str:
    """From 9.0 on, wgmma, TMA and tcgen05 exist only in the "a" feature set."""
    return "a" if sm >= 90 else ""


def _usual(sm: int) -> _Board:
    return next(board for board in _BOARDS if board.sm == sm)


def _arch(sm: int, gpu: str | None, board: _Board, sm_count: int | None) -> GpuArch:
    return GpuArch(
        name=f"sm_{sm}{_suffix(sm)}",
        sm=sm,
        suffix=_suffix(sm),
        gpu=gpu,
        board=board.label,
        sm_count=board.sm_count if sm_count is None else sm_count,
        smem_per_block=_SHARED_KIB[sm] * 1024,
        l2_bytes=board.l2_mib * 1024 * 1024,
        bandwidth=board.gb_per_s * 1e9,
        peak_flops=None if board.tflops is None else board.tflops * 1e12,
    )
