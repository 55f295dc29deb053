# SPDX-License-Identifier: Apache-2.0
"""``python -m jax_bolt cache``: what is kept on disk, and moving it elsewhere."""

from __future__ import annotations

import argparse
import collections
import datetime
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import archive, options, paths, program, resolve
from .command import UsageError, add_parser, printable
from .errors import CacheError, CompileError
from .jit import manifest
from .jit.store import Store
from .tune import db
from .tune import target as targets

_CACHE = """\
examples:
  python -m jax_bolt cache ls
  python -m jax_bolt cache prune --max-bytes 2G
  python -m jax_bolt cache export tuned.zip      on a machine with the GPU
  python -m jax_bolt cache import tuned.zip      where the program is to run

The cache is the one of JAX_BOLT_CACHE_DIR, or else the user's.
"""
_LS = """\
example:
  python -m jax_bolt cache ls

"results" counts the tuning results that chose a kernel.
"""
_SIZE = """\
example:
  python -m jax_bolt cache size
"""
_PRUNE = """\
examples:
  python -m jax_bolt cache prune
  python -m jax_bolt cache prune --max-bytes 500M

What was used in the last ten minutes stays.
"""
_CLEAR = """\
examples:
  python -m jax_bolt cache clear
  python -m jax_bolt cache clear --yes      in a script
"""
_EXPORT = """\
examples:
  python -m jax_bolt cache export tuned.zip
  python -m jax_bolt cache export --no-kernels results.zip
  python -m jax_bolt cache export --all everything.zip

Without kernels the archive is small, and they are compiled where they are first used.
"""
_IMPORT = """\
examples:
  python -m jax_bolt cache import tuned.zip
  python -m jax_bolt cache import --no-kernels tuned.zip

Kernels are code that runs in your programs: import them only from those you would
install a package from. With --no-kernels they are compiled here.
"""
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def add_to(commands: Any) -> None:
    """Adds ``cache`` to the parsers of a command line."""
    cache = add_parser(commands, "cache", "shows, bounds and moves the cache", _CACHE)
    actions = cache.add_subparsers(metavar="ACTION", required=True)

    def add(name: str, text: str, run: Callable, examples: str) -> Any:
        return add_parser(actions, name, text, examples, run)

    add("ls", "lists kernels, the last used first, and tuning results", _ls, _LS)
    add("size", "says how much is kept", _size, _SIZE)
    text = "removes the kernels that were not used for longest"
    prune = add("prune", text, _prune, _PRUNE)
    prune.add_argument(
        "--max-bytes",
        type=_bytes,
        metavar="SIZE",
        help="what may stay, such as 500M or 2G (default: the store's own bound)",
    )
    clear = add("clear", "removes all kernels and tuning results", _clear, _CLEAR)
    clear.add_argument("--yes", action="store_true", help="do not ask")
    export = add("export", "writes an archive", _export, _EXPORT)
    export.add_argument("file", type=Path, metavar="FILE")
    _add_kernels(export, "with the kernels that the tuning results chose")
    export.add_argument("--all", action="store_true", help="with every kernel there is")
    export.add_argument("--force", action="store_true", help="replace FILE")
    import_ = add("import", "takes what is in an archive", _import, _IMPORT)
    import_.add_argument("file", type=Path, metavar="FILE")
    _add_kernels(import_, "the kernels too, and not tuning results alone")


def _add_kernels(parser: Any, text: str) -> None:
    action = argparse.BooleanOptionalAction
    parser.add_argument("--kernels", action=action, default=True, help=text)


# --- Looking


def _ls(args: argparse.Namespace) -> None:
    kernels, results = _stores()
    found = results.all()
    users: dict[str, list[db.Entry]] = collections.defaultdict(list)
    for entry in _winners(found):
        users[entry.digest].append(entry)
    rows = []
    for kept in reversed(kernels.entries()):
        arch, kernel = manifest.describe(kept.path)
        if used_by := users.get(kept.path.name):
            kernel = f"{used_by[0].template} {used_by[0].config}"
        when = datetime.datetime.fromtimestamp(kept.used).isoformat(" ", "minutes")
        digest = kept.path.name[:12]
        rows.append(
            (_size_text(kept.size), when, arch, digest, len(used_by or ()), kernel)
        )
    _print(f"kernels in {kernels.root}")
    _table(("size", "last used", "arch", "digest", "results", "kernel"), rows)
    _print(f"\ntuning results in {results.root}")
    _table(
        ("results", "kernel", "XLA", "written", "device"),
        [
            (
                len(file.entries),
                len(_winners([file])),
                sum(entry.choice == "xla" for entry in file.entries.values()),
                file.date[:10],
                file.device,
            )
            for file in found
        ],
    )


def _size(args: argparse.Namespace) -> None:
    kernels, results = _stores()
    entries, found = kernels.entries(), results.all()
    total, bound = sum(entry.size for entry in entries), kernels.max_bytes
    count = sum(len(file.entries) for file in found)
    _table(
        (),
        [
            ("kernels", len(entries), _size_text(total), f"of {_size_text(bound)}"),
            ("tuning results", count, _size_text(_tuning_bytes(results)), ""),
        ],
    )


# --- Removing


