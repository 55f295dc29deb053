# SPDX-License-Identifier: Apache-2.0
"""Which NVIDIA GPUs there are, without CUDA: its initialisation costs up to seconds."""

from __future__ import annotations

import ctypes

from .. import arch
from ..arch import GpuArch
from ..errors import UnsupportedError

_NAME_BYTES = 96


def architectures() -> list[GpuArch]:
    """Of the GPUs here, each once; those jax_bolt does not know are left out.

    Asks NVML, which makes no context. Raises OSError where it is missing or refuses.
    """
    found: dict[str, GpuArch] = {}
    for capability, kind in look()[1]:
        try:
            made = arch.of_device(capability, kind)
        except UnsupportedError:
            continue
        found.setdefault(made.name, made)
    return list(found.values())


def look() -> tuple[str, list[tuple[str, str]]]:
    """The driver's version, and compute capability and name of every GPU.

    Raises OSError as ``architectures``.
    """
    nvml = ctypes.CDLL("libnvidia-ml.so.1")

    def call(name: str, *args: object) -> None:
        if status := getattr(nvml, name)(*args):
            raise OSError(f"{name} failed with {status}")

    def text(name: str, *args: object) -> str:
        buffer = ctypes.create_string_buffer(_NAME_BYTES)
        call(name, *args, buffer, ctypes.c_uint(_NAME_BYTES))
        return buffer.value.decode(errors="replace")

    call("nvmlInit_v2")
    try:
        count = ctypes.c_uint()
        call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        found: list[tuple[str, str]] = []
        for index in range(count.value):
            device = ctypes.c_void_p()
            major, minor = ctypes.c_int(), ctypes.c_int()
            call(
                "nvmlDeviceGetHandleByIndex_v2",
                ctypes.c_uint(index),
                ctypes.byref(device),
            )
            call(
                "nvmlDeviceGetCudaComputeCapability",
                device,
                ctypes.byref(major),
                ctypes.byref(minor),
            )
            capability = f"{major.value}.{minor.value}"
            found.append((capability, text("nvmlDeviceGetName", device)))
        return text("nvmlSystemGetDriverVersion"), found
    finally:
        nvml.nvmlShutdown()
