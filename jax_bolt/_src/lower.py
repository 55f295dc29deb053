# SPDX-License-Identifier: Apache-2.0
"""The CUDA lowering rules: custom calls, pools in two passes, or XLA's own path.

Nothing that fails here breaks the user's program: a site is lowered through its
reference jaxpr, casts as themselves, and one warning says why, unless
``on_error="raise"``.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import lax

from . import agree, cast, chain, compat, forms, held, invoke, passes, resolve
from . import pool as pools
from .compat import ClosedJaxpr, JaxprEqn, mlir
from .errors import UnsupportedError
from .forms import ChainForm, Form
from .launches import Launches, Promise, Roles
from .options import Options
from .plan import Plan, Rejection
from .primitive import (
    Family,
    SiteInfo,
    bolt_call_p,
    lower_reference,
    reference_fun,
)
from .sequence import bolt_sequence_p, lower_calls
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
    kernel = held.early(kernel, [{"site": site, **params}])
    shape = ctx.avals_out[0].shape

    def region(*operands: Any) -> list[Any]:
        # The name that profiles and XLA's metadata show (contract 11).
        with jax.named_scope(site.label):
            return invoke.call(kernel, *_roles(site, kernel.form, operands), shape)

    def on_xla() -> Any:
        return lower_reference(ctx, *args, site=site, **params)

    what = f"{site.name} ({site.label}) runs"
    return _lowered(ctx, args, region, options, what, on_xla)


def _lowered(
    ctx: mlir.LoweringRuleContext,
    args: Sequence[Any],
    fun: Callable[..., list[Any]],
    options: Options,
    what: str,
    on_xla: Callable[[], Any],
) -> Any:
    """``fun`` of ``args``; ``on_xla`` where it cannot be made, and ``what`` is said."""
    try:
        return mlir.lower_fun(fun, multiple_results=True)(ctx, *args)
    except Exception as error:  # a form cannot split an axis that is sharded, say
        if options.on_error == "raise":
            raise
        _warn(what, error)
        return on_xla()


def _lower_sequence_cuda(
    ctx: mlir.LoweringRuleContext,
    *args: Any,
    calls: ClosedJaxpr,
    family: Family,
    options: Options,
) -> Any:
    steps = _steps(ctx, calls, family, options)

    def run(*operands: Any) -> list[Any]:
        values: dict[Any, Any] = dict(zip(calls.jaxpr.invars, operands, strict=True))
        launches = Launches()

        def flush(index: int) -> None:
            """Makes the launches before step ``index``."""
            if not len(launches):
                return
            promises = {v: p for v, p in values.items() if isinstance(p, Promise)}
            later = [eqn for step in steps[index:] for eqn in step.eqns]
            read = {v for eqn in later for v in eqn.invars}
            read.update(calls.jaxpr.outvars)
            ends = (steps[index - len(launches)].eqns[0], steps[index - 1].eqns[-1])
            names = dict.fromkeys(eqn.params["site"].name for eqn in ends)
            # The names that profiles and XLA's metadata show (contract 11).
            with jax.named_scope(" to ".join(names)):
                made = launches.launch([p for v, p in promises.items() if v in read])
            values.update({v: made.get(p) for v, p in promises.items()})

        for index, step in enumerate(steps):
            kernel = step.kernel if step.joins else None
            if kernel is None or not launches.takes(kernel, *step.products(values)):
                flush(index)
            with jax.named_scope(step.label):
                values.update(step.run(launches, values))
            if step.is_pooled_after:
                flush(index + 1)
                with jax.named_scope(step.label):
                    values.update(step.pooled(values))
        flush(len(steps))
        return [values[v] for v in calls.jaxpr.outvars]

    def on_xla() -> Any:
        return lower_calls(ctx, *args, calls=calls)

    names = [eqn.params["site"].name for eqn in calls.jaxpr.eqns]
    return _lowered(ctx, args, run, options, f"{names[0]} to {names[-1]} run", on_xla)


def _roles(site: SiteInfo, form: Form | None, operands: Sequence[Any]) -> Roles:
    """A call's operands by role, its right one ready where it was made for ``form``."""
    lhs, rhs, sides, vectors = measure.split(site, operands)
    if form is not None and site.ready == forms.whole(form.name):
        rhs = forms.Ready(rhs, operands[-1])
    return lhs, rhs, sides, vectors


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """A call of a sequence and its kernel, or None for XLA; of a chain several."""

    eqns: tuple[JaxprEqn, ...]
    kernel: invoke.AnyExecutable | None

    @property
    def joins(self) -> bool:
        """Whether it is one of the launches of a custom call.

        Of a part XLA computes the rest, which ends the custom call anyway.
        """
        return self.kernel is not None and self.kernel.form.part is None

    @property
    def is_pooled_after(self) -> bool:
        """Whether it ends its custom call, and XLA pools what it stored."""
        return self.kernel is not None and self.kernel.form.pool is not None

    def pooled(self, values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        """What XLA makes of the call's result."""
        assert isinstance(self.kernel, invoke.Executable)
        ((out,),) = (eqn.outvars for eqn in self.eqns)
        made = invoke.pooled(self.kernel, values[out])
        return [(out, made.reshape(compat.aval_of(out).shape))]

    @property
    def label(self) -> str:
        return " to ".join(eqn.params["site"].label for eqn in self.eqns)

    def roles(self, values: Mapping[Any, Any]) -> list[Roles]:
        """The operands of each call; None for what the step itself makes."""
        form = None if self.kernel is None else self.kernel.form
        each = form.forms if isinstance(form, ChainForm) else (form,)
        return [
            _roles(eqn.params["site"], form, [values.get(v) for v in eqn.invars])
            for eqn, form in zip(self.eqns, each, strict=True)
        ]

    def products(self, values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
        """The left and the right operand of each call."""
        return [(lhs, rhs) for lhs, rhs, *_ in self.roles(values)]

    def run(
        self, launches: Launches, values: Mapping[Any, Any]
    ) -> list[tuple[Any, Any]]:
        """What is made of each variable that others may read."""
        sites = [eqn.params["site"] for eqn in self.eqns]
        shapes = [site.out_avals[0].shape for site in sites]
        outvars = [v for eqn in self.eqns for v in eqn.outvars]
        if self.kernel is None:
            inputs = [values[v] for v in self.eqns[0].invars]
            made = reference_fun(sites[0].reference)(*inputs)
        elif isinstance(self.kernel, invoke.ChainExecutable):
            made = launches.add_chain(self.kernel, self.roles(values), shapes)
            outvars = outvars[-len(made) :]
        else:
            shape, call = shapes[0], launches.add if self.joins else invoke.call
            if self.is_pooled_after:
                region = self.kernel.form.region
                shape = (region.stored_rows, region.problem.channels)
            made = call(self.kernel, *self.roles(values)[0], shape)
        return list(zip(outvars, made, strict=True))


def _steps(
    ctx: mlir.LoweringRuleContext, calls: ClosedJaxpr, family: Family, options: Options
) -> list[_Step]:
    """The calls in order, and what runs each; a chain at its place."""
    eqns = calls.jaxpr.eqns
    kernels = [
        _kernel_or_none(ctx, eqn.params["site"], family, options) for eqn in eqns
    ]
    chains = _chains(ctx, calls, family, options)
    places = {each.place: (each, kernel) for each, kernel in chains}
    inside = {i for each, _ in chains for i in each.calls}
    steps: list[_Step] = []
    for index, (eqn, kernel) in enumerate(zip(eqns, kernels, strict=True)):
        if index in places:
            each, joint = places[index]
            steps.append(_step(joint, *(eqns[i] for i in each.calls)))
        elif index not in inside:
            steps.append(_step(kernel, eqn))
    return steps


def _step(kernel: invoke.AnyExecutable | None, *eqns: JaxprEqn) -> _Step:
    if kernel is not None:
        kernel = held.early(kernel, [eqn.params for eqn in eqns])
    return _Step(eqns, kernel)


def _chains(
    ctx: mlir.LoweringRuleContext, calls: ClosedJaxpr, family: Family, options: Options
) -> list[tuple[chain.Chained, invoke.AnyExecutable]]:
    """What runs as one kernel: of all that is faster the best together."""
    if chain.NAME in options.disable:
        return []
    found = chain.chains_of(calls)
    infos = [each.info for each in found]
    faster: list[tuple[chain.Chained, Plan, invoke.AnyExecutable]] = []
    for each in found:
        try:
            made = _resolved(
                ctx,
                lambda *where, info=each.info: resolve.resolve_chain(
                    info, family, infos, options, *where
                ),
                f"{each.info} is not one kernel",
            )
        except _FATAL:
            raise
        except Exception as error:  # its sites have kernels of their own
            if options.on_error == "raise":
                raise
            what = f"{each.info.name}, which could be one kernel, runs"
            _warn(what, error, "several")
            continue
        if made is not None:
            faster.append((each, *made))
    those = [each for each, *_ in faster]
    savings = chain.whole(those, [made.saved_us for _, made, _ in faster])
    chosen = chain.best(those, savings)
    return [(each, kernel) for each, _, kernel in faster if each in chosen]


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
    found = _resolved(
        ctx,
        lambda *where: resolve.resolve(site, family, options, *where),
        f"{site} runs on XLA",
    )
    if found is None:
        return None
    kernel = found[1]
    assert isinstance(kernel, invoke.Executable)
    return kernel


def _resolved(
    ctx: mlir.LoweringRuleContext, ask: Callable[..., resolve.Resolution], without: str
) -> tuple[Plan, invoke.AnyExecutable] | None:
    """What ``ask`` finds for the device and the program's processes.

    None, and a note of why, where it is refused, which is ``without``.
    """
    reason = None
    device = compat.cuda_device()
    if compat.device_count(ctx) > 1:
        # XLA would gather the operands of a call it cannot partition.
        reason = "the program is partitioned over several devices by XLA"
    elif device is None:
        reason = "no CUDA device in this process to plan for"
    if reason is None:
        processes = compat.program_processes(ctx)
        found = ask(device, processes)
        if not isinstance(found, Rejection):
            return found
        reason = found.reason
    logger.info("%s: %s", without, reason)
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


def _warn(what: str, error: Exception, on: str = "XLA") -> None:
    """Once per reason: one missing compiler is one warning, not fifty."""
    reason = resolve.explain_failure(error)
    with _warned_lock:
        if reason in _warned:
            return
        _warned.add(reason)
    warnings.warn(f"jax_bolt: {what} on {on}: {reason}", stacklevel=2)


mlir.register_lowering(bolt_call_p, _lower_cuda, platform="cuda")
mlir.register_lowering(bolt_sequence_p, _lower_sequence_cuda, platform="cuda")
mlir.register_lowering(cast.bolt_cast_p, _lower_cast_cuda, platform="cuda")
mlir.register_lowering(pools.bolt_pool_p, _lower_pool_cuda, platform="cuda")
