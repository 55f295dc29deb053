# SPDX-License-Identifier: Apache-2.0
"""Finds what a kernel is compiled with: nvcc, CUTLASS, our headers, a host compiler.

Looked for in this order, the first usable one is taken:

1. the option ``cuda_home`` (when it is set, nothing else is tried);
2. ``$CUDA_HOME``, then ``$CUDA_PATH``;
3. the wheels from PyPI that the extra ``cuda13`` installs;
4. ``nvcc`` on ``$PATH``.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import paths
from ..arch import GpuArch
from ..errors import CompileError
from ..options import Options

logger = logging.getLogger(__name__)

PYPI = "PyPI"
_INCLUDE = re.compile(r'^\s*#\s*include\s+"(jax_bolt/[^"]+)"', re.MULTILINE)
# What the extra cuda13 has. jax_bolt itself, which that needs, is on no index.
INSTALL = 'pip install "jax[cuda13]" "nvidia-cuda-cccl<14"'

# The oldest nvcc whose ptxas compiles CUTLASS's wgmma and TMA code correctly, and
# the first one that knows each architecture after it.
OLDEST_NVCC = (12, 4)
_NVCC_FOR_SM: dict[int, tuple[int, int]] = {
    100: (12, 8),
    103: (12, 9),
    110: (13, 0),
    120: (12, 8),
    121: (12, 9),
}

# What nvcc needs beside it -> the wheel that holds it
_PARTS: dict[str, str] = {
    "cuda_runtime.h": "nvidia-cuda-runtime",
    "crt/host_config.h": "nvidia-cuda-crt",
    "cuda/std/utility": "nvidia-cuda-cccl",
    "libcudart_static.a": "nvidia-cuda-runtime",
    "cicc": "nvidia-nvvm",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """A usable compiler and the headers it is given.

    ``origin`` says where nvcc was found; ``host_compiler`` is None when there is
    none, which only compiling minds.
    """

    nvcc: Path
    version: str
    origin: str
    cutlass_include: Path
    cutlass_util_include: Path
    cutlass_version: str
    own_include: Path
    abi_version: str
    cuda_includes: tuple[Path, ...]
    host_compiler: Path | None


def find(options: Options) -> Toolchain:
    """The toolchain under ``options``; remembered while the environment is the same.

    Raises CompileError, saying what was tried and what to install.
    """
    variables = ("CUDA_HOME", "CUDA_PATH", "PATH", "NVCC_CCBIN", "CXX")
    key = tuple((name, os.environ.get(name)) for name in variables)
    return _find(options.cuda_home, key)


def check_arch(toolchain: Toolchain, arch: GpuArch) -> None:
    """Raises CompileError when this nvcc is too old for ``arch``."""
    needed = _NVCC_FOR_SM.get(arch.sm, OLDEST_NVCC)
    if _numbers(toolchain.version) < needed:
        raise CompileError(
            f"{toolchain.nvcc} is version {toolchain.version}; {arch.name} needs "
            f"{needed[0]}.{needed[1]} or newer: {INSTALL}"
        )


@functools.lru_cache(maxsize=8)
def _find(
    cuda_home: Path | None, environ: tuple[tuple[str, str | None], ...]
) -> Toolchain:
    nvcc, version, origin, includes = _find_nvcc(cuda_home, dict(environ))
    own, cutlass = _headers()
    toolchain = Toolchain(
        nvcc=nvcc,
        version=version,
        origin=origin,
        cutlass_include=cutlass / "include",
        cutlass_util_include=cutlass / "tools" / "util" / "include",
        cutlass_version=_cutlass_version(cutlass / "include"),
        own_include=own,
        abi_version=_define(own / "jax_bolt" / "abi.h", "JAX_BOLT_ABI_VERSION"),
        cuda_includes=includes,
        host_compiler=_host_compiler(dict(environ)),
    )
    logger.debug("toolchain: %s", toolchain)
    return toolchain


def sources(headers: tuple[str, ...] | None = None) -> str:
    """What kernels are made from besides their own text, as one digest.

    That is, ``headers`` and what they include (all of our own by default), and
    CUTLASS's. Raises CompileError where those are missing; needs no compiler.
    """
    own, cutlass = _headers()
    version = _cutlass_version(cutlass / "include")
    if headers is None:
        headers = tuple(p.relative_to(own).as_posix() for p in own.rglob("*.h*"))
    return f"{_included_digest(own, headers)} cutlass {version}"


def _headers() -> tuple[Path, Path]:
    """Our include directory and CUTLASS's tree."""
    own = paths.own_include()
    if own is None:
        raise CompileError("jax_bolt's own headers are missing: reinstall jax_bolt")
    cutlass = paths.cutlass_root()
    if cutlass is None:
        raise CompileError(
            "CUTLASS's headers, which come with jax_bolt, are missing: reinstall "
            "jax_bolt (in a checkout: `make clean venv`)"
        )
    return own, cutlass


