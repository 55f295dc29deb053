# SPDX-License-Identifier: Apache-2.0
"""A compiler for tests of the store: instant, and steered by words in the source.

FAIL: prints an error, status 2. C7510: prints ptxas's warning. NOTHING: writes no
binary. WAIT: first waits until the file ``release`` exists beside the script. A line
"// SAY ..." has its rest printed. Every compile adds a line, its process id, to the
file ``calls`` there.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from jax_bolt._src import arch
from jax_bolt._src.jit.store import Store
from jax_bolt._src.jit.toolchain import Toolchain

SM90 = arch.from_name("sm_90a")

SCRIPT = """\
#!/bin/sh
here=$(dirname "$0")
case "$*" in *--version*)
  echo "nvcc: NVIDIA (R) Cuda compiler driver"
  echo "Cuda compilation tools, release VERSION_SHORT, VVERSION"
  exit 0 ;;
esac
echo $$ >> "$here/calls"
if grep -q WAIT source.cu; then
  # Nobody may be left to release it, where a test has killed who asked for it.
  turns=0
  while [ ! -e "$here/release" ] && [ $turns -lt 1200 ]; do
    sleep 0.05
    turns=$((turns + 1))
  done
fi
if grep -q C7510 source.cu; then
  echo "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
fi
sed -n 's/^.. SAY //p' source.cu
if grep -q FAIL source.cu; then
  echo "source.cu(1): error: FAIL is not defined" >&2
  exit 2
fi
out=$(echo "$*" | sed 's/.* -o \\([^ ]*\\) .*/\\1/')
grep -q NOTHING source.cu || cat source.cu > $out
"""  # noqa: E501


class FakeNvcc:
    """A toolkit ``home`` whose bin/nvcc is the script."""

    def __init__(self, home: Path, version: str = "13.0.88") -> None:
        self.home = home
        self.nvcc = home / "bin" / "nvcc"
        self.nvcc.parent.mkdir(parents=True)
        (home / "nvvm").mkdir()
        short = ".".join(version.split(".")[:2])
        text = SCRIPT.replace("VERSION_SHORT", short).replace("VERSION", version)
        self.nvcc.write_text(text)
        self.nvcc.chmod(0o755)

    @property
    def calls(self) -> list[int]:
        """The process ids of the compiles so far."""
        file = self.nvcc.with_name("calls")
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def release(self) -> None:
        self.nvcc.with_name("release").touch()

    def toolchain(self) -> Toolchain:
        return toolchain(self.nvcc)

    def build(self, kernels: Store, source: str = "int x;") -> Path:
        """The binary of ``source``, which compiles."""
        (result,) = kernels.build(self.toolchain(), [source], SM90).values()
        assert isinstance(result, Path), result
        return result


def toolchain(nvcc: Path, version: str = "13.0.88") -> Toolchain:
    include = nvcc.parents[1] / "include"
    return Toolchain(
        nvcc=nvcc,
        version=version,
        origin="a test",
        cutlass_include=include,
        cutlass_util_include=include,
        cutlass_version="4.2.0",
        own_include=include,
        abi_version="1",
        cuda_includes=(include,),
        host_compiler=Path("/usr/bin/c++"),
    )


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Returns when ``condition`` holds; fails the test when it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
