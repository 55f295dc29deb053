# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: device, driver, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from typing import Any

import jax

_PACKAGES = {
    "jax": "jax",
    "jaxlib": "jaxlib",
    "flax": "flax",
    "cutlass": "nvidia-cutlass",
    "jax_bolt": "jax-bolt",
}


def has_gpu() -> bool:
    """Whether JAX's default backend is an NVIDIA GPU."""
    return jax.default_backend() == "gpu"


def sound_cpu_options() -> dict[str, str]:
    """XLA options under which a bf16 CNN on the CPU is computed correctly.

    The CPU backend of jaxlib 0.11 and 0.12 fuses a bf16 conv with the max pooling after
    it, and some of those fusions give NaN. jaxlib 0.10 needs no option, and later
    versions may not know this one.
    """
    if not (_version("jaxlib") or "").startswith(("0.11.", "0.12.")):
        return {}
    return {"xla_cpu_experimental_ynn_fusion_type": ""}


def set_sound_cpu_flags() -> None:
    """Puts ``sound_cpu_options`` into XLA_FLAGS; must come before JAX's first use."""
    flags = [f"--{name}={value}" for name, value in sound_cpu_options().items()]
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])


def describe() -> dict[str, Any]:
    """Device, driver, versions and date of this run; None where a thing is unknown."""
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "driver": _driver(),
        "cuda": _cuda(getattr(device.client, "platform_version", "")),
        "python": platform.python_version(),
        "versions": {name: _version(of) for name, of in _PACKAGES.items()},
    }


def slug(text: str) -> str:
    """``text`` as a part of a file name: ``NVIDIA H200`` gives ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda(platform_version: str) -> str | None:
    # The GPU client says e.g. "cuda 13000".
    found = re.search(r"cuda (\d+)", platform_version)
    if found is None:
        return None
    number = int(found[1])
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> str | None:
    if (smi := shutil.which("nvidia-smi")) is None:
        return None
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=60, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout else None
