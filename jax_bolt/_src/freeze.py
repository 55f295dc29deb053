# SPDX-License-Identifier: Apache-2.0
"""``freeze``: what depends on some arguments alone is computed once and kept.

For each signature of the other arguments the function is traced and parted
(``split``). What the frozen arrays decide runs once, as a program of its own; what it
yields (the residuals) is passed to the rest at every call, never compiled into it, so
that the arrays may be replaced and the compiled rest stays.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import api, arguments, options
from .api import Optimized
from .options import OnError, OnMiss, Options

if TYPE_CHECKING:
    from .rewrite import Rewritten
    from .split import Split

logger = logging.getLogger(__name__)

_Signature: TypeAlias = tuple[Any, ...]
_NUMBERS = (bool, int, float, complex)


class Frozen(Optimized):
    """An optimized function of the arguments that are not frozen; see ``freeze``.

    A pytree whose leaves are those of the frozen arguments.
    """

    _MADE_BY = "freeze"

    def __init__(self, function: _Function, frozen: tuple[Any, ...]):
        shared = function.shared
        self._fun = functools.partial(function.fun, *frozen)
        self._static = shared.static
        self._donate = shared.donate
        self._changes = dict(shared.changes)
        self._positions = shared.positions
        self._function = function
        self._frozen = frozen
        self._leaves, self._tree = jax.tree.flatten(frozen)
        self._is_abstract = any(
            isinstance(x, jax.ShapeDtypeStruct) for x in self._leaves
        )
        # For each signature a jitted function and its first arguments.
        self._calls: dict[_Signature, tuple[Any, tuple[Any, ...]]] = {}
        self._active: tuple[Options | None, int] = (None, 0)
        self.__name__ = getattr(function.fun, "__name__", "frozen")
        self.__doc__ = function.fun.__doc__
        self.__wrapped__ = self._fun  # for inspect.signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            run, first = self._bound(args, kwargs)
            return self._run(run, (*first, *args), kwargs)
        except (TypeError, AttributeError) as error:
            self._explain_bad_argument(args, kwargs, error)
            raise

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """``jax.stages.Lowered``, as of a jitted function."""
        try:
            run, first = self._bound(args, kwargs)
            return run.lower(*first, *args, **kwargs)
        except (TypeError, AttributeError) as error:
            self._explain_bad_argument(args, kwargs, error, abstract=True)
            raise

    def replace(self, *frozen_args: Any) -> Frozen:
        """The same function of other frozen arguments, a new checkpoint say.

        Where they have the structure, shapes and dtypes of the old ones, nothing is
        traced or compiled again.

        Raises:
          TypeError: there are more or fewer of them than before, or one is no array.
        """
        if len(frozen_args) != len(self._frozen):
            raise TypeError(
                f"{self!r} has {len(self._frozen)} frozen arguments, not "
                f"{len(frozen_args)}"
            )
        return Frozen(self._function, _arrays(frozen_args))

    def __repr__(self) -> str:
        return f"jax_bolt.freeze({self.__name__})"

    def _rewritten(self, args: Any, kwargs: Any) -> Rewritten:
        try:
            parts = self._part(args, kwargs) if self._may_part() else None
        except (TypeError, AttributeError) as error:
            self._explain_bad_argument(args, kwargs, error, abstract=True)
            raise
        if parts is None:
            return self._function.plain._rewritten((*self._frozen, *args), kwargs)
        return parts.rewritten

    def _explain_bad_argument(
        self, args: Any, kwargs: Any, error: Exception, *, abstract: bool = False
    ) -> None:
        """As of an optimized function, with a note on what is frozen."""
        if isinstance(error, TypeError):
            super()._explain_bad_argument(args, kwargs, error, abstract=abstract)
        if not isinstance(error, jax.errors.JAXTypeError):
            names = arguments.names(self._function.fun)
            names += [f"argument {i}" for i in range(len(names), len(self._frozen))]
            given = zip(names, self._frozen, strict=False)
            text = ", ".join(f"{n} = {arguments.short(x)}" for n, x in given)
            if text:
                text = f"frozen already, and not to be passed again: {text}"
                arguments.note(error, f"{self!r}: {text}")

    def _make_static(self, index: int) -> str:
        others = " (among the arguments that are not frozen)" if self._frozen else ""
        return f"{super()._make_static(index)}{others}"

    def _run(self, run: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except TypeError as error:
            _check(self._frozen, error)
            raise

    def _bound(self, args: Any, kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        signature = self._signature(args, kwargs)
        if signature not in self._calls:
            self._calls[signature] = self._bind(args, kwargs, signature)
        return self._calls[signature]

    def _signature(self, args: Any, kwargs: Any) -> _Signature:
        """What tells apart the calls that are traced apart."""
        from . import compat

        static, others = self._sorted(kwargs)
        dynamic = arguments.without_static(args, self._static)
        leaves, tree = jax.tree.flatten((dynamic, others))
        # Arrays know theirs; to ask JAX takes longer.
        avals = [x.aval if hasattr(x, "aval") else jax.typeof(x) for x in leaves]
        named = [(i, args[i]) for i in arguments.within(self._static, args)]
        named += sorted(static.items())
        # 1 equals True.
        fixed = [(name, type(value), value) for name, value in named]
        # Traced by another program, the kept arrays are what that makes of them.
        hold = compat.is_outermost() and self._is_in_place(leaves)
        active, known = options.current(), self._active
        if active is not known[0]:
            # Hashing the options at every call would cost more than all of this.
            known = self._active = active, self._function.shared.number(active)
        return (tree, *avals, *fixed, known[1], compat.trace_context(), hold)

    def _is_in_place(self, args: Sequence[Any]) -> bool:
        """Whether a call reads the frozen arrays themselves, and not copies of them."""
        from . import compat

        device, committed = self._place
        return device is not None and (committed or compat.runs_on(device, args))

    @functools.cached_property
    def _place(self) -> tuple[Any, bool]:
        """The device of all frozen arrays, None where they are not ready to be read on
        one, and whether a call has to run there."""
        from . import compat

        if self._is_abstract or not self._leaves:
            return None, False
        places = {compat.place_of(x) for x in self._leaves}
        device = places.pop() if len(places) == 1 else None
        committed = any(getattr(x, "committed", False) for x in self._leaves)
        return device, committed

    def _bind(
        self, args: Any, kwargs: Any, signature: _Signature
    ) -> tuple[Any, tuple[Any, ...]]:
        parts = None
        if self._may_part():
            full = (self._tree, *map(jax.typeof, self._leaves), signature)
            known = self._function.shared.parts
            if full not in known:
                known[full] = self._part(args, kwargs, hold=signature[-1])
            parts = known[full]
        if parts is None:
            return self._function.plain, self._frozen
        try:
            values = [*self._leaves, *self._computed(parts.prepare)]
        except Exception:  # a fault of the user's own is one at every call, too
            logger.info("%s: computed at every call", self.__name__, exc_info=True)
            return self._function.plain, self._frozen
        kept = [values[i] for i in parts.split.sources]
        # Held arrays are read without waiting for whatever computes them.
        return parts.run, (jax.block_until_ready(kept) if signature[-1] else kept,)

    def _may_part(self) -> bool:
        from . import compat

        # Ahead of a mapped axis (in shard_map, say) there is no such axis.
        traced = any(isinstance(x, Tracer) for x in self._leaves)
        return not traced and not compat.has_bound_axes()

    def _part(self, args: Any, kwargs: Any, *, hold: bool = False) -> _Parts | None:
        """The function, traced and parted; None where it cannot be parted.

        With ``hold`` what is kept is ready before any call.
        """
        from . import program

        shared, fun, tree = self._function.shared, self._function.fun, self._tree
        static, others = self._sorted(kwargs)

        def whole(leaves: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            return fun(*jax.tree.unflatten(tree, leaves), *args, **static, **kwargs)

        whole.__name__ = self.__name__
        api.stand_for(whole, fun, self, static)
        positions = [i + 1 for i in arguments.within(self._static, args)]
        active = dataclasses.replace(options.current(), **self._changes)
        made = program.parted(
            *(whole, positions, (self._leaves, *args), others, len(self._leaves)),
            active,
            hold=hold,
        )
        if made is None:
            return None
        split, rewritten, out_tree = made
        if not (self._frozen or split.sources or split.rest.consts):
            raise ValueError(
                f"freeze(fun, *arrays): nothing to freeze: {self.__name__} was given "
                "without arrays, and closes over none; name those that stay the same, "
                "or call optimize(fun)"
            )

        def rest(residuals: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
            others = {k: v for k, v in kwargs.items() if k not in static}
            dynamic = arguments.without_static(args, shared.static)
            leaves = [*residuals, *jax.tree.leaves((dynamic, others))]
            return jax.tree.unflatten(out_tree, program.run(rewritten, leaves))

        rest.__name__ = self.__name__
        run = jax.jit(
            rest,
            static_argnums=_shifted(self._static, 1),
            static_argnames=tuple(static),
            donate_argnums=_shifted(self._donate, 1),
        )
        return _Parts(split, rewritten, shared.prepare(split), run)

    def _computed(self, prepare: _Prepare) -> list[Any]:
        if self._is_abstract:
            return prepare.abstract()
        known = self._function.shared.known(self._leaves)
        if prepare not in known:
            # Now, even where the call is being traced.
            with jax.ensure_compile_time_eval():
                known[prepare] = prepare.run(*self._leaves)
        return known[prepare]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Prepare:
    """The program that computes residuals, flat in and out."""

    program: Any
    run: Callable[..., list[Any]]

    def abstract(self) -> list[Any]:
        avals = self.program.out_avals
        return [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class _Parts:
    """One traced signature: ``run`` takes the residuals and the user's arguments."""

    split: Split
    rewritten: Rewritten
    prepare: _Prepare
    run: Any


