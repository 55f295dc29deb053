# SPDX-License-Identifier: Apache-2.0
"""Turns what was tuned in a cache into the tuning files that jax_bolt ships.

    JAX_BOLT_CACHE_DIR=/tmp/fresh python benchmarks/bench_models.py
    python benchmarks/ship_results.py /tmp/fresh

Writes ``jax_bolt/data/tuned/<device>.json`` in this checkout. Of the results only those
go in that were made from the headers here, have a kernel here, and are verified; the
rest is counted. A cache that was filled for this alone keeps other problems out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

from jax_bolt._src import ir, kernels, paths, plan, region_text
from jax_bolt._src.jit import toolchain
from jax_bolt._src.tune import db


def problem(device: str, text: str, entry: db.Entry) -> str | None:
    """Why a result is of no use to others, or None where it is."""
    try:
        arch, region = db.arch_of(device), region_text.parse(text)
    except ValueError as error:
        return str(error)
    chain = isinstance(region, ir.Chain)
    headers = kernels.CHAIN_HEADERS if chain else kernels.HEADERS
    if entry.sources != toolchain.sources(headers):
        return "it was made from other headers"
    if not db.is_verified(entry):
        return "it is not verified"
    if entry.choice == "kernel" and plan.chosen(region, arch, entry) is None:
        return f"there is no {entry.template} {entry.config} ({entry.form})"
    return None


def ship(cache: Path, folder: Path) -> int:
    """Writes the files; how many there are."""
    files = db.Database(cache / "tuned").all()
    for file in files:
        problems = {k: problem(file.device, k, e) for k, e in file.entries.items()}
        kept = {k: e for k, e in file.entries.items() if problems[k] is None}
        path = folder / db.file_name(file.device)
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(db.text(file.device, kept))
        print(f"{path}: {len(kept)} of {len(problems)} results")
        for key, reason in problems.items():
            if reason is not None:
                print(f"  left out: {key}: {reason}")
    return len(files)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cache", type=Path, help="a JAX_BOLT_CACHE_DIR")
    args = parser.parse_args(arguments)
    if not ship(args.cache, paths.shipped_tuning()):
        parser.error(f"nothing was tuned in {args.cache}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
