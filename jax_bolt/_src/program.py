# SPDX-License-Identifier: Apache-2.0
"""A traced function with its regions: run it, tune it, report on it."""

from __future__ import annotations

import dataclasses
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import arch as arch_
from . import (
    chain,
    compat,
    filters,
    floor,
    held,
    options,
    passes,
    paths,
    plan,
    resolve,
    results,
    rewrite,
)
from . import lower as _lower  # registers the CUDA lowering rule  # noqa: F401
from . import split as split_
from .arch import GpuArch
from .errors import CompileError, UnsupportedError
from .jit import store, toolchain
from .match import Refusal
from .options import Options
from .plan import Rejection
from .pool import PoolInfo
from .primitive import SiteInfo
from .report import Report
from .rewrite import Rewritten
from .site import Link, Pool, Site
from .split import Split
from .tune import db
from .tune import target as targets

_POSITIONS = ("first", "second", "third")  # of a site in a chain
_UNCHECKED = "made by other versions: checked here before it is used"


def trace(
    fun: Callable,
    static_argnums: Sequence[int],
    args: Any,
    kwargs: Any,
    active: Options,
) -> tuple[Rewritten, Any]:
    """The rewritten program of ``fun(*args, **kwargs)`` and its output tree."""
    # A static argument may have been left to its default or bound by name.
    static = [i for i in static_argnums if -len(args) <= i < len(args)]
    traced, tree = compat.make_jaxpr(fun, static, args, kwargs)
    rewritten = rewrite.rewrite(traced, active)
    if active.dump_dir is not None:
        _dump(active.dump_dir, getattr(fun, "__name__", "function"), traced, rewritten)
    return rewritten, tree


def parted(
    fun: Callable,
    static_argnums: Sequence[int],
    args: Any,
    kwargs: Any,
    frozen: int,
    active: Options,
    *,
    hold: bool = False,
) -> tuple[Split, Rewritten, Any] | None:
    """As ``trace``, with what the first ``frozen`` leaves decide apart from the rest.

    ``hold``: the rest's leading arguments will be ``held``. None where the program
    cannot be parted.
    """
    traced, tree = compat.make_jaxpr(fun, static_argnums, args, kwargs)
    parts = split_.split(traced, frozen)
    if parts is None:
        return None
    prepare = filters.for_device(active)
    rewritten = rewrite.rewrite(parts.rest, active, len(parts.sources), prepare)
    parts = split_.further(parts, rewritten.program)
    if hold:
        rest = held.marked(parts.rest, len(parts.sources))
        parts = dataclasses.replace(parts, rest=rest)
    rewritten = dataclasses.replace(rewritten, program=parts.rest)
    if active.dump_dir is not None:
        _dump(active.dump_dir, getattr(fun, "__name__", "function"), traced, rewritten)
    return parts, rewritten, tree


def _dump(root: Path, name: str, traced: Any, rewritten: Rewritten) -> None:
    """Writes a program before and after rewriting, and its regions."""
    regions = "\n".join(f"{s}\n  {s.region.text}" for s in rewritten.family.sites)
    texts = {
        "0-traced.txt": str(traced),
        "1-rewritten.txt": str(rewritten.program),
        "2-regions.txt": regions,
    }
    try:
        root.mkdir(parents=True, exist_ok=True)
        prefix = re.sub(r"\W", "_", name) + "-"
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        for file, text in texts.items():
            (folder / file).write_text(text + "\n")
    except OSError as error:
        warnings.warn(f"jax_bolt: nothing is dumped to {root}: {error}", stacklevel=2)


def run(rewritten: Rewritten, leaves: Sequence[Any]) -> list[Any]:
    """The program's results, flat, from its arguments, flat."""
    return compat.jaxpr_as_fun(rewritten.program)(*leaves)


