# SPDX-License-Identifier: Apache-2.0
"""The CUDA lowering rules: custom calls, pools in two passes, or XLA's own path.

Nothing that fails here breaks the user's program: a site is lowered through its
reference jaxpr, casts as themselves, and one warning says why, unless
``on_error="raise"``.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from . import agree, cast, compat, invoke, passes, resolve
from . import pool as pools
from .chain import Chain, Promise
from .compat import ClosedJaxpr, mlir
from .errors import UnsupportedError
from .options import Options
from .plan import Rejection
from .primitive import (
    Family,
    SiteInfo,
    bolt_call_p,
    lower_reference,
    reference_fun,
)
from .sequence import bolt_sequence_p
from .tune import measure

logger = logging.getLogger(__name__)

# XLA's own path is no way out of these.
_FATAL = (resolve.Missing, agree.Disagreement)

_warned: set[str] = set()
_warned_lock = threading.Lock()


def _lower_cuda(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    site: SiteInfo,
    family: Family,
    options: Options,
    **params: Any,
) -> Any:
    kernel = _kernel_or_none(ctx, site, family, options)
    if kernel is None:
        return lower_reference(ctx, *args, site=site, **params)
    shape = ctx.avals_out[0].shape

    def region(*operands: Any) -> list[Any]:
        # The name that profiles and XLA's metadata show (contract 11).
        with jax.named_scope(site.label):
            return invoke.call(kernel, *measure.split(site, operands), shape)

    return mlir.lower_fun(region, multiple_results=True)(ctx, *args)


def _lower_sequence_cuda(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    calls: ClosedJaxpr,
    family: Family,
    options: Options,
) -> Any:
    eqns = calls.jaxpr.eqns
    kernels = [
        _kernel_or_none(ctx, eqn.params["site"], family, options) for eqn in eqns
    ]

    def run(*operands: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(calls.jaxpr.invars, operands, strict=True))
        chain = Chain()

        def flush(index: int) -> None:
            """Makes the launches before equation ``index``."""
            if not len(chain):
                return
            promises = {v: p for v, p in values.items() if isinstance(p, Promise)}
            read = {v for eqn in eqns[index:] for v in eqn.invars}
            read.update(calls.jaxpr.outvars)
            ends = (eqns[index - len(chain)], eqns[index - 1])
            names = dict.fromkeys(eqn.params["site"].name for eqn in ends)
            # The names that profiles and XLA's metadata show (contract 11).
            with jax.named_scope(" to ".join(names)):
                made = chain.launch([p for v, p in promises.items() if v in read])
            values.update({v: made.get(p) for v, p in promises.items()})

        for index, (eqn, kernel) in enumerate(zip(eqns, kernels, strict=True)):
            site = eqn.params["site"]
            lhs, rhs, *_ = measure.split(site, [values[v] for v in eqn.invars])
            # Of a part XLA computes the rest, which ends the custom call anyway.
            joins = kernel is not None and kernel.form.part is None
            if kernel is None or not joins or not chain.takes(kernel, lhs, rhs):
                flush(index)
            inputs = [values[v] for v in eqn.invars]
            with jax.named_scope(site.label):
                if kernel is None:
                    made = reference_fun(site.reference)(*inputs)
                else:
                    run = chain.add if joins else invoke.call
                    roles = measure.split(site, inputs)
                    made = run(kernel, *roles, site.out_avals[0].shape)
            values.update(zip(eqn.outvars, made, strict=True))
        flush(len(eqns))
        return [values[v] for v in calls.jaxpr.outvars]

    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


def _kernel_or_none(
    ctx: mlir.LoweringRuleContext, site: SiteInfo, family: Family, options: Options
) -> invoke.Executable | None:
    try:
        return _kernel(ctx, site, family, options)
    except _FATAL:
        raise
    except Exception as error:  # whatever it is, XLA's own path still works
        if options.on_error == "raise":
            raise
        _warn(f"{site.name} ({site.label}) runs", error)
        return None


def _kernel(
    ctx: mlir.LoweringRuleContext, site: SiteInfo, family: Family, options: Options
) -> invoke.Executable | None:
    reason = None
    device = compat.cuda_device()
    if compat.device_count(ctx) > 1:
        # XLA would gather the operands of a call it cannot partition.
        reason = "the program is partitioned over several devices by XLA"
    elif device is None:
        reason = "no CUDA device in this process to plan for"
    if reason is None:
        processes = compat.program_processes(ctx)
        found = resolve.resolve(site, family, options, device, processes)
        if not isinstance(found, Rejection):
            return found[1]
        reason = found.reason
    logger.info("%s runs on XLA: %s", site, reason)
    return None


def _lower_cast_cuda(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    dtype: Any,
    readers: Sequence[Sequence[SiteInfo]],
    family: Family,
    options: Options,
) -> Any:
    """One kernel for what kernels read; other casts XLA may fuse with their readers."""

    def read_by_kernels(sites: Sequence[SiteInfo]) -> bool:
        try:
            return all(_kernel(ctx, site, family, options) for site in sites)
        except _FATAL:
            raise
        except Exception:  # the site's own lowering says so
            return False

    digest = None
    ours = [i for i, sites in enumerate(readers) if read_by_kernels(sites)]
    try:
        if len(ours) > 1:
            digest = resolve.cast_kernel(
                str(dtype),
                options,
                compat.cuda_device(),
                family,
                compat.program_processes(ctx),
            )
    except _FATAL:
        raise
    except Exception as error:  # as in _lower_cuda
        if options.on_error == "raise":
            raise
        _warn("casts run", error)
    if digest is None:
        return cast.lower_casts(ctx, *args, dtype=dtype)

    def casts(*values: Any) -> list[Any]:
        with jax.named_scope("cast"):
            launched = invoke.cast(digest, [values[i] for i in ours], dtype)
        results = dict(zip(ours, launched, strict=True))
        return [
            results[i] if i in results else lax.convert_element_type(value, dtype)
            for i, value in enumerate(values)
        ]

    return mlir.lower_fun(casts, multiple_results=True)(ctx, *args)


def _lower_pool_cuda(
    ctx: mlir.LoweringRuleContext,
    operand: Any,
    *,
    pool: pools.PoolInfo,
    reference: ClosedJaxpr,
) -> Any:
    if not _pays_in_two(ctx, pool):
        return lower_reference(ctx, operand, reference=reference)

    def passes_(x: Any) -> list[Any]:
        return pools.in_two_passes(reference, pool, x)

    return mlir.lower_fun(passes_, multiple_results=True)(ctx, operand)


def _pays_in_two(ctx: mlir.LoweringRuleContext, pool: pools.PoolInfo) -> bool:
    device = compat.cuda_device()
    # XLA partitions the one it was given; two would exchange their edges twice.
    if device is None or compat.device_count(ctx) > 1:
        return False
    try:
        return passes.two_pay(pool.window, resolve.board_of(device))
    except UnsupportedError:
        return False


def _warn(what: str, error: Exception) -> None:
    """Once per reason: one missing compiler is one warning, not fifty."""
    reason = resolve.explain_failure(error)
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(f"jax_bolt: {what} on XLA: {reason}", stacklevel=2)


mlir.register_lowering(bolt_call_p, _lower_cuda, platform="cuda")
mlir.register_lowering(bolt_sequence_p, _lower_sequence_cuda, platform="cuda")
mlir.register_lowering(cast.bolt_cast_p, _lower_cast_cuda, platform="cuda")
mlir.register_lowering(pools.bolt_pool_p, _lower_pool_cuda, platform="cuda")