class _Shared:
    """What does not depend on the frozen arrays themselves.

    It must not hold the function, by which it is found (``_shared``).
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        count: int,
        static: tuple[int, ...],
        donate: tuple[int, ...],
        changes: tuple[tuple[str, Any], ...],
    ):
        self.static = static
        self.donate = donate
        self.changes = changes
        self.positions = arguments.positions(functools.partial(fun, *[None] * count))
        self.parts: dict[_Signature, _Parts | None] = {}
        self._prepares: list[_Prepare] = []
        self._numbers: dict[Options, int] = {}
        self._next = itertools.count()
        self._known: dict[Any, tuple[list[Any], dict[_Prepare, list[Any]]]] = {}

    @property
    def closes_over_arrays(self) -> bool:
        parts = list(self.parts.values())
        return any(p is None or p.split.rest.consts for p in parts)

    def number(self, active: Options) -> int:
        return self._numbers.setdefault(active, next(self._next))

    def prepare(self, split: Split) -> _Prepare:
        """One for all batch sizes, so that they share what it computes."""
        from . import compat
        from .split import same

        for prepare in self._prepares:
            if same(prepare.program, split.prepare):
                return prepare
        run = jax.jit(compat.jaxpr_as_fun(split.prepare))
        self._prepares.append(_Prepare(split.prepare, run))
        return self._prepares[-1]

    def known(self, leaves: Sequence[Any]) -> dict[_Prepare, list[Any]]:
        """What was computed from these very arrays; kept until one of them is gone."""
        key = tuple(repr(x) if isinstance(x, _NUMBERS) else id(x) for x in leaves)
        if key not in self._known:
            refs = [
                weakref.ref(x, lambda _: self._known.pop(key, None))
                for x in leaves
                if not isinstance(x, _NUMBERS)
            ]
            self._known[key] = refs, {}
        return self._known[key][1]


class _Function:
    """A function and what all its ``Frozen`` share."""

    def __init__(self, fun: Callable[..., Any], count: int, shared: _Shared):
        self.fun = fun
        self.shared = shared
        # All arguments are traced, for where the frozen ones are.
        self.plain = Optimized(
            fun,
            _shifted(shared.static, count),
            _shifted(shared.donate, count),
            dict(shared.changes),
        )

    # Part of the pytree's structure, where a function may not be comparable.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self.shared is other.shared

    def __hash__(self) -> int:
        return id(self.shared)


jax.tree_util.register_pytree_node(
    Frozen,
    lambda frozen: (frozen._frozen, frozen._function),
    lambda function, frozen: Frozen(function, tuple(frozen)),
)


@arguments.refusing_jits_own("jax_bolt.freeze(f, *arrays)")
def freeze(
    fun: Callable[..., Any],
    *frozen_args: Any,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    on_miss: OnMiss | None = None,
    on_error: OnError | None = None,
) -> Frozen:
    """Optimizes a function some of whose arguments stay the same from call to call.

    All that depends on the frozen arguments alone, BatchNorm's scale from the running
    statistics or the cast of a filter, is computed once, at the first call, and kept
    on the device; calls only do what is left::

        predict = jax_bolt.freeze(net.apply, variables)
        predict(images)
        predict = predict.replace(new_variables)  # a new checkpoint: nothing compiles

    Args:
      fun: a function of arrays in any pytrees, plain or optimized.
      frozen_args: its first arguments. NumPy arrays are copied; JAX arrays are kept,
        as are the values computed from them for as long as they live.
      static_argnums, donate_argnums: as for ``jax.jit``; positions among the arguments
        that are not frozen.
      on_miss, on_error: as for ``optimize``.

    Returns:
      A callable of the other arguments that gives what ``optimize(fun)`` gives for all
      of them, with ``.replace(*frozen_args)`` and, as of an optimized function,
      ``.explain``, ``.tune`` and ``.lower``. Effects and what they read happen at every
      call. Inside a jitted function the kept values become constants of that function.
      It is also a pytree of its frozen arguments: one that is passed *to* a jitted
      function, differentiated or mapped computes everything at every call, as
      ``optimize`` does; so does one inside ``shard_map``.

    Raises:
      TypeError: ``fun`` is not callable, or an argument is no array.
      ValueError: a bad ``on_miss`` or ``on_error``; a position that there is not; or
        (when called) nothing is frozen, and the function closes over no array.
    """
    changes = api.changed(on_miss, on_error)
    static, donate = map(arguments.argnums, (static_argnums, donate_argnums))
    given = {"static_argnums": static, "donate_argnums": donate}
    if isinstance(fun, Optimized) and not isinstance(fun, Frozen):
        changes = fun._changes | changes
        static += _unfrozen(fun._static, frozen_args, "static")
        donate += _unfrozen(fun._donate, frozen_args, "donated")
        fun = fun._fun
    fun = arguments.callable_(fun, "freeze(fun, *arrays)")
    frozen = _arrays(frozen_args)
    count = len(frozen)
    arguments.check_reached(given, fun, count)
    fixed = (count, static, donate, tuple(sorted(changes.items())))
    return Frozen(_Function(fun, count, _shared(fun, fixed)), frozen)


_all_shared: weakref.WeakKeyDictionary[Any, dict[Any, _Shared]]
_all_shared = weakref.WeakKeyDictionary()


def _shared(fun: Callable[..., Any], fixed: tuple[Any, ...]) -> _Shared:
    """The same for an equal function, unless it closes over arrays.

    Those may have been replaced since, and freezing again is how one would say so.
    """
    owner, name = fun, (None, *fixed)
    if inspect.ismethod(fun):
        # A bound method is made anew whenever it is asked for. It is the same if its
        # object is, by value: identity does not tell that nothing in there changed.
        if type(fun.__self__).__eq__ is object.__eq__:
            return _Shared(fun, *fixed)
        owner, name = fun.__self__, (fun.__func__, *fixed)
    try:
        found = _all_shared.setdefault(owner, {})
        if name not in found or found[name].closes_over_arrays:
            found[name] = _Shared(fun, *fixed)
        return found[name]
    except TypeError:  # not hashable, or nothing can refer to it weakly
        return _Shared(fun, *fixed)


def _arrays(frozen_args: tuple[Any, ...]) -> tuple[Any, ...]:
    _check(frozen_args)
    return jax.tree.map(_array, frozen_args)


def _check(frozen_args: tuple[Any, ...], error: TypeError | None = None) -> None:
    """Raises TypeError where one is no array, nor a shape unless there was an error."""
    fix = "bind it to the function with functools.partial"
    for index, arg in enumerate(frozen_args):
        arguments.check_leaves(
            f"frozen argument {index}", arg, fix, error is None, error
        )


def _array(leaf: Any) -> Any:
    if isinstance(leaf, (np.ndarray, np.generic)) or hasattr(leaf, "__jax_array__"):
        with jax.ensure_compile_time_eval():
            return jnp.array(leaf)
    return leaf


def _unfrozen(
    positions: Sequence[int], frozen: Sequence[Any], what: str
) -> tuple[int, ...]:
    for i in positions:
        if 0 <= i < len(frozen):
            raise TypeError(
                f"argument {i} of the optimized function is {what} and cannot be frozen"
            )
    return _shifted(positions, -len(frozen))


def _shifted(positions: Sequence[int], by: int) -> tuple[int, ...]:
    """Positions among more arguments; negative ones count from the end."""
    return tuple(i + by if i >= 0 else i for i in positions)
