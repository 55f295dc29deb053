# SPDX-License-Identifier: Apache-2.0
"""What the first call costs in a fresh process, once another has built everything.

    python benchmarks/second_process.py --models resnet50

Starts one process for plain ``jax.jit`` and one for ``jax_bolt.optimize``, each of
which makes one first call. Exits with 1 where the second compiled or tuned anything,
or took over a second longer than the first. ``--fill`` makes one more process run
first, so that the check also means something on an empty cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks import environment
from benchmarks.models import models

PLAIN, BOLT = "jit", "jax_bolt"
MAX_EXTRA_S = 1.0
_MARK = "second_process: "


def first_call(name: str, variant: str, batch: int, image: int) -> dict[str, Any]:
    """Traces, compiles and runs once, in this process.

    Seconds exclude imports, parameters and the device's own start.
    """
    environment.set_sound_cpu_flags()
    apply, variables, x = models.build(name, batch, image)
    jax.block_until_ready((variables, x))
    if variant == PLAIN:
        fun: Any = jax.jit(apply)
    else:
        import jax_bolt

        fun = jax_bolt.optimize(apply)
    start = time.perf_counter()
    jax.block_until_ready(fun(variables, x))
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {"variant": variant, "first_call_s": seconds}
    if variant == BOLT:
        result["counters"] = counters(fun, variables, x)
    return result


def counters(optimized: Any, *args: Any) -> dict[str, int]:
    """How many kernels this process ``compiled`` and problems it ``tuned``."""
    found = optimized.explain(*args).counters
    return {name: int(found[name]) for name in ("compiled", "tuned")}


def failures(plain: dict[str, Any], bolt: dict[str, Any]) -> list[str]:
    """Why the pair does not pass; empty where it does."""
    out = [
        f"{name} is {bolt['counters'][name]}, not 0"
        for name in ("compiled", "tuned")
        if bolt["counters"][name]
    ]
    extra = bolt["first_call_s"] - plain["first_call_s"]
    if extra > MAX_EXTRA_S:
        out.append(f"the first call took {extra:.2f} s longer than plain jax.jit's")
    return out


def in_fresh_process(name: str, variant: str, batch: int, image: int) -> dict[str, Any]:
    """``first_call`` in a new Python process; RuntimeError with its log if it dies."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", variant]
    command += ["--models", name, "--batch", str(batch), "--image", str(image)]
    # JAX's own compilation cache would hide what is measured.
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    log = (done.stdout + done.stderr)[-4000:]
    raise RuntimeError(f"{variant} of {name} ended with {done.returncode}:\n{log}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _arguments(argv)
    size = (args.batch, args.image)
    if args.child:
        result = first_call(args.models[0], args.child, *size)
        print(_MARK + json.dumps(result), flush=True)
        return 0
    results, failed = {}, False
    for name in args.models:
        if args.fill:
            in_fresh_process(name, BOLT, *size)
        pair = {v: in_fresh_process(name, v, *size) for v in (PLAIN, BOLT)}
        why = failures(pair[PLAIN], pair[BOLT])
        results[name] = pair | {"failures": why}
        failed = failed or bool(why)
        print(
            f"{name}: first call {pair[PLAIN]['first_call_s']:.2f} s with jax.jit, "
            f"{pair[BOLT]['first_call_s']:.2f} s with jax_bolt "
            f"({pair[BOLT]['counters']}): {'; '.join(why) or 'ok'}",
            flush=True,
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return int(failed)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", nargs="+", default=["resnet50"], choices=models.MODELS
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--image", type=int, default=224, help="pixels per side")
    parser.add_argument("--fill", action="store_true", help="fill the caches first")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--child", choices=(PLAIN, BOLT), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