def clear_cache(active: Options) -> None:
    """Empties the kernel and tuning stores."""
    store.Store(paths.kernel_root(active)).clear()
    shutil.rmtree(paths.tuning_root(active), ignore_errors=True)
    results.forget()


def tune(rewritten: Rewritten, budget_s: float | None, progress: bool) -> Report:
    """Tunes what is missing; see ``jax_bolt.tune``."""
    active = options.current()
    if budget_s is not None:
        active = dataclasses.replace(active, budget_s=budget_s)
    device = compat.cuda_device()
    if device is None:
        raise UnsupportedError(
            f"tuning needs a CUDA device, and JAX sees none (`{toolchain.INSTALL}` "
            "installs JAX for NVIDIA GPUs); jax_bolt.explain works without one"
        )
    target = resolve.target_for(device, active)
    sites = [root for root in rewritten.roots if not isinstance(root, Refusal)]
    chains = [p.info for found in chain.sequences(rewritten.program) for p in found]
    results.tune_all(sites, chains, target, active, progress)
    return report(rewritten, None)


def report(rewritten: Rewritten, name: str | None) -> Report:
    """What runs each root on the architecture ``name``; see ``jax_bolt.explain``."""
    active = options.current()
    device = compat.cuda_device() if name is None else None
    arch = arch_.from_name(name) if name is not None else _arch_of(device)
    origin = _origin(active)
    links = links_of(rewritten.program, arch, device, active, origin)
    sites = [
        _refused(root)
        if isinstance(root, Refusal)
        else dataclasses.replace(
            _site(root, arch, device, active, origin),
            chains=tuple(links.get(id(root), ())),
        )
        for root in rewritten.roots
    ]
    pools = tuple(_pool(info, arch) for info in rewritten.pools)
    return Report(
        sites=tuple(sites),
        arch=arch.name if arch else "",
        counters=store.stats(),
        device=arch.gpu or "" if arch else "",
        pools=pools,
        board=arch.board if arch else "",
    )


def _pool(info: PoolInfo, arch: GpuArch | None) -> Pool:
    known = None
    if arch is not None:
        known = 2 if passes.two_pay(info.window, arch) else 1
    return Pool(name=info.name, line=info.line, problem=info.window.text, passes=known)


def _refused(root: Refusal) -> Site:
    return Site(
        name=root.name,
        line=root.line,
        root=root.primitive,
        reason=root.reason,
        kernel="xla",
        provenance="xla",
    )


def _site(
    site: SiteInfo,
    arch: GpuArch | None,
    device: Any,
    active: Options,
    origin: plan.Origin | None,
) -> Site:
    base = Site(
        name=site.name,
        line=site.line,
        root=site.root,
        problem=site.region.problem.text,
        epilogue=site.label,
        region=site.region,
        fused=True,
        prologue=site.prologue,
    )
    if arch is None:
        return base
    base = dataclasses.replace(base, floor=floor.floor(site.region, arch))
    made, note = what_runs(site, arch, device, active, origin)
    base = dataclasses.replace(base, **measured(made.entry, note))
    if isinstance(made, Rejection):
        return dataclasses.replace(
            base, reason=made.reason, kernel="xla", provenance="xla"
        )
    return dataclasses.replace(
        base,
        kernel=made.candidate.text,
        provenance=made.provenance,
        estimate=made.candidate.reasoning,
        left_to_xla=made.candidate.form.left_to_xla,
    )


def what_runs(
    site: chain.AnySite,
    arch: GpuArch,
    device: Any,
    active: Options,
    origin: plan.Origin | None,
) -> tuple[plan.Plan | Rejection, str]:
    """What runs a site or a chain, and what is to be noted of that."""
    made, note = _known(site, arch, active, origin)
    failed = results.failure(arch, site.region)
    if isinstance(site, chain.ChainInfo):
        made = made or plan.unmeasured(site.region, arch, active.disable, failed)
    elif failed is not None:
        made, note = Rejection(failed), ""
    else:
        made = made or plan.heuristic(site.region, arch, active.disable)
    shared = None if device is None else resolve.chosen(site, arch, device)
    if shared is not None:
        entry = made.entry if _kernel(made) == _kernel(shared) else None
        made, note = dataclasses.replace(shared, entry=entry), ""
    return made, note


