# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt doctor``: whether kernels can be built and run here.

Looks at everything that a kernel needs, in the order in which it is needed, and says of
each thing that is wrong what mends it. Changes nothing: what it compiles is kept apart
from the cache, and a directory that it makes to see whether it can is removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import api, base, compat, options, paths
from . import arch as arch_
from .arch import GpuArch
from .command import add_parser, architecture, printable
from .errors import CacheError, CompileError, UnsupportedError
from .jit import codegen, compiler, directories, loader, store, toolchain
from .jit.store import Store
from .jit.toolchain import Toolchain
from .options import Options
from .tune import db
from .warm import gpus, library

_DOCTOR = """\
examples:
  python -m jax_bolt doctor
  python -m jax_bolt doctor --arch sm_90a     on a machine without a GPU: can it build?

Exits with 0 where kernels can be built and run, and with 1 where something stops them.
A "note" stops nothing.
"""
_LITTLE_SPACE = 2**30
_REPORT = "report this, with everything above"
_NO_KERNELS = "kernels exist for compute capability 8.0 and up; XLA runs all here"
_COMPILE_FIX = (
    "see that this nvcc and C++ compiler go together, or set CUDA_HOME or CXX"
)


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one subject; ``fix`` says what to do, where ``text`` does not.

    The text of an error of ours does.
    """

    state: Literal["ok", "note", "wrong"]
    subject: str
    text: str
    fix: str = ""


def add_to(commands: Any) -> None:
    """Adds ``doctor`` to the parsers of a command line."""
    text = "says whether kernels can be built and run here, and what to mend"
    parser = add_parser(commands, "doctor", text, _DOCTOR, run)
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="build for this, such as sm_90a, and ask for no GPU",
    )


def run(args: argparse.Namespace) -> int:
    """Says what is found, with the options of the environment that are some."""
    with options.despite_environment() as bad:
        return _doctor(architecture(args.arch), bad)


def _doctor(asked: GpuArch | None, bad: dict[str, str]) -> int:
    print(f"{db.versions()}, Python {platform.python_version()}")
    wrong, calls = 0, "XLA runs all"
    for finding in itertools.chain(_options(bad), _findings(options.current(), asked)):
        wrong += finding.state == "wrong"
        if (finding.state, finding.subject) == ("wrong", "options"):
            calls = "every call raises ValueError"
        lines = finding.text.splitlines() or [""]
        lines += [f"fix: {finding.fix}"] if finding.fix else []
        print(f"{finding.state:6} {finding.subject:10} {printable(lines[0])}")
        for line in lines[1:]:
            print(f"{'':17} {printable(line)}")
        sys.stdout.flush()  # the next one may take seconds
    if wrong:
        print(f"\nKernels cannot be used as things are ({wrong} wrong); {calls}.")
        return 1
    print("\nNothing stops kernels here.")
    return 0


def _findings(active: Options, asked: GpuArch | None) -> Iterator[Finding]:
    yield _native()
    found: list[GpuArch] = []
    if asked is None:
        yield from _gpus(found)
    elif base.sources(asked):
        found.append(asked)
    else:
        yield Finding("wrong", asked.name, "there are no kernels for it", _NO_KERNELS)
    tools: list[Toolchain] = []
    yield _compiler(active, tools)
    cache = _cache(active)
    yield cache
    yield _results(active, found)
    compiles = True
    for arch in found if tools else ():
        finding = _compiles(arch, tools[0])
        compiles &= finding.state == "ok"
        yield finding
        if cache.state != "wrong":
            yield _library(arch, active, tools[0], asked)
    if asked is None and found:
        seen = _seen_by_jax()
        yield seen
        if seen.state == "ok" and tools and compiles:
            yield _runs()


def _options(bad: dict[str, str]) -> Iterator[Finding]:
    for name, text in bad.items():
        if name == "JAX_BOLT_WARM":
            fix = "until then `import jax_bolt` builds nothing in the background"
            yield Finding("note", "options", text, fix)
        else:
            yield Finding("wrong", "options", text, "set it so, or unset it")
    given = sorted(n for n in os.environ if n.startswith("JAX_BOLT_") and os.environ[n])
    given = [name for name in given if name not in bad]
    text = ", ".join(f"{name}={os.environ[name]}" for name in given) or "as they come"
    if unknown := options.unknown(os.environ):
        yield Finding("note", "options", text, "; ".join(unknown.values()))
    elif given or not bad:
        yield Finding("ok", "options", text)


def _native() -> Finding:
    try:
        loader.native()
    except CompileError as error:
        return Finding("wrong", "launcher", error.message)
    return Finding("ok", "launcher", "jax_bolt's native module can be imported")


def _gpus(found: list[GpuArch]) -> Iterator[Finding]:
    """The driver and every GPU; those with kernels go to ``found``."""
    try:
        driver, seen = gpus.look()
    except OSError as error:
        yield Finding(
            "wrong",
            "driver",
            f"no NVIDIA GPU can be seen ({error})",
            "install NVIDIA's driver (in a container: start it with GPUs); to check "
            "what building needs on a machine without a GPU, add --arch sm_90a",
        )
        return
    yield Finding("ok", "driver", driver)
    if not seen:
        yield Finding("wrong", "GPU", "the driver sees none", "look at `nvidia-smi -L`")
    for capability, kind in seen:
        text = f"{kind}, compute capability {capability}"
        try:
            arch = arch_.of_device(capability, kind)
        except UnsupportedError:
            arch = None
        if arch is None or not base.sources(arch):
            yield Finding("note", "GPU", text, _NO_KERNELS)
            continue
        if all(arch.name != other.name for other in found):
            found.append(arch)
        yield Finding("ok", "GPU", f"{text} ({arch.name})")
    if seen and not found:
        yield Finding("wrong", "GPU", "none has kernels", "use another GPU")


def _compiler(active: Options, tools: list[Toolchain]) -> Finding:
    try:
        made = toolchain.find(active)
    except CompileError as error:
        return Finding("wrong", "compiler", error.message)
    text = (
        f"nvcc {made.version}, {made.nvcc} (from {made.origin}); headers of CUTLASS "
        f"{made.cutlass_version}"
    )
    if made.host_compiler is None:
        fix = "install g++ (for example: apt-get install g++), or set CXX"
        return Finding("wrong", "compiler", f"{text}; no C++ compiler", fix)
    tools.append(made)
    return Finding("ok", "compiler", f"{text}; {made.host_compiler}")


def _compiles(arch: GpuArch, tools: Toolchain) -> Finding:
    """Compiles a small kernel, apart from the cache."""
    start = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="jax_bolt-") as folder:
            source = codegen.cast_source("bfloat16")
            compiler.compile(tools, source, arch, Path(folder))
    except CompileError as error:
        return Finding(
            "wrong", arch.name, str(error), _COMPILE_FIX if error.log else ""
        )
    except OSError as error:
        return Finding("wrong", arch.name, str(error), "make room in $TMPDIR")
    seconds = time.monotonic() - start
    return Finding("ok", arch.name, f"a kernel compiles, in {seconds:.1f} s")


def _cache(active: Options) -> Finding:
    root = paths.kernel_root(active)
    try:
        place = next(path for path in (root, *root.parents) if path.exists())
        if place == root:
            directories.require_private(root)
        elif not place.is_dir():
            raise CacheError(f"the cache {place} is not a directory: remove it")
        elif (problem := _no_room_for_a_folder(place)) is not None:
            fix = "set JAX_BOLT_CACHE_DIR to another directory, or new kernels are lost"
            return Finding("note", "cache", f"{root} cannot be created: {problem}", fix)
        entries = Store(root).entries()
    except CacheError as error:
        return Finding("wrong", "cache", str(error))
    except OSError as error:
        return Finding("wrong", "cache", str(error), "set JAX_BOLT_CACHE_DIR")
    size = sum(entry.size for entry in entries) / 2**20
    text = f"{root}: {len(entries)} kernels, {size:.1f} MiB"
    if not os.access(place, os.W_OK | os.X_OK):
        fix = "set JAX_BOLT_CACHE_DIR to a writable directory, or new kernels are lost"
        return Finding("note", "cache", f"{text}, read-only", fix)
    if (free := shutil.disk_usage(place).free) < _LITTLE_SPACE:
        text = f"{text}, with {free / 2**20:.0f} MiB free"
        return Finding(
            "note", "cache", text, "make room, or `python -m jax_bolt cache prune`"
        )
    return Finding("ok", "cache", text)


def _no_room_for_a_folder(place: Path) -> str | None:
    """Why none can be made in ``place``, by making one, which is removed again."""
    try:
        with tempfile.TemporaryDirectory(prefix="jax_bolt-", dir=place):
            return None
    except OSError as error:
        return f"{error.strerror}, in {place}"


def _results(active: Options, found: Iterable[GpuArch]) -> Finding:
    tuned = db.Database(paths.tuning_root(active)).all()
    text = f"{sum(len(file.entries) for file in tuned)} tuning results"
    for arch in found:
        here = [file for file in tuned if file.device.endswith(f" {arch.name}")]
        text += f", {sum(len(file.entries) for file in here)} of {arch.name}"
    return Finding("ok", "tuned", text)


def _library(
    arch: GpuArch, active: Options, tools: Toolchain, asked: GpuArch | None
) -> Finding:
    kernels = Store(paths.kernel_root(active))
    wanted = library.sources(arch, active, tools)
    there = sum(
        kernels.find(store.digest(tools, source, arch)) is not None for source in wanted
    )
    text = f"{there} of {len(wanted)} kernels of the library of {arch.name} are built"
    if there == len(wanted):
        return Finding("ok", "library", text)
    command = "python -m jax_bolt warm"
    if asked is not None:  # where there may be no GPU to build for
        command += f" --arch {asked.name}"
    fix = f"tuning builds what it lacks; `{command}` builds all"
    return Finding("note", "library", text, fix)


def _seen_by_jax() -> Finding:
    # Else JAX would take most of the card, beside a program that runs there.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = compat.cuda_device()
    if device is not None:
        return Finding("ok", "JAX", f"sees {device.device_kind}")
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "cuda" not in platforms and "gpu" not in platforms:
        fix = f"unset JAX_PLATFORMS, which is {platforms}"
    elif "CUDA_VISIBLE_DEVICES" in os.environ:
        fix = "CUDA_VISIBLE_DEVICES may hide the GPU: unset it"
    else:
        fix = f"`{toolchain.INSTALL}` installs JAX for NVIDIA GPUs"
    return Finding("wrong", "JAX", "sees no NVIDIA GPU", fix)


def _runs() -> Finding:
    """Builds a product's kernel, apart from the cache, runs it and compares it."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((256, 256)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((256, 256)) / 16, jnp.bfloat16)

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.nn.relu(x @ w)

    loaded = store.stats()["loaded"]
    try:
        with (
            tempfile.TemporaryDirectory(prefix="jax_bolt-") as folder,
            # Without tuning results, which may say that XLA is faster here.
            options.options(cache_dir=folder),
        ):
            ours = api.optimize(layer, on_miss="heuristic", on_error="raise")(x, w)
        ours, xla = (np.asarray(y, np.float32) for y in (ours, jax.jit(layer)(x, w)))
    except (UnsupportedError, RuntimeError, OSError) as error:  # ours, and XLA's
        return Finding("wrong", "kernel", str(error), _REPORT)
    if store.stats()["loaded"] == loaded:
        return Finding("wrong", "kernel", "a product ran on XLA", _REPORT)
    distance = float(np.linalg.norm(ours - xla) / np.linalg.norm(xla))
    if not distance < db.SANE_ERROR["bf16"]:
        text = f"a product differs from XLA's by {distance:.1e}"
        return Finding("wrong", "kernel", text, _REPORT)
    return Finding("ok", "kernel", "a product runs on one, and agrees with XLA's")
