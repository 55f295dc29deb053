# SPDX-License-Identifier: Apache-2.0
"""One generated TU to one artifact, with nvcc: a shared library or a cubin.

nvcc splits many option values at commas, so no path is ever given to it: it runs in
the output directory with relative names, and reaches headers through links there.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import logging
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Literal, TypeAlias

from ..arch import GpuArch
from ..errors import CompileError
from . import toolchain as toolchains
from .toolchain import Toolchain

logger = logging.getLogger(__name__)

# As kernels.template has it, which a compiler need not know; and a cubin that casts,
# which the launcher knows by its file's name.
Artifact: TypeAlias = Literal["module", "cubin", "cast"]

SOURCE = "source.cu"
LOG = "build.log"
TIMEOUT_S = 900.0

_WORK = "work"  # nvcc's intermediate files and the links to headers; removed after
_FILES: dict[Artifact, str] = {
    "module": "kernel.so",
    "cubin": "kernel.cubin",
    "cast": "cast.cubin",
}
BINARIES = frozenset(_FILES.values())
_MACRO = re.compile(r"^JAX_BOLT_(DEVICE|CAST)_KERNEL\(", re.MULTILINE)
_INSTANCE = re.compile(r"^JAX_BOLT_\w*KERNEL\((.*)\)\s*$", re.MULTILINE)
_QUALIFIERS = re.compile(r"(\w+::)+(?=k[A-Z])|\b(jax_bolt|cutlass)::")
_CUDA_TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16"}
_KINDS: dict[str, Artifact] = {"DEVICE": "cubin", "CAST": "cast"}
# ptxas runs wgmma one at a time: correct, and several times slower than it should be.
_SERIALISED = re.compile(r"C7510|wgmma\S* instructions are serialized")
# With registers, shared memory and spills in the log.
_CUBIN = ("-cubin", "-Xptxas=-v")
_OUTPUT: dict[Artifact, tuple[str, ...]] = {
    "module": (
        "-shared",
        "-Xcompiler=-fPIC,-fvisibility=hidden",
        "-cudart=static",
        # Else the static runtime's symbols could bind to another CUDA's in the process.
        "-Xlinker=--exclude-libs=ALL",
    ),
    "cubin": _CUBIN,
    "cast": _CUBIN,
}
_GROUP = Path("/sys/fs/cgroup")  # a container's own
_SPILLS = re.compile(r"[1-9]\d* bytes spill stores.*")
# In the words of the C library, which nvcc's own programs and the host compiler print.
_FULL = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT))


def artifact(source: str) -> Artifact:
    """What ``source`` is compiled to: its own last line says it."""
    macro = _MACRO.search(source)
    return _KINDS[macro[1]] if macro else "module"


def binary(source: str) -> str:
    """The name of the file that ``source`` is compiled to."""
    return _FILES[artifact(source)]


def kernel(source: str) -> str:
    """What ``source`` instantiates, for people; "" where it names nothing.

    That is a C++ type or, of a cast, "cast to" its result's type.
    """
    found = _INSTANCE.search(source)
    if found is None:
        return ""
    name = _QUALIFIERS.sub("", found[1])
    if artifact(source) == "cast":
        return f"cast to {_CUDA_TYPES.get(name, name)}"
    return name


def flags(arch: GpuArch, kind: Artifact = "module") -> tuple[str, ...]:
    """nvcc's options that shape the binary; part of a kernel's digest."""
    return (
        "-std=c++17",
        "-O3",
        # Device-side asserts are calls, around which ptxas serialises wgmma.
        "-DNDEBUG",
        arch.gencode,
        "--expt-relaxed-constexpr",
        *_OUTPUT[kind],
        # Users who must pass more to nvcc use its own variables.
        *shlex.split(os.environ.get("NVCC_PREPEND_FLAGS", "")),
        *shlex.split(os.environ.get("NVCC_APPEND_FLAGS", "")),
    )


def command(
    toolchain: Toolchain, arch: GpuArch, kind: Artifact = "module"
) -> list[str]:
    """The command that compiles ``SOURCE`` to an artifact, run beside the source."""
    # Compiling must not slow the program that waits for it, or the one behind it.
    nice = shutil.which("nice")
    return [
        *((nice, "-n", "10") if nice else ()),
        str(toolchain.nvcc),
        *flags(arch, kind),
        *((f"-ccbin={toolchain.host_compiler}",) if toolchain.host_compiler else ()),
        *(f"-I{_WORK}/{name}" for name in _includes(toolchain)),
        "-o",
        _FILES[kind],
        SOURCE,
    ]


def check(toolchain: Toolchain, arch: GpuArch) -> None:
    """Raises CompileError when nothing can be compiled for ``arch`` at all."""
    if toolchain.host_compiler is None:
        raise CompileError(
            "nvcc needs a C++ compiler and there is none on PATH: install g++ "
            "(for example: apt-get install g++), or set CXX"
        )
    toolchains.check_arch(toolchain, arch)


def compile(
    toolchain: Toolchain,
    source: str,
    arch: GpuArch,
    out_dir: Path,
    *,
    timeout_s: float = TIMEOUT_S,
    stop: threading.Event | None = None,
) -> Path:
    """Compiles ``source`` in the existing directory ``out_dir``; returns the binary.

    Writes ``SOURCE``, ``LOG`` (all that nvcc printed) and the artifact there. Setting
    ``stop`` ends it early. Raises CompileError with the log, and OSError where the disk
    and not the source is at fault.
    """
    check(toolchain, arch)
    kind = artifact(source)
    (out_dir / SOURCE).write_text(source)
    work = out_dir / _WORK
    work.mkdir()
    try:
        for name, target in _includes(toolchain).items():
            (work / name).symlink_to(target, target_is_directory=True)
        args = command(toolchain, arch, kind)
        problem = _run(args, out_dir, timeout_s, stop)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log = (out_dir / LOG).read_text(errors="replace")
    if problem is None and _SERIALISED.search(log):
        problem = "ptxas serialised wgmma (C7510)"
    binary = out_dir / _FILES[kind]
    if problem is None and not binary.is_file():
        problem = f"{toolchain.nvcc} wrote no {binary.name}"
    if problem is not None:
        if full := next((text for text in _FULL if text in log), None):
            raise OSError(errno.ENOSPC, f"{problem}: {full}")
        raise CompileError(f"a kernel for {arch.name} does not compile: {problem}", log)
    if spills := _SPILLS.search(log):
        # Slower, perhaps, and no more than that: the timing decides.
        logger.info("%s: %s", out_dir, spills[0])
    return binary


def cpus() -> float:
    """CPUs' worth of time that this process may use, by a container's limit too."""
    return min(len(os.sched_getaffinity(0)), _quota())


def _quota() -> float:
    """What a container's limit allows; infinity without one."""
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (_GROUP / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (_GROUP / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return math.inf
    if not (quota.isdecimal() and period.isdecimal() and int(period)):
        return math.inf  # "max", or -1
    return int(quota) / int(period)


def _includes(toolchain: Toolchain) -> dict[str, Path]:
    return {
        "own": toolchain.own_include,
        "cutlass": toolchain.cutlass_include,
        "cutlass_util": toolchain.cutlass_util_include,
    }


def _run(
    args: list[str], cwd: Path, timeout_s: float, stop: threading.Event | None
) -> str | None:
    """Runs nvcc; what went wrong, or None."""
    # nvcc would add these once more; flags() has them.
    unset = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    # Intermediate files die with the directory, even when nvcc is killed.
    env["TMPDIR"] = _WORK
    with (cwd / LOG).open("wb") as log:
        log.write((shlex.join(args) + "\n").encode())
        log.flush()
        with _live_lock:
            if _ended:
                return "it was interrupted"
            _end_at_exit()
            try:
                # Its own group, so that ending it ends ptxas and the host compiler too.
                process = subprocess.Popen(
                    args,
                    cwd=cwd,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                )
            except OSError as error:
                return f"cannot run {args[0]}: {error}"
            _live.add(process)
        with contextlib.suppress(OSError):
            # Where memory is short it is they who go, and not the user's program.
            Path(f"/proc/{process.pid}/oom_score_adj").write_text("1000")
        try:
            return _wait(process, timeout_s, stop)
        finally:
            _end(process)
            with _live_lock:
                _live.discard(process)


def _wait(
    process: subprocess.Popen[bytes], timeout_s: float, stop: threading.Event | None
) -> str | None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        try:
            code = process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            if stop is not None and stop.is_set():
                return "it was interrupted"
            continue
        return None if code == 0 else f"nvcc ended with status {code}"
    return f"nvcc ran longer than {timeout_s:g} s"


_live: set[subprocess.Popen[bytes]] = set()
_live_lock = threading.Lock()
_ended = False


def end_all() -> None:
    """Ends every compiler of this process, for good: none starts after this."""
    global _ended
    with _live_lock:
        _ended = True
        for process in _live:
            _end(process)


@functools.cache
def _end_at_exit() -> None:
    owner = os.getpid()
    # A forked child has no compilers, and may have the lock as another thread had it.
    atexit.register(lambda: os.getpid() == owner and end_all())


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