def measured(entry: db.Entry | None, note: str) -> dict[str, Any]:
    """What a tuning result says, as fields of a ``Site`` or a ``Link``."""
    if entry is None:
        return {}
    return {
        "time_us": entry.time_us,
        "xla_time_us": entry.xla_time_us,
        "kernel_time_us": entry.kernel_time_us,
        "error": entry.error,
        "xla_error": entry.xla_error,
        "candidates": entry.candidates,
        "tuned": ", ".join(filter(None, (entry.date, entry.versions))),
        "notes": "; ".join(filter(None, (note, entry.notes))),
    }


def links_of(
    program: compat.ClosedJaxpr,
    arch: GpuArch | None,
    device: Any,
    active: Options,
    origin: plan.Origin | None,
) -> dict[int, list[Link]]:
    """The chains that the sites of ``program`` could be part of, by the sites' ids."""
    links: dict[int, list[Link]] = {}
    if chain.NAME in active.disable:
        return links
    for found in chain.sequences(program):
        made = [
            (Rejection(""), "")
            if arch is None
            else what_runs(each.info, arch, device, active, origin)
            for each in found
        ]
        own = [0.0 if isinstance(m, Rejection) else m.saved_us for m, _ in made]
        saved = chain.whole(found, own)
        chosen = chain.best(found, saved)
        for index, (each, (runs, note)) in enumerate(zip(found, made, strict=True)):
            link = _link(each.info, runs, note, chosen=each in chosen)
            if link.apart_time_us is not None:
                # As if every call had a kernel of its own.
                apart_us = link.apart_time_us + saved[index] - own[index]
                link = dataclasses.replace(link, apart_time_us=apart_us)
            sites = each.info.sites
            for site, position in zip(sites, _POSITIONS, strict=False):
                other = " and ".join(s.name for s in sites if s is not site)
                there = dataclasses.replace(link, other=other, position=position)
                links.setdefault(id(site), []).append(there)
    return links


def _link(
    info: chain.ChainInfo, made: plan.Plan | Rejection, note: str, *, chosen: bool
) -> Link:
    """As the first of its sites has it."""
    link = Link(
        other="",
        position="first",
        stored=info.region.stored,
        chosen=chosen,
        **measured(made.entry, note),
    )
    if made.entry is not None:
        link = dataclasses.replace(link, apart_time_us=made.entry.apart_time_us)
    if isinstance(made, Rejection):
        return dataclasses.replace(link, reason=made.reason)
    return dataclasses.replace(
        link,
        reason="" if chosen else "another chain of one of them saves more",
        kernel=made.candidate.text,
        provenance=made.provenance,
        estimate=made.candidate.reasoning,
    )


def _known(
    site: chain.AnySite, arch: GpuArch, active: Options, origin: plan.Origin | None
) -> tuple[plan.Plan | Rejection | None, str]:
    """What the tuning results make of ``site``, and what is to be noted of that."""
    if origin is None:
        return None, ""
    made = results.stored(site.region, arch, active, origin)
    if made is not None or origin.compiler is None:
        return made, ""
    old = results.adoptable(site.region, arch, active)
    return (None, "") if old is None else (old[1], _UNCHECKED)


def _kernel(made: plan.Plan | Rejection) -> str:
    return "xla" if isinstance(made, Rejection) else made.candidate.text


def _arch_of(device: Any) -> GpuArch | None:
    return None if device is None else resolve.arch_of(device)


def _origin(active: Options) -> plan.Origin | None:
    """What tuning results are compared with; none hold without our headers."""
    try:
        return targets.origin(resolve.tools_for(active))
    except CompileError:
        return None
