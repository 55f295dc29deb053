# SPDX-License-Identifier: Apache-2.0
"""The public functions: trace, rewrite, and hand the result to ``jax.jit``."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from . import arch as arch_
from . import compat, options, paths, plan, resolve, rewrite
from . import lower as _lower  # registers the CUDA lowering rule  # noqa: F401
from .arch import GpuArch
from .errors import CompileError, UnsupportedError
from .jit import store, toolchain
from .options import OnError, OnMiss, Options
from .plan import Rejection
from .primitive import SiteInfo
from .report import Report, Site
from .rewrite import Rewritten
from .tune import search


class Optimized:
    """A function with its convs and matrix products in fused kernels.

    Calling it behaves like ``jax.jit`` of the original; see ``optimize``.
    """

    def __init__(
        self,
        fun: Callable,
        static_argnums: Sequence[int],
        donate_argnums: Sequence[int],
        changes: dict[str, Any],
    ):
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._static = tuple(static_argnums)
        self._donate = tuple(donate_argnums)
        self._changes = changes
        # An executable is good for the options it was made under.
        self._jitted: dict[Options, Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._jit()(*args, **kwargs)
        except TypeError as error:
            self._explain_bad_argument(args, kwargs, error)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """``jax.stages.Lowered``, as of a jitted function."""
        return self._jit().lower(*args, **kwargs)

    def explain(self, *args: Any, arch: str | None = None, **kwargs: Any) -> Report:
        """See ``jax_bolt.explain``."""
        with options.options(**self._changes):
            return _report(self._rewritten(args, kwargs), arch)

    def tune(
        self,
        *args: Any,
        budget_s: float | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Report:
        """See ``jax_bolt.tune``."""
        with options.options(**self._changes):
            return _tune(self._rewritten(args, kwargs), budget_s, progress)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"jax_bolt.optimize({getattr(self._fun, '__name__', self._fun)!s})"

    def _jit(self) -> Any:
        active = options.current()
        if active not in self._jitted:
            self._jitted[active] = self._make(active)
        return self._jitted[active]

    def _make(self, active: Options) -> Any:
        effective = dataclasses.replace(active, **self._changes)

        def optimized(*args: Any, **kwargs: Any) -> Any:
            traced, tree = compat.make_jaxpr(self._fun, self._static, args, kwargs)
            program = rewrite.rewrite(traced, effective).program
            dynamic = _without_static(args, self._static)
            leaves = jax.tree.leaves((dynamic, kwargs))
            results = compat.jaxpr_as_fun(program)(*leaves)
            return jax.tree.unflatten(tree, results)

        functools.update_wrapper(optimized, self._fun)
        return jax.jit(
            optimized, static_argnums=self._static, donate_argnums=self._donate
        )

    def _rewritten(self, args: Any, kwargs: Any) -> Rewritten:
        traced, _ = compat.make_jaxpr(self._fun, self._static, args, kwargs)
        return rewrite.rewrite(traced, options.current())

    def _explain_bad_argument(self, args: Any, kwargs: Any, error: TypeError) -> None:
        """Raises a clearer error where an argument is no array; else returns."""
        for index, arg in enumerate(args):
            if index in self._static or index - len(args) in self._static:
                continue
            _check_leaves(f"argument {index}", arg, error)
        for name, value in kwargs.items():
            _check_leaves(f"argument {name!r}", value, error)


def _without_static(args: Sequence[Any], static: Sequence[int]) -> tuple[Any, ...]:
    indices = {i % len(args) for i in static if -len(args) <= i < len(args)}
    return tuple(arg for i, arg in enumerate(args) if i not in indices)


def _check_leaves(label: str, value: Any, error: TypeError) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
            continue
        if isinstance(leaf, complex) or hasattr(leaf, "__jax_array__"):
            continue
        where = f"{label}{jax.tree_util.keystr(path)}"
        raise TypeError(
            f"{where} is {leaf!r} of type {type(leaf).__name__}, not an array; pass an "
            "array, or name the argument in static_argnums"
        ) from error


def optimize(
    fun: Callable | None = None,
    *,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    on_miss: OnMiss | None = None,
    on_error: OnError | None = None,
) -> Any:
    """Runs a function's convs and matrix products on kernels fused with what follows.

    The function is traced, its regions (a conv or product and the elementwise work on
    its result) are found, and on a CUDA device each runs on the kernel, or XLA's own
    lowering, that was timed fastest for its shapes. Elsewhere plain JAX runs.

    Args:
      fun: a function of arrays in any pytrees. Without it, a decorator is returned.
      static_argnums, donate_argnums: as for ``jax.jit``.
      on_miss: what to do at a site without a tuning result: "tune" (the default),
        "heuristic", "xla" or "error".
      on_error: "xla" (the default): warn once and run XLA's own path; or "raise".

    Returns:
      A callable that behaves as ``jax.jit(fun)`` does, inside and outside ``jit``,
      ``grad``, ``vmap``, ``scan`` and ``shard_map``, with ``.explain(*args)``,
      ``.tune(*args)`` and ``.lower(*args)``. ``grad`` and ``vmap`` of it run plain
      JAX at the sites; ``optimize(grad(f))`` keeps the kernels.

    Raises:
      TypeError: ``fun`` is not callable, or (when called) an argument is no array.
      ValueError: a bad ``on_miss`` or ``on_error``.
    """
    given = {"on_miss": on_miss, "on_error": on_error}
    changes = {name: value for name, value in given.items() if value is not None}
    dataclasses.replace(Options(), **changes)  # raises on a bad value
    static, donate = _argnums(static_argnums), _argnums(donate_argnums)
    if fun is None:
        return lambda f: Optimized(_callable(f), static, donate, changes)
    return Optimized(_callable(fun), static, donate, changes)


def explain(
    fun: Callable,
    *args: Any,
    arch: str | None = None,
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> Report:
    """What ``optimize(fun)`` makes of these arguments; runs nothing, needs no GPU.

    Args:
      fun: the function, plain or optimized.
      args, kwargs: its arguments; arrays or ``jax.ShapeDtypeStruct``.
      arch: the architecture to plan for, such as "sm_90a"; by default that of the
        GPU JAX sees, or none.

    Raises:
      UnsupportedError: an unknown ``arch``.
    """
    if not isinstance(fun, Optimized):
        fun = Optimized(_callable(fun), _argnums(static_argnums), (), {})
    return fun.explain(*args, arch=arch, **kwargs)


def tune(
    fun: Callable,
    *args: Any,
    budget_s: float | None = None,
    progress: bool = True,
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> Report:
    """Tunes and compiles, ahead of time, everything ``fun`` needs for these arguments.

    Args:
      fun: the function, plain or optimized.
      args, kwargs: its arguments; arrays or ``jax.ShapeDtypeStruct``.
      budget_s: seconds it may take; what is not reached stays with XLA.
      progress: whether to show a progress bar on a terminal.

    Raises:
      UnsupportedError: there is no CUDA device, or not one with kernels.
      CompileError: no CUDA compiler was found.
    """
    if not isinstance(fun, Optimized):
        fun = Optimized(_callable(fun), _argnums(static_argnums), (), {})
    return fun.tune(*args, budget_s=budget_s, progress=progress, **kwargs)


def clear_cache() -> None:
    """Empties the user's kernel and tuning stores; raises CacheError where it cannot."""
    active = options.current()
    store.Store(paths.kernel_root(active)).clear()
    shutil.rmtree(paths.tuning_root(active), ignore_errors=True)
    resolve.failures.clear()


