# SPDX-License-Identifier: Apache-2.0
"""What an architecture's kernel library lacks, and building it.

First the kernels of tuning results that were in use here when our headers or nvcc
changed, since a program may want them next; then the casts and the base programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .. import base, paths, plan, region_text
from ..arch import GpuArch
from ..errors import CacheError, CompileError, UnsupportedError
from ..jit import codegen, compiler, directories, store
from ..jit.store import Store
from ..jit.toolchain import Toolchain
from ..options import Options
from ..tune import db
from ..tune import target as targets
from . import usage

_CASTS = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Kernels of one library: how many were there, were built and did not compile."""

    there: int
    built: int
    failed: int
    seconds: float
    error: CompileError | None  # the first one


def sources(arch: GpuArch, active: Options, tools: Toolchain) -> list[str]:
    """The TUs of the library, those first that are likely to be wanted first."""
    casts = (codegen.cast_source(dtype) for dtype in _CASTS)
    found = (*_stale(arch, active, tools), *casts, *base.sources(arch))
    return list(dict.fromkeys(found))


def build(
    arch: GpuArch,
    wanted: list[str],
    active: Options,
    tools: Toolchain,
    jobs: int | None,
    step: Callable[[], None] = lambda: None,
) -> Built:
    """Compiles what the store lacks; ``step`` is called after each of ``wanted``.

    Raises:
      CompileError: nothing can be compiled for ``arch`` at all.
      CacheError: the store cannot be written.
    """
    compiler.check(tools, arch)
    kernels = Store(paths.kernel_root(active))

    def done(digest: str, result: store.Result) -> None:
        # What a process has for itself would be gone when this one ends.
        if directories.has_temporary():
            raise CacheError(
                f"kernels cannot be stored in {kernels.root}: it has to be writable "
                "and to have room; or set JAX_BOLT_CACHE_DIR to another directory"
            )
        step()

    start, before = time.monotonic(), store.stats()
    results = kernels.build(tools, wanted, arch, jobs, done)
    after = store.stats()
    errors = [r for r in results.values() if isinstance(r, CompileError)]
    # A cache that was cleared meanwhile is not complete.
    if all(isinstance(r, Path) and r.exists() for r in results.values()):
        with contextlib.suppress(OSError):  # read-only, with all there is to build
            usage.complete(arch, active, tools).touch()
    return Built(
        there=after["found"] - before["found"],
        built=after["compiled"] - before["compiled"],
        failed=len(errors),
        seconds=time.monotonic() - start,
        error=errors[0] if errors else None,
    )


def _stale(arch: GpuArch, active: Options, tools: Toolchain) -> Iterator[str]:
    """Of tuning results of other versions, the kernels that were lately in use."""
    origin = targets.origin(tools)
    used = {entry.path.name for entry in usage.recent(active)}
    for file in db.Database(paths.tuning_root(active)).all():
        try:
            device = db.arch_of(file.device)
        except (ValueError, UnsupportedError):
            continue
        for text, entry in file.entries.items():
            if device.name != arch.name or entry.digest not in used:
                continue
            if origin.holds(entry):
                continue
            try:
                region = region_text.parse(text)
            except ValueError:
                continue
            found = plan.chosen(region, device, entry, active.disable)
            if found is not None:
                yield found.source
