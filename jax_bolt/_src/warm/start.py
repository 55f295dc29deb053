# SPDX-License-Identifier: Apache-2.0
"""``import jax_bolt`` → a process that reads and builds kernels, where one is needed.

A process of its own, not a thread: a thread would hold the interpreter's lock while the
user's program starts, make a program multi-threaded that is about to fork, and be cut
off in the middle at its exit. It is nobody's child, so no ``wait`` of the user's can
meet it.

Of any number of processes that import at once one starts it: the one that gets the lock
``builder``, which the new process inherits and holds to its end. All of them hold the
lock ``users``, shared, as long as they live; the new process ends soon after the last.
Where a look round was finished in the last ten minutes none is started, and importing
costs a few system calls.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

from .. import options
from ..options import Options

logger = logging.getLogger(__name__)

FOLDER = ".warm"  # in the kernel store
BUILDER, USERS, LOG = "builder", "users", "log"
FRESH_S = 600.0

_DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # the driver's; that of Windows' for Linux
# What a look round depends on, beside the options.
_VARIABLES = (
    *("CUDA_HOME", "CUDA_PATH", "PATH", "NVCC_CCBIN", "CXX"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
)
# jax_bolt itself is not run in the new process, which has no use for its imports.
_CODE = """\
import sys, types
sys.path[:] = sys.argv[3:]
package = sys.modules["jax_bolt"] = types.ModuleType("jax_bolt")
package.__path__ = [sys.argv[1]]
from jax_bolt._src.warm import background
background.main(sys.argv[2])
"""

_users: int | None = None  # the descriptor of the lock, to be held for ever


def start() -> None:
    """Starts what ``warm`` asks for; never raises or waits.

    Prints nothing but a warning where a variable of the environment is no option.
    """
    try:
        if not _is_command():
            for text in options.unknown(os.environ).values():
                warnings.warn(f"jax_bolt: {text}", stacklevel=3)
        # Not options.current(), after which later changes of os.environ would be lost.
        try:
            active = options.from_environment(os.environ)
        # But for JAX_BOLT_WARM's, the first call raises it; a command says it.
        except ValueError as error:
            if not _is_command():
                warnings.warn(f"jax_bolt: {error}", stacklevel=3)
            return
        if active.warm != "off" and _sees_gpu() and not _is_command():
            _start(active)
    except Exception as error:  # an import must not fail for the sake of a cache
        logger.debug("nothing is built in the background: %s", error, exc_info=True)


def _start(active: Options) -> None:
    global _users
    # Only here: a machine without a GPU need not load what they import.
    from .. import paths
    from ..jit import directories

    root = paths.kernel_root(active)
    stamp = root / FOLDER / f"checked-{_signature(active)}"
    python = paths.python()
    if _is_fresh(stamp) or python is None:
        return
    if (problem := directories.make(root)) is not None:
        logger.debug("nothing is built in the background: %s: %s", root, problem)
        return
    stamp.parent.mkdir(mode=0o700, exist_ok=True)
    _users = _open(stamp.with_name(USERS))
    # Fails only where a process that had no users is ending just now.
    fcntl.flock(_users, fcntl.LOCK_SH | fcntl.LOCK_NB)
    builder = _open(stamp.with_name(BUILDER))
    try:
        with contextlib.suppress(BlockingIOError):  # there is one
            fcntl.flock(builder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_fresh(stamp):
                _spawn(python, active.warm, stamp, builder)
    finally:
        os.close(builder)


def _spawn(python: str, mode: str, stamp: Path, builder: int) -> None:
    """Starts ``background.main``, which inherits the lock ``builder``."""
    told = json.dumps({"mode": mode, "stamp": str(stamp)})
    package = str(Path(__file__).parents[2])
    command = [python, "-P", "-c", _CODE, package, told, *sys.path]
    environ = {**os.environ, "JAX_BOLT_WARM": "off", "JAX_PLATFORMS": "cpu"}
    with stamp.with_name(LOG).open("wb") as log:
        subprocess.run(
            # The shell ends at once, and leaves the process to the system.
            ["/bin/sh", "-c", '"$@" &', "sh", *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[builder],
            # Of its own: what is typed at the user's terminal is not for it.
            start_new_session=True,
            check=False,
        )


def _sees_gpu() -> bool:
    """Whether JAX may use a GPU here, by what files there are: microseconds."""
    import jax

    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return False
    platforms = getattr(jax.config, "jax_platforms", None)
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return False
    return any(map(os.path.exists, _DEVICES))


def _signature(active: Options) -> str:
    """Another one where a look round might find something else to do."""
    import jax

    site = Path(jax.__file__).parents[1]  # pip changes it, and puts nvcc there
    parts = [
        *(sys.prefix, __file__, os.uname().nodename, site.stat().st_mtime_ns),
        *(active.warm, active.cuda_home, active.jobs),
        *(os.environ.get(name) for name in _VARIABLES),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _is_fresh(stamp: Path) -> bool:
    try:
        return abs(time.time() - stamp.stat().st_mtime) < FRESH_S
    except OSError:
        return False


def _is_command() -> bool:
    """Whether this is ``python -m jax_bolt``, which looks after the cache itself."""
    argv = sys.orig_argv
    return ("-m", "jax_bolt") in itertools.pairwise(argv)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