def _callable(fun: Any) -> Callable:
    if not callable(fun):
        raise TypeError(f"optimize takes a function, got {fun!r}")
    return fun


def _argnums(value: int | Sequence[int]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _tune(rewritten: Rewritten, budget_s: float | None, progress: bool) -> Report:
    active = options.current()
    if budget_s is not None:
        active = dataclasses.replace(active, budget_s=budget_s)
    device = compat.cuda_device()
    if device is None:
        raise UnsupportedError(
            "tuning needs a CUDA device, and JAX sees none; jax_bolt.explain works "
            "without one"
        )
    target = resolve.target_for(device, active)
    resolve.tune_missing(rewritten.family.sites, target, active, progress)
    return _report(rewritten, None)


def _report(rewritten: Rewritten, name: str | None) -> Report:
    active = options.current()
    arch = arch_.from_name(name) if name is not None else _local_arch()
    sources = _sources(active)
    sites = [
        Site(
            name=refusal.name,
            line=refusal.line,
            root=refusal.primitive,
            reason=refusal.reason,
            kernel="xla",
            provenance="xla",
        )
        for refusal in rewritten.refusals
    ]
    sites += [_site(s, arch, active, sources) for s in rewritten.family.sites]
    return Report(tuple(sites), arch.name if arch else "", store.stats())


def _site(
    site: SiteInfo, arch: GpuArch | None, active: Options, sources: str
) -> Site:
    base = Site(
        name=site.name,
        line=site.line,
        root=site.root,
        problem=site.region.problem.text,
        epilogue=site.label,
        region=site.region,
        fused=True,
    )
    if arch is None:
        return base
    made = resolve.stored(site.region, arch, active, sources)
    if made is None:
        made = plan.heuristic(site.region, arch, active.disable)
    failed = resolve.failure(arch, site.region)
    if failed is not None:
        made = Rejection(failed)
    entry = made.entry
    if entry is not None:
        base = dataclasses.replace(
            base,
            time_us=entry.time_us,
            xla_time_us=entry.xla_time_us,
            error=entry.error,
            xla_error=entry.xla_error,
        )
    if isinstance(made, Rejection):
        return dataclasses.replace(
            base, reason=made.reason, kernel="xla", provenance="xla"
        )
    return dataclasses.replace(
        base, kernel=made.candidate.text, provenance=made.provenance
    )


def _local_arch() -> GpuArch | None:
    device = compat.cuda_device()
    return None if device is None else resolve.arch_of(device)


def _sources(active: Options) -> str:
    """The headers' key of the tuning results; none match without a toolchain."""
    try:
        return search.sources_key(toolchain.find(active))
    except CompileError:
        return ""

