# SPDX-License-Identifier: Apache-2.0
"""Filters that are frozen, put as a kernel wants them ahead of all calls.

A form may rearrange a region's right operand (``forms.py``): pad its channels, say, or
merge its groups. Where the operand does not change from call to call, that is part of
the program before the region, so that ``split.further`` moves it to what is computed
once. The call then has one operand more, which its reference does not read: whatever
does not run the kernel of that form takes the operand as the user has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from . import agree, compat, forms, ir, plan, resolve, results
from .options import Options
from .plan import Plan
from .rewrite import Prepare
from .tune import target as targets


def for_device(options: Options) -> Prepare | None:
    """For the GPU that programs run on; None where there is none."""
    device = compat.cuda_device()
    if device is None:
        return None

    def prepare(
        region: ir.Region, aval: Any
    ) -> tuple[str, Callable[[jax.Array], jax.Array]] | None:
        name = form_of(region, device, options)
        like = aval.shape, aval.dtype
        if name is None or forms.only_views(name, region.problem, *like, right=True):
            return None
        return name, functools.partial(forms.prepare_right, name, region.problem)

    return prepare


def form_of(region: ir.Region, device: Any, options: Options) -> str | None:
    """The form of the kernel that ``region`` runs on, as far as that is known.

    Of several processes each may have other tuning results, and all the same program:
    there only a form that is the only one.
    """
    if agree.group() is None:
        arch = resolve.arch_of(device)
        origin = targets.origin(resolve.tools_for(options))
        known = results.foreseen(region, arch, options, origin)
        if isinstance(known, Plan):
            return forms.whole(known.candidate.form.name)
        failed = results.failure(arch, region)
        if known is not None or failed or options.on_miss != "tune":
            return None
    # By what JAX says of the device, which is the same in every process.
    arch = resolve.board_of(device)
    found, _ = plan.candidates(region, arch, options.disable)
    names = {forms.whole(candidate.form.name) for candidate in found}
    return names.pop() if len(names) == 1 else None
