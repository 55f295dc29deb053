# SPDX-License-Identifier: Apache-2.0
"""Writes committed benchmark results into the README's table.

python benchmarks/readme_table.py benchmarks/results/models-....json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

_README = Path(__file__).resolve().parents[1] / "README.md"
_BEGIN, _END = "<!-- results -->", "<!-- /results -->"
_COLUMNS = (
    *("model", "`jax.jit`", "best of XLA", "jax_bolt", "`jax.jit` / jax_bolt"),
    *("best of XLA / jax_bolt", "floor", "error ratio"),
)


def rows(document: dict[str, Any]) -> list[list[str]]:
    """One row per model: milliseconds, ratios, the error beside plain ``jax.jit``'s."""
    table = []
    for result in document["models"].values():
        variants, ratios = result["variants"], result["ratios"]
        times = {name: v.get("queued_ms") for name, v in variants.items()}
        xla = [t for name, t in times.items() if t and name.startswith("jit")]
        table.append(
            [
                result["title"],
                f"{times['jit']:.3f}",
                f"{min(xla):.3f}",
                f"**{times['jax_bolt']:.3f}**",
                f"{ratios['jit_over_bolt_queued_ms']:.2f}",
                f"{ratios['best_xla_over_bolt_queued_ms']:.2f}",
                f"{result['floor_ms']:.3f}",
                f"{ratios['error']:.2f}",
            ]
        )
    return table


def merged(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """All models of documents measured alike; raises ValueError where they were not."""
    first = documents[0]
    models: dict[str, Any] = {}
    for document in documents:
        if _where(document) != _where(first):
            raise ValueError(f"not measured alike: {_where(document)}, {_where(first)}")
        models |= document["models"]
    return first | {"models": models}


def _where(document: dict[str, Any]) -> tuple[Any, ...]:
    where, settings = document["environment"], document["settings"]
    return (
        *(where["device"], where["versions"], where["date"][:10]),
        *(settings["batch"], settings["image"], settings["dtype"]),
    )


def text(document: dict[str, Any]) -> str:
    """The table, and a line that says where it was measured."""
    where = document["environment"]
    settings = document["settings"]
    lines = [list(_COLUMNS), ["---"] * len(_COLUMNS), *rows(document)]
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return (
        f"{body}\n\n{where['device']}, jax {where['versions']['jax']}, "
        f"{where['date'][:10]}; ms of GPU time per batch of "
        f"{settings['batch']}, {settings['image']}x{settings['image']}, "
        f"{settings['dtype']}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    document = merged([json.loads(p.read_text()) for p in parser.parse_args().results])
    before, _, rest = _README.read_text().partition(_BEGIN)
    _, _, after = rest.partition(_END)
    _README.write_text(f"{before}{_BEGIN}\n\n{text(document)}\n\n{_END}{after}")


if __name__ == "__main__":
    main()
