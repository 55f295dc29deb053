# SPDX-License-Identifier: Apache-2.0
"""A kernel that another process of the program chose → the same one, loaded here.

Everything that the program's text says of it has to come out the same, or is an error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from . import agree, plan
from .agree import Choice, Group
from .arch import GpuArch
from .chain import AnySite
from .errors import CompileError
from .invoke import AnyExecutable
from .plan import AnyCandidate, Plan, Provenance
from .tune.target import Target, executable


def question(about: AnySite | str, device: Any) -> str:
    """What processes agree on: the kernel of a site's region, or of something else."""
    # The device by what JAX says of it: the question must not depend on anything that
    # can fail in one process, such as the native module or the compiler.
    text = about if isinstance(about, str) else about.region.text
    return f"{device.device_kind} {device.compute_capability}: {text}"


def call_digest(kernel: AnyExecutable) -> str:
    """Over what a program's text says of a kernel beyond its region."""
    parts = (
        *(kernel.digest, kernel.form.name, kernel.workspace_bytes),
        *(kernel.recipe, kernel.held_recipe),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def kernel(
    site: AnySite,
    together: Sequence[AnySite],
    choice: Choice,
    group: Group,
    target: Target,
) -> tuple[Plan, AnyExecutable]:
    """The kernel that was chosen; raises CompileError where it would be another.

    ``together`` are the sites whose kernels are compiled with it.
    """
    candidate = named(site, choice, target.arch)
    if candidate is None:
        names = f"{choice.template} {choice.config} ({choice.form})"
        raise CompileError(f"there is no {names} here")

    def others() -> list[str]:
        """What else was chosen for this program: compilers run in parallel."""
        sources = []
        for other in together:
            known = agree.known(group, question(other, target.device))
            if known is not None and known.outcome == "kernel":
                found = named(other, known, target.arch)
                sources += [] if found is None else [found.source]
        return sources

    path = artifact(choice.digest, candidate.source, target, others)
    made = executable(site.region, candidate, choice.digest, path, target)
    if call_digest(made) != choice.call:
        raise CompileError("it would be launched in another way here")
    made_here = Plan(candidate, provenance(choice), saved_us=choice.saved_us)
    return made_here, made


def named(site: AnySite, choice: Choice, arch: GpuArch) -> AnyCandidate | None:
    return plan.named(site.region, arch, choice.form, choice.template, choice.config)


def provenance(choice: Choice) -> Provenance:
    """As it was in the process that chose."""
    return cast(Provenance, choice.provenance)


def artifact(
    digest: str,
    source: str,
    target: Target,
    others: Callable[[], list[str]] = list,
) -> Path | CompileError:
    """``digest`` from the store, or compiled from ``source``, with ``others``."""
    found = target.kernels.find(digest)
    if found is not None:
        return found
    tools = target.toolchain
    if target.kernels.digest(tools, source, target.arch) != digest:
        raise CompileError(f"nvcc {tools.version} makes another binary of it here")
    sources = [source, *others()]
    return target.kernels.build(tools, sources, target.arch, target.jobs)[digest]
