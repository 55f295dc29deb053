# SPDX-License-Identifier: Apache-2.0
"""The canonical text of a region or a chain → what it is the text of.

Tuning files are keyed by texts alone; to make an entry's kernel ahead of the program
that needs it, or to check a file, the region itself is wanted.
"""

from __future__ import annotations

import math
import re
from typing import Any

from . import ir

_REGION = re.compile(
    r"(?P<problem>(?:gemm|conv)\[[^\]]*\]) "
    r"\((?P<vectors>[^()]*)\)\((?P<sides>[^()]*)\)"
    r"\{(?P<body>.*);(?P<outputs>\w+:%\d+(?:,\w+:%\d+)*)\}"
    r"(?: (?P<pool>(?:max|mean)\[[^\]]*\]))?"
)
_GEMM = re.compile(
    r"gemm\[(?P<dtype>\w+) (?P<a_layout>row|col),(?P<b_layout>row|col) "
    r"(?:b(?P<batch>\d+))?m(?P<m>\d+)n(?P<n>\d+)k(?P<k>\d+)\]"
)
_CONV = re.compile(
    r"conv\[(?P<dtype>\w+) n(?P<n>\d+)h(?P<h>\d+)w(?P<w>\d+)c(?P<c>\d+) "
    r"k(?P<k>\d+)r(?P<r>\d+)s(?P<s>\d+) st(?P<stride>[\dx]+) "
    r"pad(?P<padding>[-\dx]+) dil(?P<dilation>[\dx]+)(?: g(?P<groups>\d+))?"
    r"(?P<hwio> hwio)?\]"
)
_POOL = re.compile(
    r"(?P<operation>max|mean)\[(?P<window>[\dx]+) "
    r"st(?P<stride>[\dx]+) pad(?P<padding>[\dx]+)\]"
)
_JOINT = re.compile(r" -(stored|kept)(?: side(\d+))?-> ")
_OP = re.compile(r"%(\d+)=(\w+)(?:\[([^\]]*)\])?\(((?:%\d+(?:,%\d+)*)?)\)")
_VECTOR = re.compile(r"(\w+)\[(n?)\]")
_OUTPUT = re.compile(r"(\w+):%(\d+)")


def parse(text: str) -> ir.Work:
    """The region or chain of that ``text``; raises ValueError where there is none."""
    try:
        work = _chain(text) if _JOINT.search(text) else _region(text)
    except (TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"{text!r} is no region: {error}") from error
    # Whatever the patterns let through, the text itself decides.
    if work.text != text:
        raise ValueError(f"{text!r} is no region's text")
    return work


def _chain(text: str) -> ir.Chain:
    first, *joints = _JOINT.split(text)
    made: ir.Region | ir.Chain = _region(first)
    for joint, side, second in zip(*(joints[i::3] for i in range(3)), strict=True):
        made = ir.Chain(
            first=made,
            second=_region(second),
            stored=joint == "stored",
            side=None if side is None else int(side),
        )
    assert isinstance(made, ir.Chain)
    return made


def _region(text: str) -> ir.Region:
    found = _match(_REGION, text)
    vectors = [_match(_VECTOR, each) for each in _list(found["vectors"])]
    outputs = [_match(_OUTPUT, each) for each in _list(found["outputs"])]
    result, *auxiliary = (ir.Output(int(o[2]), _dtype(o[1])) for o in outputs)
    epilogue = ir.Epilogue(
        ops=tuple(_op(each) for each in found["body"].split(";")),
        result=result.value,
        out_dtype=result.dtype,
        vectors=tuple(ir.Vector(_dtype(v[1]), scalar=not v[2]) for v in vectors),
        sides=tuple(_dtype(each) for each in _list(found["sides"])),
        auxiliary=tuple(auxiliary),
    )
    pool = None if found["pool"] is None else _pool(found["pool"])
    return ir.Region(problem=_problem(found["problem"]), epilogue=epilogue, pool=pool)


def _pool(text: str) -> ir.Pool:
    found = _match(_POOL, text)
    counts = {"window": 2, "stride": 2, "padding": 4}
    sizes: dict[str, Any]
    sizes = {name: _dims(found[name], count) for name, count in counts.items()}
    operation: Any = found["operation"]
    return ir.Pool(**sizes, operation=operation)


def _problem(text: str) -> ir.Problem:
    if text.startswith("gemm"):
        found: dict[str, Any] = _match(_GEMM, text).groupdict()
        sizes: dict[str, Any]
        sizes = {name: int(found.pop(name) or 1) for name in ("batch", "m", "n", "k")}
        dtype = _dtype(found.pop("dtype"))
        return ir.GemmProblem(**found, **sizes, dtype=dtype)
    found = _match(_CONV, text).groupdict()
    layout = "hwio" if found.pop("hwio") else "krsc"
    windows: dict[str, Any] = {
        "stride": _dims(found.pop("stride"), 2, least=1),
        "padding": _dims(found.pop("padding"), 4),
        "dilation": _dims(found.pop("dilation"), 2, least=1),
    }
    dtype = _dtype(found.pop("dtype"))
    sizes = {name: int(value or 1) for name, value in found.items()}
    if not sizes["groups"] or sizes["c"] % sizes["groups"]:
        raise ValueError(f"{text!r} has no whole channels in a group")
    return ir.ConvProblem(**sizes, **windows, dtype=dtype, filter_layout=layout)


def _dims(text: str, count: int, least: float = -math.inf) -> tuple[int, ...]:
    found = tuple(map(int, text.split("x")))
    if len(found) != count or min(found) < least:
        raise ValueError(f"{text!r} are no {count} sizes")
    return found


def _op(text: str) -> ir.Op:
    _, name, attr, args = _match(_OP, text).groups()
    number = None if attr is None else _number(attr)
    return ir.Op(name, tuple(int(each[1:]) for each in _list(args)), number)


def _number(text: str) -> float | int:
    # Floats are written in hexadecimal, or as inf and nan.
    return int(text) if re.fullmatch(r"-?\d+", text) else float.fromhex(text)


def _list(text: str) -> list[str]:
    return text.split(",") if text else []


def _dtype(name: str) -> Any:
    if name not in ir.ITEM_BYTES:
        raise ValueError(f"there is no dtype {name!r}")
    return name


def _match(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no part of a region's text")
    return found
