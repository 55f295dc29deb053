# SPDX-License-Identifier: Apache-2.0
"""The native module (cc/native): kernels by digest, the XLA custom call, the timer.

``kind`` and ``dims`` are those of ``JaxBoltProblem`` in ``jax_bolt/abi.h``: kind 0 is a
gemm of (M, N, K, batch), kind 1 a conv of its fifteen sizes. Every function may be
called from any thread; those that wait or load release the GIL.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypedDict

ABI_VERSION: int
MAX_VECTORS: int
MAX_SIDES: int
MAX_AUXILIARY: int

BufferSet: TypeAlias = tuple[int, int, Sequence[int], Sequence[int], Sequence[int], int]
"""Device addresses of a, b, the outputs, the side inputs, the vectors, the workspace
(or 0). The outputs are the result and the auxiliary ones."""

class DeviceInfo(TypedDict):
    name: str
    uuid: str  # 32 hex digits
    compute_capability: str  # "9.0"
    sm_count: int
    l2_bytes: int
    smem_per_block: int  # opt-in maximum, bytes
    driver_version: int  # 13000 is CUDA 13.0
    total_bytes: int
    free_bytes: int | None  # None while there is no context: asking would make one

def load(digest: str, path: str) -> None:
    """Loads the artifact at the absolute ``path``, once for a digest.

    A name that ends in ``.cubin`` is a cubin's, which needs the CUDA driver; any other
    is a module's. Raises RuntimeError with the reason: not loadable, another ABI, a
    missing symbol.
    """

def is_loaded(digest: str) -> bool: ...
def launches(digest: str) -> int:
    """How often the custom call launched it; a command buffer counts when recorded.

    Raises RuntimeError when ``digest`` is not loaded, as do all functions below.
    """

def check(
    digest: str, kind: int, dims: Sequence[int], recipe: Sequence[int] = ()
) -> str | None:
    """Why the kernel cannot run the problem, or None. Touches no device.

    ``recipe`` is how a cubin is launched (``kernels/recipe.py``), empty for a module;
    here and below.

    Raises ValueError for an unknown kind or the wrong number of dims, as do all below.
    """

def workspace_bytes(
    digest: str,
    kind: int,
    dims: Sequence[int],
    ordinal: int = 0,
    sm_count: int | None = None,
    recipe: Sequence[int] = (),
) -> int:
    """Bytes of workspace a launch needs. With ``sm_count`` it asks no driver."""

def handlers() -> dict[str, Any]:
    """FFI stage name -> capsule, for ``jax.ffi.register_ffi_target`` on "CUDA"."""

def host_handlers() -> dict[str, Any]:
    """The same for "cpu": without stream and device, for modules of host code."""

def set_resolver(resolver: Callable[[str], object] | None) -> None:
    """Sets what an executable calls for a digest that is not loaded yet.

    ``resolver(digest)`` either loads the digest or raises; the text of what it raises
    becomes part of the XLA error.
    """

def profile(
    digest: str,
    kind: int,
    dims: Sequence[int],
    buffer_sets: Sequence[BufferSet],
    ordinal: int,
    repeats: int,
    recipe: Sequence[int] = (),
) -> list[float]:
    """Microseconds per launch, one value for each of ``repeats`` replays of 2-5 ms.

    The launches go round the sets of buffers: sets that together exceed the L2 cache
    keep it cold. The caller owns the buffers and has waited for them. Raises
    RuntimeError with the CUDA error.
    """

def run(
    digest: str,
    kind: int,
    dims: Sequence[int],
    buffers: BufferSet,
    ordinal: int,
    recipe: Sequence[int] = (),
) -> None:
    """Launches once and waits. Raises as ``profile`` does."""

def writes_all(
    digest: str,
    kind: int,
    dims: Sequence[int],
    buffers: BufferSet,
    bytes: Sequence[int],
    ordinal: int,
    recipe: Sequence[int] = (),
) -> bool:
    """Whether a launch writes all ``bytes`` of each output. Raises as ``profile``."""

class Memory:
    """Buffers on a device that are freed with it, for a process without JAX.

    While one lives the device's primary context does. Raises RuntimeError with the CUDA
    error.
    """

    def __init__(self, ordinal: int) -> None: ...
    def allocate(self, bytes: int, pattern: bytes) -> int:
        """The address of ``bytes`` that repeat ``pattern``, zeros where it is empty.

        Raises MemoryError where the device is full.
        """

def mark_handlers() -> dict[str, Any]:
    """FFI stage name -> capsule of "jax_bolt.mark", for "CUDA".

    Its attribute ``slot`` (i64) starts (0) or stops (1) the process's one stopwatch, on
    XLA's stream.
    """

def host_mark_handlers() -> dict[str, Any]:
    """The same for "cpu", on the default stream: for tests on a driver that counts."""

def read_stopwatch(ordinal: int) -> tuple[float, bool]:
    """Waits; ``(microseconds, queued)`` between the two marks.

    ``queued`` says that the second mark was enqueued before the device reached the
    first, so that the time holds no waiting for the host. Raises RuntimeError when both
    marks have not been made, or with the CUDA error.
    """

def device_info(ordinal: int = 0) -> DeviceInfo:
    """Creates no context. Raises RuntimeError without a driver or such a device."""

def driver_version() -> int | None:
    """13000 for a driver of CUDA 13.0; None when there is no driver."""
