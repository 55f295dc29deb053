# SPDX-License-Identifier: Apache-2.0
"""The CUDA lowering rules: custom calls, or XLA's own path.

Nothing that fails here breaks the user's program: the site is lowered through its
reference jaxpr and one warning says why, unless ``on_error="raise"``.
"""

from __future__ import annotations

import logging
import threading
import warnings
from typing import Any

import jax

from . import compat, invoke, resolve
from .chain import Chain, Promise
from .compat import ClosedJaxpr, mlir
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

    def region(*operands: Any) -> Any:
        # The name that profiles and XLA's metadata show (contract 11).
        with jax.named_scope(site.label):
            return invoke.call(kernel, *measure.split(site, operands), shape)

    return mlir.lower_fun(region, multiple_results=False)(ctx, *args)


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
            read = {v for eqn in eqns[index:] for v in eqn.invars}
            read.update(calls.jaxpr.outvars)
            promises = {v: p for v, p in values.items() if isinstance(p, Promise)}
            if chain:
                made = chain.launch([p for v, p in promises.items() if v in read])
                values.update({v: made.get(p) for v, p in promises.items()})

        for index, (eqn, kernel) in enumerate(zip(eqns, kernels, strict=True)):
            site = eqn.params["site"]
            (result,) = eqn.outvars
            # The name that profiles and XLA's metadata show (contract 11).
            with jax.named_scope(site.label):
                if kernel is None:
                    flush(index)
                    inputs = [values[v] for v in eqn.invars]
                    values[result] = reference_fun(site.reference)(*inputs)
                    continue
                inputs = [values[v] for v in eqn.invars]
                lhs, rhs, *_ = measure.split(site, inputs)
                if not chain.takes(kernel, lhs, rhs):
                    flush(index)
                    inputs = [values[v] for v in eqn.invars]
                roles = measure.split(site, inputs)
                values[result] = chain.add(kernel, *roles, site.out_aval.shape)
        flush(len(eqns))
        return [values[v] for v in calls.jaxpr.outvars]

    return mlir.lower_fun(run, multiple_results=True)(ctx, *args)


def _kernel_or_none(
    ctx: mlir.LoweringRuleContext, site: SiteInfo, family: Family, options: Options
) -> invoke.Executable | None:
    try:
        return _kernel(ctx, site, family, options)
    except resolve.Missing:
        raise
    except Exception as error:  # whatever it is, XLA's own path still works
        if options.on_error == "raise":
            raise
        _warn(site, resolve.explain_failure(error))
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
        found = resolve.resolve(site, family, options, device)
        if not isinstance(found, Rejection):
            return found[1]
        reason = found.reason
    logger.info("%s runs on XLA: %s", site, reason)
    return None


def _warn(site: SiteInfo, reason: str) -> None:
    """Once per reason: one missing compiler is one warning, not fifty."""
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(
        f"jax_bolt: {site.name} ({site.label}) runs on XLA: {reason}", stacklevel=2
    )


mlir.register_lowering(bolt_call_p, _lower_cuda, platform="cuda")
mlir.register_lowering(bolt_sequence_p, _lower_sequence_cuda, platform="cuda")
