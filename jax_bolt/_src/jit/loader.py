# SPDX-License-Identifier: Apache-2.0
"""Opens built kernels in this process, and makes the launcher known to XLA."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import jax

from .. import options, paths
from ..errors import CacheError, CompileError
from . import store

TARGET = "jax_bolt.launch"
MARK_TARGET = "jax_bolt.mark"


def load(digest: str, path: Path) -> None:
    """Opens the kernel ``digest`` from ``path``, once per process.

    Raises CompileError when it cannot be opened or was built for another ABI.
    """
    module = native()
    if module.is_loaded(digest):
        return
    try:
        module.load(digest, str(path))
    except RuntimeError as error:
        raise CompileError(f"kernel {digest} cannot be loaded: {error}") from error
    store.count("loaded")


@functools.cache
def ffi_target() -> str:
    """The name of the launcher's FFI target, registered at the first call.

    Touches no device: without a CUDA backend, XLA keeps the registration for one.
    """
    module = native()
    module.set_resolver(_resolve)
    jax.ffi.register_ffi_target(
        TARGET, module.handlers(), platform="CUDA", api_version=1
    )
    return TARGET


@functools.cache
def mark_target() -> str:
    """As ``ffi_target``, for the custom call that starts and stops the stopwatch."""
    handlers = native().mark_handlers()
    jax.ffi.register_ffi_target(MARK_TARGET, handlers, platform="CUDA", api_version=1)
    return MARK_TARGET


@functools.cache
def native() -> Any:
    """The compiled part of jax_bolt; raises CompileError where it is missing."""
    try:
        return importlib.import_module("jax_bolt._native")
    except ImportError as error:
        raise CompileError(
            f"jax_bolt's native module cannot be imported ({error}): reinstall "
            "jax_bolt for this Python, for example with `pip install --force-reinstall "
            "--no-deps jax_bolt`"
        ) from error


def _resolve(digest: str) -> None:
    """Loads a kernel that an executable names but this process has not lowered."""
    kernels = store.Store(paths.kernel_root(options.current()))
    path = kernels.find(digest)
    if path is None:
        raise CacheError(
            f"kernel {digest} is not in {kernels.root}: the program was compiled "
            "elsewhere, or the cache was cleared since; compile the program again"
        )
    load(digest, path)
