# SPDX-License-Identifier: Apache-2.0
"""The process that ``start`` starts: reads ahead, builds, and ends with its users.

All it says goes to a log file. The processes it works for may be killed at any moment,
and so may it: the store never shows half a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import math
import os
import threading
import time
import traceback
from pathlib import Path

from .. import options
from ..errors import CacheError, CompileError
from ..jit import compiler, manifest, toolchain
from ..options import Options
from . import gpus, start, usage

_POLL_S = 0.5
_END_S = 3.0  # to remove what unfinished builds left
_READ_BYTES = 256 << 20

_IOPRIO_SET = 251  # on x86-64
_IDLE = 3 << 13

_ending = threading.Event()


def main(told: str) -> None:
    """What was asked for; ``told`` is what ``start`` says in JSON."""
    message = json.loads(told)
    stamp = Path(message["stamp"])
    lower_priority()
    threading.Thread(target=_end_with_users, args=[stamp.parent], daemon=True).start()
    try:
        active = options.current()
        read_ahead(active)
        if message["mode"] == "build":
            _build(active)
    except _Ended:
        time.sleep(2 * _END_S)
    except (CompileError, CacheError, OSError) as error:
        print(error)
    except Exception:  # our own fault: it is not to be met again at every import
        traceback.print_exc()
    _forget_old(stamp.parent)
    stamp.touch()


def lower_priority() -> None:
    """Below everything else here: CPU, disk, and first to go when memory is short.

    Of this thread and, since they inherit it, of all threads and compilers to come.
    """
    os.nice(19)
    with contextlib.suppress(OSError):
        # Where each session has a share of the CPU, nice counts inside it alone.
        Path("/proc/self/autogroup").write_text("19")
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    ctypes.CDLL(None).syscall(_IOPRIO_SET, 1, 0, _IDLE)


def default_jobs() -> int:
    """Half of the CPUs that this process may use."""
    return max(1, int(compiler.cpus() / 2))


def read_ahead(active: Options) -> None:
    """Has the system read the kernels that programs used here lately.

    They are small, and a local disk gives them in milliseconds: what is gained is the
    first use after a restart, and on a network's disk. Loading them is left to the
    program that needs them, since it takes a CUDA context.
    """
    wanted = usage.winners(active)
    left = _READ_BYTES
    for entry in usage.recent(active):
        cast = entry.path / "cast.cubin"
        if entry.path.name not in wanted and not cast.exists():
            continue
        left -= entry.size
        if left < 0:
            return
        for name in (manifest.MANIFEST, *compiler.BINARIES):
            with contextlib.suppress(OSError), (entry.path / name).open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _build(active: Options) -> None:
    tools = toolchain.find(active)
    for arch in gpus.architectures():
        with contextlib.suppress(FileNotFoundError):
            os.utime(usage.complete(arch, active, tools))  # or it would be forgotten
            continue
        from . import library  # and JAX

        wanted = library.sources(arch, active, tools)
        jobs = min(active.jobs or math.inf, default_jobs())
        print(f"{arch.name}: {len(wanted)} kernels", flush=True)
        print(library.build(arch, wanted, active, tools, int(jobs), _step), flush=True)


class _Ended(Exception):
    """There is nobody to build for; the thread that watches ends the process."""


def _step() -> None:
    if _ending.is_set():
        raise _Ended


def _end_with_users(folder: Path) -> None:
    """Ends this process once no process holds the lock ``users`` any more."""
    # Not with the process that started this one: others may rely on it.
    # Open for writing, as a network's disk wants it for a lock of one alone.
    with (folder / start.USERS).open("r+b") as users:
        while True:
            with contextlib.suppress(OSError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(_POLL_S)
        _ending.set()
        compiler.end_all()
        # Compiling threads now remove what they were making: megabytes each.
        end = time.monotonic() + _END_S
        for thread in threading.enumerate():
            if thread.name.startswith("jax_bolt-"):
                thread.join(max(0.0, end - time.monotonic()))
        os._exit(0)


def _forget_old(folder: Path) -> None:
    for path in (*folder.glob("complete-*"), *folder.glob("checked-*")):
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < time.time() - usage.RECENT_S:
                path.unlink()
