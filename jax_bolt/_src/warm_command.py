# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt warm``: an architecture's kernel library, built now."""

from __future__ import annotations

import argparse
from typing import Any

from . import arch as arch_
from . import base, options, paths
from .arch import GpuArch
from .command import UsageError, add_parser, architecture
from .errors import CompileError, UnsupportedError
from .jit import toolchain
from .tune.progress import Progress
from .warm import gpus, library

_WARM = """\
examples:
  python -m jax_bolt warm                   for the GPUs of this machine
  python -m jax_bolt warm --arch sm_90a     without a GPU: in an image, say

Tuning times candidates with these kernels before it compiles any of its own. They go to
the cache of JAX_BOLT_CACHE_DIR, or else the user's.
"""


def add_to(commands: Any) -> None:
    """Adds ``warm`` to the parsers of a command line."""
    text = "builds the kernel library of an architecture"
    parser = add_parser(commands, "warm", text, _WARM, _warm)
    parser.add_argument(
        "--arch",
        metavar="NAME",
        help="such as sm_90a (default: those of the GPUs here)",
    )
    parser.add_argument(
        "--jobs",
        type=_jobs,
        metavar="N",
        help="compilers run at once (default: the option jobs, or one per CPU)",
    )


def _warm(args: argparse.Namespace) -> None:
    active = options.current()
    asked = architecture(args.arch)
    found = _here() if asked is None else [asked]
    for arch in found:
        if not base.sources(arch):
            raise UnsupportedError(f"jax_bolt has no kernels for {arch.name}")
    tools = toolchain.find(active)
    print(f"nvcc {tools.version} ({tools.nvcc}), {paths.kernel_root(active)}")
    errors = []
    for arch in found:
        wanted = library.sources(arch, active, tools)
        jobs = args.jobs or active.jobs
        with Progress() as progress:
            # Else nothing is seen for minutes.
            print(f"{arch.name}: {len(wanted)} kernels ...", flush=True)
            progress.start(f"building for {arch.name}", len(wanted))
            made = library.build(arch, wanted, active, tools, jobs, progress.step)
        print(
            f"{arch.name}: {made.there} were there, {made.built} were built and "
            f"{made.failed} failed, in {made.seconds:.1f} s",
            flush=True,
        )
        errors += [made.error] if made.error else []
    if errors:
        raise CompileError(f"kernels are missing. {errors[0].message}", errors[0].log)


def _here() -> list[GpuArch]:
    try:
        found = gpus.architectures()
    except OSError as error:
        raise UsageError(
            f"no NVIDIA GPU is seen here ({error}): say what to build for, as in "
            f"--arch sm_90a; there are {', '.join(arch_.with_kernels())}"
        ) from error
    if not found:
        raise UnsupportedError(
            "no GPU here is one that jax_bolt has kernels for: "
            f"{', '.join(arch_.with_kernels())}"
        )
    return found


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, at least 1")
    return int(text)