def _digest(root: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        name = path.relative_to(root).as_posix()
        # Lengths keep two files from reading as one.
        digest.update(f"{len(name)}:{name}{len(content)}:".encode() + content)
    return digest.hexdigest()


def included_digest(root: Path, source: str) -> str:
    """A digest of our headers under ``root`` that ``source`` includes, at any depth.

    Only those: a change to one family's headers leaves the other kernels in the store.
    """
    return _included_digest(root, tuple(_INCLUDE.findall(source)))


@functools.lru_cache(maxsize=256)
def _included_digest(root: Path, names: tuple[str, ...]) -> str:
    found: set[str] = set()
    pending = list(names)
    while pending:
        name = pending.pop()
        path = root / name
        if name not in found and path.is_file():
            found.add(name)
            pending.extend(_INCLUDE.findall(path.read_text()))
    return _digest(root, (root / name for name in found))


def _find_nvcc(
    cuda_home: Path | None, environ: dict[str, str | None]
) -> tuple[Path, str, str, tuple[Path, ...]]:
    refused: list[str] = []
    for origin, nvcc in _candidates(cuda_home, environ):
        reason, version, includes = _examine(nvcc, split=origin == PYPI)
        if reason is None:
            return nvcc, version, origin, includes
        logger.debug("not using %s (%s): %s", nvcc, origin, reason)
        refused.append(f"{nvcc} ({origin}): {reason}")
    if cuda_home is not None:
        fix = "correct the option cuda_home (JAX_BOLT_CUDA_HOME) or leave it out"
    else:
        fix = f"`{INSTALL}` installs one"
        refused = refused or ["no nvcc in the PyPI wheels, $CUDA_HOME or $PATH"]
    raise CompileError(
        "kernels are built by NVIDIA's compiler, nvcc, and there is none that can be "
        f"used; {fix}. Tried: {'; '.join(refused)}"
    )


def _candidates(
    cuda_home: Path | None, environ: dict[str, str | None]
) -> Iterator[tuple[str, Path]]:
    if cuda_home is not None:
        yield "cuda_home", cuda_home / "bin" / "nvcc"
        return
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := environ[variable]:
            yield f"${variable}", Path(home) / "bin" / "nvcc"
    for nvcc in _wheels():
        yield PYPI, nvcc
    if found := shutil.which("nvcc", path=environ["PATH"]):
        yield "$PATH", Path(found)


def _wheels() -> list[Path]:
    """The nvcc of the CUDA wheels, newest CUDA first; all share nvidia/cu<N>."""
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec else None) or ()
    found = [nvcc for place in places for nvcc in Path(place).glob("cu*/bin/nvcc")]
    return sorted(found, key=lambda p: _numbers(p.parts[-3]), reverse=True)


def _examine(nvcc: Path, *, split: bool) -> tuple[str | None, str, tuple[Path, ...]]:
    """Why ``nvcc`` cannot be used (None when it can), its version, its headers.

    ``split``: the toolkit is several wheels, any of which may be missing.
    """
    if not nvcc.is_file():
        return "there is no such file", "", ()
    printed = _run(nvcc, "--version")
    found = re.search(r"\bV(\d+\.\d+\.\d+)", printed)
    if found is None:
        return f"`nvcc --version` printed {printed.strip()[-200:]!r}", "", ()
    version = found[1]
    if _numbers(version) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        return f"version {version} is too old, {oldest} is needed", version, ()
    places = _places(nvcc)
    for part, wheel in _PARTS.items() if split else ():
        if not any((place / part).is_file() for place in places):
            return f"it comes without {part} (pip install {wheel})", version, ()
    includes = (p for p in places if p.name in ("include", "cccl") and p.is_dir())
    return None, version, tuple(includes)


def _places(nvcc: Path) -> tuple[Path, ...]:
    """Where a toolkit's parts may lie; the headers' directories come first."""
    root = nvcc.resolve().parents[1]
    if not (root / "nvvm").is_dir():
        # A wrapper or a distribution's layout: nvcc itself knows its root.
        found = re.search(r"TOP=(.+)", _run(nvcc, "--dryrun", "-x", "cu", os.devnull))
        root = Path(found[1].strip()).resolve() if found else root
    bases = (root, root / "targets" / "x86_64-linux")
    headers = [d for b in bases for d in (b / "include", b / "include" / "cccl")]
    libraries = [b / name for b in bases for name in ("lib64", "lib")]
    return (*headers, *libraries, root / "nvvm" / "bin")


@functools.lru_cache(maxsize=32)
def _run(nvcc: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            [str(nvcc), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stdout.decode(errors="replace")


def _host_compiler(environ: dict[str, str | None]) -> Path | None:
    names = (environ["NVCC_CCBIN"], environ["CXX"], "g++", "clang++", "c++")
    for name in filter(None, names):
        if found := shutil.which(name, path=environ["PATH"]):
            return Path(found)
    return None


@functools.lru_cache(maxsize=8)  # every site asks
def _cutlass_version(include: Path) -> str:
    header = include / "cutlass" / "version.h"
    parts = ("MAJOR", "MINOR", "PATCH")
    return ".".join(_define(header, f"CUTLASS_{part}") for part in parts)


def _define(header: Path, name: str) -> str:
    found = re.search(rf"#define {name} (\d+)", header.read_text())
    if found is None:
        raise CompileError(f"{header} does not define {name}")
    return found[1]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text))
