# SPDX-License-Identifier: Apache-2.0
"""Functions and their arguments: which are static, and what is wrong with them.

A message names the value at fault, cut short, and says how to write it instead.
"""

from __future__ import annotations

import functools
import inspect
import operator
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])

_SCALARS = (bool, int, float, complex)
_POSITIONAL = (
    inspect.Parameter.POSITIONAL_ONLY,
    inspect.Parameter.POSITIONAL_OR_KEYWORD,
)

_OF_NAMES = (
    "give positions: {}_argnums=..., which count for arguments passed by name, too"
)
_OF_JIT = "jax.jit takes it: jax.jit({call}, {name}=...)"
# What ``jax.jit`` takes and we do not -> what to write instead.
_INSTEAD = {
    "static_argnames": _OF_NAMES.format("static")
    + "; one that has no position is set before, by functools.partial(f, name=...)",
    "donate_argnames": _OF_NAMES.format("donate"),
    **dict.fromkeys(("in_shardings", "out_shardings"), _OF_JIT),
}
# Names that a function's own keyword may have.
_COMMON = dict.fromkeys(
    ("keep_unused", "device", "backend", "inline", "compiler_options"), _OF_JIT
)


def positions(fun: Callable[..., Any]) -> dict[str, int]:
    """The positions of the arguments that may be passed either way."""
    both = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return {p.name: i for i, p in enumerate(_parameters(fun)) if p.kind == both}


def names(fun: Callable[..., Any]) -> list[str]:
    """Of the arguments that have a position each."""
    return [p.name for p in _parameters(fun) if p.kind in _POSITIONAL]


def _parameters(fun: Callable[..., Any]) -> Iterable[inspect.Parameter]:
    try:
        return inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # a function of C's may have no signature
        return ()


def within(positions: Sequence[int], args: Sequence[Any]) -> list[int]:
    """Those of ``positions`` that ``args`` reach, counted from the start."""
    return [i % len(args) for i in positions if -len(args) <= i < len(args)]


def without_static(args: Sequence[Any], static: Sequence[int]) -> tuple[Any, ...]:
    indices = within(static, args)
    return tuple(arg for i, arg in enumerate(args) if i not in indices)


def argnums(value: int | Sequence[int]) -> tuple[int, ...]:
    numbers = value if isinstance(value, Iterable) else (value,)
    try:
        return tuple(operator.index(number) for number in numbers)
    except TypeError:
        raise TypeError(
            "static_argnums and donate_argnums are positions of arguments, such as 1 "
            f"or (0, 2), not {value!r}"
        ) from None


def check_reached(
    given: Mapping[str, Sequence[int]], fun: Callable[..., Any], frozen: int
) -> None:
    """ValueError where one of ``given`` is no position that ``fun`` has.

    They count what follows its first ``frozen`` arguments.
    """
    parameters = list(_parameters(fun))
    if not parameters or any(p.kind == p.VAR_POSITIONAL for p in parameters):
        return
    count = sum(p.kind in _POSITIONAL for p in parameters) - frozen
    for name, numbers in given.items():
        if count >= 0 and not all(-count <= i < count for i in numbers):
            raise ValueError(
                f"freeze got {name}={tuple(numbers)}, but only {count} positional "
                "arguments are not frozen; positions begin with 0 at the first of these"
            )


def callable_(fun: Any, call: str) -> Callable[..., Any]:
    """``fun``, if it is a function; TypeError otherwise, with the right ``call``."""
    if is_module(fun):
        net = f"{fun.__name__}(...)" if isinstance(fun, type) else "net"
        raise TypeError(
            f"jax_bolt takes a function of arrays, got {short(fun)}, a module; pass "
            f"{net}.apply, whose first argument is the variables"
        )
    if not callable(fun):
        raise TypeError(
            f"jax_bolt takes a function of arrays, got {short(fun)}; call {call}, "
            "with the function itself"
        )
    return fun


def is_module(fun: Any) -> bool:
    """Whether it has pure functions, ``init`` and ``apply``, but is none itself.

    As Flax's linen modules and Haiku's transformed functions. A linen module that is
    bound to its variables is a function of arrays.
    """
    parts = (getattr(fun, "init", None), getattr(fun, "apply", None))
    if inspect.isroutine(fun) or not all(map(callable, parts)):
        return False
    return getattr(fun, "scope", None) is None


def refusing_jits_own(call: str, *, traces: bool = False) -> Callable[[F], F]:
    """A decorator: TypeError for what ``jax.jit`` takes, and the function does not.

    ``call`` is what ``jax.jit`` would be given. A function that ``traces`` another has
    its keywords, too.
    """
    refused = _INSTEAD if traces else _INSTEAD | _COMMON

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name in refused:
                    instead = refused[name].format(call=call, name=name)
                    raise TypeError(
                        f"{function.__name__} does not take {name}; {instead}"
                    )
            return function(*args, **kwargs)

        return called  # type: ignore[return-value]

    return decorate


def check_leaves(
    label: str,
    value: Any,
    fix: str,
    abstract: bool,
    error: TypeError | None = None,
    apart: str = "pass it apart, as a static argument",
) -> None:
    """Raises TypeError where a leaf of ``value`` is no array.

    Args:
      label: what ``value`` is called.
      fix: what to do where ``value`` is no array; ``apart`` where a part of it is none.
      abstract: whether a shape and dtype are as good as an array.
      error: what was raised because of it.
    """
    numbers = (*_SCALARS, np.ndarray, np.generic)
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        if isinstance(leaf, (jax.Array, *numbers)) or hasattr(leaf, "__jax_array__"):
            continue
        if abstract and hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
            continue
        if isinstance(leaf, jax.ShapeDtypeStruct):
            fix = "call .lower, .explain or jax.eval_shape, for which a shape will do"
        elif path:
            fix = apart
        text = repr(leaf)
        text = text if len(text) < 100 else f"{text[:100]}..."
        raise TypeError(
            f"{label}{jax.tree_util.keystr(path)} is {text} of type "
            f"{type(leaf).__name__}, not an array; pass an array, or {fix}"
        ) from error


def note_scalars(error: TypeError, scalars: Iterable[tuple[str, Any, str]]) -> None:
    """Notes on an error of tracing which Python numbers were traced as arrays.

    ``scalars`` are labels, arguments, and what to do about each.
    """
    if not isinstance(error, jax.errors.JAXTypeError) and "Tracer" not in str(error):
        return
    for label, value, fix in scalars:
        if isinstance(value, _SCALARS):
            note(
                error,
                f"jax_bolt: {label} is {value!r}, which is traced as an array, as by "
                f"jax.jit. If the function has to know its value, {fix}",
            )


def note(error: BaseException, text: str) -> None:
    """Adds it once: an error may pass several functions of ours."""
    if text not in getattr(error, "__notes__", ()):
        error.add_note(text)


class _Short(reprlib.Repr):
    """Arrays by their shapes: their numbers say little, and have to be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxother = 3, 3, 60

    def repr_instance(self, x: Any, level: int) -> str:
        if hasattr(x, "shape") and hasattr(x, "dtype"):
            return f"{x.dtype}[{','.join(map(str, x.shape))}]"
        return super().repr_instance(x, level)


def short(value: Any) -> str:
    """``value`` in at most a line."""
    text = " ".join(_Short().repr(value).split())
    return text if len(text) < 100 else f"{text[:97]}..."
