# SPDX-License-Identifier: Apache-2.0
"""The public functions: trace, rewrite, and hand the result to ``jax.jit``.

What does the work is imported with the first call, not with ``jax_bolt``: importing
the package must cost next to nothing (``program`` and all below it do not load).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import jax

from . import arguments, options
from .arguments import argnums, callable_, refusing_jits_own
from .options import OnError, OnMiss, Options

if TYPE_CHECKING:
    from .codesign.advice import Advice
    from .report import Report
    from .rewrite import Rewritten

# What is to be written, in messages.
_OPTIMIZE = "optimize(fun)"
_JITTED = "jax_bolt.optimize(f)"


class Optimized:
    """A function with its convs and matrix products in fused kernels.

    Calling it behaves like ``jax.jit`` of the original; see ``optimize``.
    """

    _MADE_BY = "optimize"

    def __init__(
        self,
        fun: Callable[..., Any],
        static_argnums: Sequence[int],
        donate_argnums: Sequence[int],
        changes: dict[str, Any],
    ):
        functools.update_wrapper(self, fun)
        self._fun = fun
        self._static = tuple(static_argnums)
        self._positions = arguments.positions(fun)
        self._donate = tuple(donate_argnums)
        self._changes = changes
        # An executable is good for the options it was made under.
        self._jitted: dict[Options, Any] = {}
        self._last: tuple[Options, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._jit()(*args, **kwargs)
        except TypeError as error:
            self._explain_bad_argument(args, kwargs, error)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """``jax.stages.Lowered``, as of a jitted function."""
        try:
            return self._jit().lower(*args, **kwargs)
        except TypeError as error:
            self._explain_bad_argument(args, kwargs, error, abstract=True)
            raise

    def explain(self, *args: Any, arch: str | None = None, **kwargs: Any) -> Report:
        """See ``jax_bolt.explain``."""
        from . import program

        with options.options(**self._changes):
            return program.report(self._rewritten(args, kwargs), arch)

    def tune(
        self,
        *args: Any,
        budget_s: float | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Report:
        """See ``jax_bolt.tune``."""
        from . import program

        with options.options(**self._changes):
            return program.tune(self._rewritten(args, kwargs), budget_s, progress)

    def advise(
        self,
        *args: Any,
        arch: str | None = None,
        activations: str | Sequence[str] | None = None,
        budget_s: float | None = None,
        progress: bool = True,
        **kwargs: Any,
    ) -> Advice:
        """See ``jax_bolt.advise``."""
        from .codesign import activation, advise

        given = advise.ACTIVATIONS if activations is None else activations
        names = activation.names(given)
        with options.options(**self._changes):
            rewritten = self._rewritten(args, kwargs)
            return advise.advise(rewritten, arch, names, budget_s, progress)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else functools.partial(self, instance)

    def __repr__(self) -> str:
        return f"jax_bolt.optimize({getattr(self._fun, '__name__', self._fun)!s})"

    def _jit(self) -> Any:
        active = options.current()
        # By identity first: hashing the options costs more than the rest of a call.
        last = self._last
        if last is not None and last[0] is active:
            return last[1]
        if active not in self._jitted:
            self._jitted[active] = self._make(active)
        self._last = (active, self._jitted[active])
        return self._jitted[active]

    def _make(self, active: Options) -> Any:
        effective = dataclasses.replace(active, **self._changes)

        def optimized(*args: Any, **kwargs: Any) -> Any:
            from . import program

            fun, kwargs = self._bind_static(kwargs)
            rewritten, tree = program.trace(fun, self._static, args, kwargs, effective)
            leaves = jax.tree.leaves(
                (arguments.without_static(args, self._static), kwargs)
            )
            return jax.tree.unflatten(tree, program.run(rewritten, leaves))

        functools.update_wrapper(optimized, self._fun)
        return jax.jit(
            optimized, static_argnums=self._static, donate_argnums=self._donate
        )

    def _rewritten(self, args: Any, kwargs: Any) -> Rewritten:
        from . import program

        active = options.current()
        fun, kwargs = self._bind_static(kwargs)
        try:
            return program.trace(fun, self._static, args, kwargs, active)[0]
        except TypeError as error:
            self._explain_bad_argument(args, kwargs, error, abstract=True)
            raise

    def _bind_static(
        self, kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The function with the static ones of ``kwargs`` set, and the other ones."""
        # As jax.jit, which takes the names of static_argnums from the signature.
        static, others = self._sorted(kwargs)
        fun = functools.partial(self._fun, **static) if static else self._fun
        return fun, others

    def _sorted(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The static ones of ``kwargs``, and the other ones."""
        static = {k for k in kwargs if self._positions.get(k) in self._static}
        if not static:
            return {}, kwargs
        others = {k: v for k, v in kwargs.items() if k not in static}
        return {k: kwargs[k] for k in static}, others

    def _explain_bad_argument(
        self, args: Any, kwargs: Any, error: TypeError, *, abstract: bool = False
    ) -> None:
        """Raises a clearer error where an argument is no array; else returns, with a
        note on ``error`` of numbers that were traced.

        ``abstract``: a shape and dtype are as good as an array.
        """
        scalars: list[tuple[str, Any, str]] = []
        for index, arg in enumerate(args):
            if index in self._static or index - len(args) in self._static:
                continue
            label, fix = f"argument {index}", self._make_static(index)
            arguments.check_leaves(label, arg, fix, abstract, error)
            scalars.append((label, arg, fix))
        for name, value in self._sorted(kwargs)[1].items():
            index, label = self._positions.get(name), f"argument {name!r}"
            before = f"set it before: {self._MADE_BY}(functools.partial(f, {name}=...))"
            fix = before if index is None else self._make_static(index)
            # What is static has to be hashable, which no list or dict is.
            arguments.check_leaves(label, value, fix, abstract, error, apart=before)
            scalars.append((label, value, fix))
        arguments.note_scalars(error, scalars)

    def _make_static(self, index: int) -> str:
        """The advice to do so."""
        return f"make it static: static_argnums={index}"


def stand_for(
    traced: Any, fun: Callable[..., Any], rest: Optimized, static: Collection[str]
) -> None:
    """Has what JAX says of ``traced`` name ``fun`` and its arguments.

    ``traced`` takes an argument of ours and then those of ``rest``, which is ``fun``
    without its first ones; those named ``static`` are set.
    """
    first = inspect.Parameter("_frozen", inspect.Parameter.POSITIONAL_ONLY)
    try:
        others = inspect.signature(rest).parameters.values()
        named = [first, *(p for p in others if p.name not in static)]
        signature = inspect.Signature(named)
    except (TypeError, ValueError):  # a function of C's may have none
        return
    while isinstance(fun, functools.partial):
        fun = fun.func
    traced.__wrapped__, traced.__signature__ = fun, signature


@refusing_jits_own(_JITTED)
def optimize(
    fun: Callable[..., Any] | None = None,
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
    changes = changed(on_miss, on_error)
    static, donate = argnums(static_argnums), argnums(donate_argnums)
    if fun is None:
        return lambda f: Optimized(callable_(f, _OPTIMIZE), static, donate, changes)
    return Optimized(callable_(fun, _OPTIMIZE), static, donate, changes)


@refusing_jits_own(_JITTED, traces=True)
def explain(
    fun: Callable[..., Any],
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
    optimized = _optimized(fun, static_argnums, "explain(fun, *args)")
    return optimized.explain(*args, arch=arch, **kwargs)


@refusing_jits_own(_JITTED, traces=True)
def tune(
    fun: Callable[..., Any],
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
    optimized = _optimized(fun, static_argnums, "tune(fun, *args)")
    return optimized.tune(*args, budget_s=budget_s, progress=progress, **kwargs)


@refusing_jits_own(_JITTED, traces=True)
def advise(
    fun: Callable[..., Any],
    *args: Any,
    arch: str | None = None,
    activations: str | Sequence[str] | None = None,
    budget_s: float | None = None,
    progress: bool = True,
    static_argnums: int | Sequence[int] = (),
    **kwargs: Any,
) -> Advice:
    """What ``fun`` would take with other activations, channels and 1x1 convs.

    For whoever designs the model: nothing is changed. On a GPU all of it is tuned and
    measured, as ``tune`` does; without one, or for an ``arch``, the times are estimates
    of the rank model, and say so.

    Args:
      fun: the function, plain or optimized.
      args, kwargs: its arguments; arrays or ``jax.ShapeDtypeStruct``.
      arch: the architecture to estimate for, such as "sm_90a", without measuring; by
        default the GPU JAX sees, which is measured on, or "sm_90a" where there is none.
      activations: names of functions of ``jax.nn`` to try, in one string or several;
        by default "relu,gelu,silu,hard_swish,softplus,mish".
      budget_s: seconds it may take; what is not reached is estimated.
      progress: whether to show a progress bar on a terminal.

    Raises:
      UnsupportedError: an unknown ``arch``, or a GPU without kernels.
      CompileError: there is a GPU to measure on, but no CUDA compiler.
      TypeError: one of ``activations`` is no name.
      ValueError: one of ``activations`` is none of ``jax.nn``.
    """
    optimized = _optimized(fun, static_argnums, "advise(fun, *args)")
    return optimized.advise(
        *args,
        arch=arch,
        activations=activations,
        budget_s=budget_s,
        progress=progress,
        **kwargs,
    )


def check_traceable(fun: Callable[..., Any], args: Sequence[Any]) -> None:
    """Traces ``fun(*args)`` as JAX alone does; raises what is wrong with either."""
    optimized = fun if isinstance(fun, Optimized) else Optimized(fun, (), (), {})
    static = arguments.within(optimized._static, args)
    try:
        jax.make_jaxpr(fun, static)(*args)
    except TypeError as error:
        optimized._explain_bad_argument(args, {}, error, abstract=True)
        raise


def clear_cache() -> None:
    """Empties the user's kernel and tuning stores; CacheError where it cannot."""
    from . import program

    program.clear_cache(options.current())


def changed(on_miss: OnMiss | None, on_error: OnError | None) -> dict[str, Any]:
    """The options that were given; ValueError on a bad value."""
    given = {"on_miss": on_miss, "on_error": on_error}
    changes = {name: value for name, value in given.items() if value is not None}
    dataclasses.replace(Options(), **changes)
    return changes


def _optimized(
    fun: Callable[..., Any], static_argnums: int | Sequence[int], call: str
) -> Optimized:
    if isinstance(fun, Optimized):
        return fun
    return Optimized(callable_(fun, call), argnums(static_argnums), (), {})