def _prune(args: argparse.Namespace) -> None:
    kernels, _ = _stores()
    before = len(kernels.entries())
    removed = kernels.prune(args.max_bytes)
    left = kernels.entries()
    size = sum(entry.size for entry in left)
    _print(
        f"removed {before - len(left)} kernels of {_size_text(removed)}; "
        f"{len(left)} of {_size_text(size)} are left"
    )
    bound = kernels.max_bytes if args.max_bytes is None else args.max_bytes
    if size > bound:
        _note("what was used in the last ten minutes, or cannot be removed, stays")


def _clear(args: argparse.Namespace) -> None:
    kernels, results = _stores()
    count = sum(len(file.entries) for file in results.all())
    root = paths.cache_root(options.current())
    what = f"{len(kernels.entries())} kernels and {count} tuning results in {root}"
    if not args.yes:
        if not sys.stdin.isatty():
            raise UsageError(f"this removes {what}: add --yes to say that it may")
        try:
            answer = input(f"Remove {what}? [y/N] ")
        except EOFError:
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise CacheError("nothing was removed")
    program.clear_cache(options.current())
    if kernels.entries() or results.all():
        raise CacheError(f"not all of {root} could be removed: is it yours to write?")
    _print(f"removed {what}")


# --- Moving


def _export(args: argparse.Namespace) -> None:
    if args.file.exists() and not args.force:
        raise CacheError(f"{args.file} exists already: add --force to replace it")
    if args.all and not args.kernels:
        raise UsageError("--all and --no-kernels contradict each other")
    if not args.file.absolute().parent.is_dir():
        raise CacheError(
            f"there is no directory {args.file.absolute().parent}: make it"
        )
    kernels, results = _stores()
    found = results.all()
    wanted = {entry.digest for entry in _winners(found)}
    chosen = []
    if args.kernels:
        chosen = [e for e in kernels.entries() if args.all or _needed(e.path, wanted)]
    if not any(file.entries for file in found) and not chosen:
        raise CacheError(
            f"nothing was tuned yet in {paths.cache_root(options.current())}: run the "
            "program or jax_bolt.tune first, on a machine with the GPU"
        )
    count, damaged = archive.write(args.file, found, chosen)
    tuned = sum(len(file.entries) for file in found)
    size = _size_text(args.file.stat().st_size)
    _print(f"{args.file}: {tuned} tuning results and {count} kernels, {size}")
    present = {entry.path.name for entry in chosen} - set(damaged)
    if args.kernels and (missing := wanted - present):
        _note(
            f"{len(missing)} kernels are not in the store; they are compiled again "
            "where the results are used"
        )


def _import(args: argparse.Namespace) -> None:
    kernels, results = _stores()
    holds = _holds(options.current())
    with archive.read(args.file) as opened:
        added = [
            kernels.add(digest, opened.kernel(digest))
            for digest in (opened.digests if args.kernels else ())
        ]
        merged = [(file, results.merge(file, holds)) for file in opened.results]
    kernels.prune()
    for file, counts in merged:
        other = sum(not holds(entry) for entry in file.entries.values())
        _print(
            f"{file.device}: {counts.added} tuning results added, {counts.replaced} "
            f"replaced, {counts.kept} no better than what was there"
        )
        if counts.unverified:
            _note(
                f"{counts.unverified} results are not used: they do not say how "
                "accurate their kernels are, or those are not accurate enough"
            )
        if other:
            _note(
                f"{other} results are of another jax_bolt, CUTLASS or nvcc; their "
                "kernels are checked once more where they are first used"
            )
    if args.kernels:
        _print(f"{sum(added)} kernels added, {len(added) - sum(added)} were there")


def _holds(active: options.Options) -> Callable[[db.Entry], bool]:
    try:
        origin = targets.origin(resolve.tools_for(active))
    except CompileError:  # no headers: nothing that was made from any can be compared
        return lambda entry: False
    return origin.holds


# --- Parts


def _stores() -> tuple[Store, db.Database]:
    active = options.current()
    return Store(paths.kernel_root(active)), db.Database(paths.tuning_root(active))


def _winners(found: Iterable[db.Results]) -> list[db.Entry]:
    entries = (entry for file in found for entry in file.entries.values())
    return [entry for entry in entries if entry.choice == "kernel"]


def _needed(path: Path, wanted: set[str]) -> bool:
    """Whether an optimized program runs the kernel: a winner, or one that casts."""
    return path.name in wanted or (path / "cast.cubin").exists()


def _tuning_bytes(results: db.Database) -> int:
    return sum(file.stat().st_size for file in results.root.glob("*.json"))


def _bytes(text: str) -> int:
    parts = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", text.strip(), re.I)
    if parts is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 500M or 2G")
    return int(float(parts[1]) * 1024 ** _UNITS[parts[2].upper()])


def _size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns as wide as what is in them; numbers to the right."""
    if not rows:
        _print("  none")
        return
    texts = [[*map(str, row)] for row in (headings, *rows) if row]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numbers = [isinstance(cell, int) for cell in rows[0]]
    for line in texts:
        cells = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        )
        _print("  " + "  ".join(cells).rstrip())


def _print(text: str) -> None:
    print(printable(text))


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
