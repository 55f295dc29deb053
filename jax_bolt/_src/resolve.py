# SPDX-License-Identifier: Apache-2.0
"""Site → loaded kernel, or the reason it runs on XLA: plan, tune on a miss, load.

In this order:

1. The tuning results have the region, made from the headers we have and with the
   compiler we have: their choice. The user's come before those shipped with jax_bolt.
2. They have it made with others: their choice, when its kernel still compiles and was
   found accurate here, which is recorded (``tune.adopt``).
3. ``on_miss="tune"``: all sites of the same program are tuned now, then 1 again.
   ``"heuristic"``: the first candidate. ``"xla"``: XLA. ``"error"``: an error.
4. The kernel's artifact is taken from the store, or compiled, and loaded.

In a program of several processes one does that for all of them (``agree``).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from . import agree, follow, paths, plan, results
from . import arch as arch_
from .arch import GpuArch
from .chain import AnySite, ChainInfo
from .errors import CompileError, UnsupportedError
from .invoke import AnyExecutable
from .jit import codegen, loader, store, toolchain
from .options import Options
from .plan import Plan, Rejection
from .primitive import Family, SiteInfo
from .tune import target as targets
from .tune.target import Target

Resolution: TypeAlias = tuple[Plan, AnyExecutable] | Rejection


class Missing(UnsupportedError):
    """``on_miss="error"`` and there is no tuning result for a site."""


def resolve(
    site: SiteInfo,
    family: Family,
    options: Options,
    device: Any,
    processes: Collection[int] = (),
) -> Resolution:
    """What ``site`` runs on, on ``device``.

    ``processes`` are those that run the program, where that is known.

    Raises:
      CompileError: the chosen kernel cannot be built (there is no compiler, say) or
        loaded.
      UnsupportedError: the device's architecture is unknown.
      Missing: as ``on_miss="error"`` asks.
      agree.Disagreement: another process chose a kernel that this one cannot run.
    """
    make = functools.partial(_plan, site, family)
    return _resolve(site, family, make, family.sites, options, device, processes)


def resolve_chain(
    site: ChainInfo,
    family: Family,
    chains: Sequence[ChainInfo],
    options: Options,
    device: Any,
    processes: Collection[int] = (),
) -> Resolution:
    """As ``resolve``, of a chain, whose sites were resolved before.

    Only what was timed faster than its sites runs. ``chains`` are tuned together.
    """
    make = functools.partial(_plan_chain, site, chains)
    return _resolve(site, family, make, chains, options, device, processes)


def _resolve(
    site: AnySite,
    family: Family,
    make: Callable[[Options, Target], Plan | Rejection],
    together: Sequence[AnySite],
    options: Options,
    device: Any,
    processes: Collection[int],
) -> Resolution:
    def choose() -> Resolution:
        with results.lock:
            target = target_for(device, options)
            made = make(options, target)
            if isinstance(made, Rejection):
                return made
            return made, results.loaded(site, made, target, options, together)

    group = agree.group(processes)
    if group is None:
        return choose()

    def take(choice: agree.Choice) -> Resolution:
        rejection = _refusal(choice)
        if rejection is not None:
            return rejection
        with _following(choice, site.name), results.lock:
            target = target_for(device, options)
            return follow.kernel(site, together, choice, group, target)

    return agree.agreed(
        group,
        follow.question(site, device),
        site.name,
        family,
        choose,
        functools.partial(_describe, group.process),
        take,
    )


def cast_kernel(
    dtype: str,
    options: Options,
    device: Any,
    family: Family | None = None,
    processes: Collection[int] = (),
) -> str | None:
    """The digest of the kernel that casts f32 to ``dtype``, built and loaded.

    None without a compiler, whose version is part of the digest. ``processes`` and what
    is raised are as in ``resolve``; ``family`` is what the casts belong to.
    """
    source = codegen.cast_source(dtype)

    def choose() -> str | None:
        with results.lock:
            target = target_for(device, options)
            if isinstance(target.tools, CompileError):
                return None
            built = target.kernels.build(target.tools, [source], target.arch)
            ((digest, artifact),) = built.items()
            return _load_cast(digest, artifact)

    group = agree.group(processes)
    if group is None:
        return choose()
    name = f"casts to {dtype}"

    def take(choice: agree.Choice) -> str | None:
        if _refusal(choice) is not None:
            return None
        with _following(choice, name), results.lock:
            target = target_for(device, options)
            return _load_cast(
                choice.digest, follow.artifact(choice.digest, source, target)
            )

    return agree.agreed(
        group,
        follow.question(name, device),
        name,
        family or Family(),
        choose,
        functools.partial(_describe, group.process),
        take,
    )


def target_for(device: Any, options: Options) -> Target:
    """The device and the stores; raises as ``resolve`` does."""
    arch = arch_of(device)
    tools = tools_for(options)
    return Target(
        device=device,
        ordinal=device.local_hardware_id or 0,
        arch=arch,
        kernels=store.Store(paths.kernel_root(options)),
        results=results.database(options),
        tools=tools,
        origin=targets.origin(tools),
        jobs=options.jobs,
        disable=options.disable,
    )


def tools_for(options: Options) -> toolchain.Toolchain | CompileError:
    """The compiler, or why there is none: what is built already runs without."""
    try:
        return toolchain.find(options)
    except CompileError as error:
        return error


def arch_of(device: Any) -> GpuArch:
    """The architecture of a JAX CUDA device."""
    info = loader.native().device_info(device.local_hardware_id or 0)
    return arch_.of_device(
        str(device.compute_capability), device.device_kind, info["sm_count"]
    )


def board_of(device: Any) -> GpuArch:
    """The same for every device of one kind, in whichever process; else ``arch_of``."""
    return arch_.of_device(str(device.compute_capability), device.device_kind)


def _plan(
    site: SiteInfo, family: Family, options: Options, target: Target
) -> Plan | Rejection:
    known = results.stored(site.region, target.arch, options, target.origin)
    if known is None:
        results.adopt_missing(family.sites, target, options)
        known = results.stored(site.region, target.arch, options, target.origin)
    if known is not None:
        return known
    failed = results.failure(target.arch, site.region)
    if failed is not None:
        return Rejection(failed)
    if options.on_miss == "xla":
        return Rejection('no tuning result, and on_miss="xla"')
    if options.on_miss == "error":
        raise Missing(
            f"{site.name}: no tuning result for {site.region.problem.text} on "
            f'{target.arch.gpu}, and on_miss="error"; run jax_bolt.tune first'
        )
    if options.on_miss == "heuristic":
        return plan.heuristic(site.region, target.arch, options.disable)
    results.tune_missing(family.sites, target, options)
    known = results.stored(site.region, target.arch, options, target.origin)
    failed = results.failure(target.arch, site.region)
    return known or Rejection(failed or "not tuned")


def _plan_chain(
    site: ChainInfo, chains: Sequence[ChainInfo], options: Options, target: Target
) -> Plan | Rejection:
    """Only what was measured to be faster: its sites have kernels without it."""
    known = results.stored(site.region, target.arch, options, target.origin)
    if known is None:
        results.adopt_missing(chains, target, options)
        if options.on_miss == "tune":
            results.tune_chains(chains, target, options)
        known = results.stored(site.region, target.arch, options, target.origin)
    failed = results.failure(target.arch, site.region)
    return known or plan.unmeasured(site.region, target.arch, options.disable, failed)


def _load_cast(digest: str, artifact: Path | CompileError) -> str:
    if isinstance(artifact, CompileError):
        raise artifact
    loader.load(digest, artifact)
    return digest


# --- What processes tell each other


def chosen(site: AnySite, arch: GpuArch, device: Any) -> Plan | Rejection | None:
    """What the processes of this program have agreed on for ``site``, if they have."""
    group = agree.group()
    if group is None:
        return None
    choice = agree.known(group, follow.question(site, device))
    if choice is None:
        return None
    if choice.outcome != "kernel":
        return Rejection(choice.reason)
    candidate = follow.named(site, choice, arch)
    if candidate is None:
        return None
    return Plan(candidate, follow.provenance(choice), saved_us=choice.saved_us)


def _describe(process: int, made: Resolution | str | Exception | None) -> agree.Choice:
    """What the others are told of a resolution, or of casts."""
    if isinstance(made, Missing):
        return agree.Choice(outcome="missing", process=process, reason=str(made))
    if isinstance(made, Exception):
        reason = explain_failure(made)
        return agree.Choice(outcome="error", process=process, reason=reason)
    if isinstance(made, Rejection):
        return agree.Choice(outcome="xla", process=process, reason=made.reason)
    if made is None:
        return agree.Choice(outcome="xla", process=process, reason="no compiler")
    if isinstance(made, str):
        return agree.Choice(outcome="kernel", process=process, digest=made)
    found, kernel = made
    return agree.Choice(
        outcome="kernel",
        process=process,
        form=found.candidate.form.name,
        template=found.candidate.template.name,
        config=found.candidate.config.text,
        digest=kernel.digest,
        call=follow.call_digest(kernel),
        provenance=found.provenance,
        saved_us=found.saved_us,
    )


def _refusal(choice: agree.Choice) -> Rejection | None:
    """None where a kernel was chosen; raises what the process that chose had raised."""
    if choice.outcome == "kernel":
        return None
    if choice.outcome == "xla":
        return Rejection(choice.reason)
    reason = f"process {choice.process}: {choice.reason}"
    raise Missing(reason) if choice.outcome == "missing" else CompileError(reason)


@contextlib.contextmanager
def _following(choice: agree.Choice, name: str) -> Iterator[None]:
    """Whatever fails here must not put this process on another path than the rest."""
    try:
        yield
    except Exception as error:
        raise agree.Disagreement(
            f"{name}: process {choice.process} chose a kernel for all processes, and "
            f"this one cannot run it: {explain_failure(error)}. All need the same "
            "version of jax_bolt, of nvcc and of the GPU; those that share a cache_dir "
            "with it need no nvcc",
            getattr(error, "log", ""),
        ) from error


def explain_failure(error: Exception) -> str:
    """One line for a warning: what failed, without a compiler's log."""
    if isinstance(error, CompileError):
        hint = '; on_error="raise" shows what the compiler printed'
        return error.message + (hint if error.log else "")
    return str(error) or type(error).__name__
