# SPDX-License-Identifier: Apache-2.0
"""Launches one candidate of one of the benchmark's problems, for a profiler to look at.

    ncu --clock-control none -k jax_bolt_kernel -c 1 --section SpeedOfLight \\
        python benchmarks/launch_kernel.py --models resnet50 --only "28x28 512>1024"

The problem is the first whose text contains ``--only``, the candidate the first whose
text contains ``--config``, in the rank model's order. Operands are random.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
# JAX only traces here, and would take most of the GPU's memory.
os.environ["JAX_PLATFORMS"] = "cpu"

from benchmarks import kernel_problems
from jax_bolt._src import arch as arch_
from jax_bolt._src import options, paths, resolve
from jax_bolt._src.jit import loader, store
from jax_bolt._src.tune import isolate, worker


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 2 where nothing matches."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    names = kernel_problems.NAMES
    parser.add_argument("--models", nargs="+", default=list(names), choices=names)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--config", default="", metavar="TEXT")
    args = parser.parse_args(argv)
    arch = arch_.from_name("sm_90a")
    for problem in kernel_problems.collect(args.models, [args.batch], 224, args.dtype):
        if args.only not in problem.text:
            continue
        for candidate in kernel_problems.candidates(problem, arch, ()):
            if args.config in candidate.text:
                print(f"{problem.text}\n{candidate.text}\n{candidate.reasoning}")
                return _launch(candidate)
    print(f"no problem {args.only!r} has a candidate {args.config!r}", file=sys.stderr)
    return 2


def _launch(candidate: kernel_problems.plan.Candidate) -> int:
    given = options.current()
    tools = resolve.tools_for(given)
    if isinstance(tools, Exception):
        raise tools
    kernels = store.Store(paths.kernel_root(given))
    ((digest, path),) = kernels.build(tools, [candidate.source], candidate.arch).items()
    if isinstance(path, Exception):
        raise path
    request = isolate.request_for(candidate, digest, path, 2, 3, verify=False)
    print(worker.Timer(loader.native(), 0).answer(request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
