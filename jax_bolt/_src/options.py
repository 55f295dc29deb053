# SPDX-License-Identifier: Apache-2.0
"""Typed options: a default from ``JAX_BOLT_<NAME>``, changed by ``options(...)``.

The environment is read once, when an option is first needed; ``options`` holds for
the calling thread (and async task) only.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

# Bytes that a name, and a path with what jax_bolt puts below it, may have.
_NAME_MAX, _PATH_MAX = 255, 3800

_NO_OPTIONS = ("REQUIRE", "EXAMPLES")  # the tests' own

OnMiss: TypeAlias = Literal["tune", "heuristic", "xla", "error"]
OnError: TypeAlias = Literal["xla", "raise"]
Warm: TypeAlias = Literal["build", "load", "off"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may choose; hashable. A bad value raises ValueError.

    cache_dir: where kernels and tuning results are kept; None is the user's cache.
    cuda_home: the CUDA toolkit to compile with; None looks for one.
    on_miss: what to do at a site that has no tuning result.
    on_error: what to do at a site whose kernel cannot be used.
    warm: what ``import jax_bolt`` starts in the background, where there is a GPU; only
        the environment variable can change it.
    budget_s: seconds one tuning run may take; None is no bound.
    jobs: compilers run at once; None is one per CPU that the process, or its
        container, may use.
    disable: names of kernel templates that are never used. "cast" keeps the casts of
        parameters apart, and "sequence" the launches of consecutive kernels;
        "auxiliary" leaves each kernel one output, "chain" each site its own kernel, and
        "pool" max-pooling, and means over images, as they are.
    dump_dir: where every traced program is written, as it came, as it was rewritten,
        and its regions; None writes nothing.
    """

    cache_dir: Path | None = None
    cuda_home: Path | None = None
    on_miss: OnMiss = "tune"
    on_error: OnError = "xla"
    warm: Warm = "build"
    budget_s: float | None = None
    jobs: int | None = None
    disable: tuple[str, ...] = ()
    dump_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in _PARSERS:
            value = _parse(name, name, getattr(self, name))
            object.__setattr__(self, name, value)


def current() -> Options:
    """The options in force here; raises ValueError on a bad environment variable."""
    return _active.get() or _environment()


@contextlib.contextmanager
def options(**changes: Any) -> Iterator[Options]:
    """Changes options inside a ``with``; None means "as it was"."""
    unknown = sorted(set(changes) - set(_PARSERS))
    if unknown:
        raise TypeError(f"no option {unknown[0]!r}; there are {', '.join(_PARSERS)}")
    if changes.get("warm") is not None:
        raise TypeError("warm counts when jax_bolt is imported: set JAX_BOLT_WARM")
    given = {name: value for name, value in changes.items() if value is not None}
    token = _active.set(dataclasses.replace(current(), **given))
    try:
        yield current()
    finally:
        _active.reset(token)


@contextlib.contextmanager
def despite_environment() -> Iterator[dict[str, str]]:
    """Leaves out variables that are no options; yields what is wrong, by variable."""
    wrong: dict[str, str] = {}
    read = from_environment(os.environ, wrong)
    token = _active.set(_active.get() or read)
    try:
        yield wrong
    finally:
        _active.reset(token)


def from_environment(
    environ: Mapping[str, str], wrong: dict[str, str] | None = None
) -> Options:
    """Options from ``JAX_BOLT_*`` of ``environ``; an empty variable is an unset one.

    A bad variable raises ValueError or, where ``wrong`` is given, is as an unset one,
    and that error's text is there.
    """
    values = {}
    for name in _PARSERS:
        variable = f"JAX_BOLT_{name.upper()}"
        if text := environ.get(variable, "").strip():
            try:
                values[name] = _parse(name, variable, text)
            except ValueError as error:
                if wrong is None:
                    raise
                wrong[variable] = str(error)
    return Options(**values)


def unknown(environ: Mapping[str, str]) -> dict[str, str]:
    """What to say of variables ``JAX_BOLT_*`` that are no options, by their names."""
    names = [name.upper() for name in _PARSERS]
    found: dict[str, str] = {}
    for variable in sorted(environ):
        prefix, _, name = variable.partition("JAX_BOLT_")
        if prefix or not environ[variable].strip():
            continue
        if name and name not in (*names, *_NO_OPTIONS):
            import difflib  # which a right environment need not load

            near = difflib.get_close_matches(name.upper(), names, 1)
            meant = f"did you mean JAX_BOLT_{''.join(near)}?"
            others = f"there are {', '.join(f'JAX_BOLT_{n}' for n in names)}"
            found[variable] = f"{variable} is no option; {meant if near else others}"
    return found


@functools.cache
def _environment() -> Options:
    # That one was read at the import, and nothing that is called depends on it.
    others = {n: text for n, text in os.environ.items() if n != "JAX_BOLT_WARM"}
    return from_environment(others)


_active: contextvars.ContextVar[Options | None] = contextvars.ContextVar(
    "jax_bolt_options", default=None
)


def _path(value: Any) -> Path | None:
    if value is None:
        return None
    try:
        # Absolute, so that a later chdir does not move the cache.
        path = Path(value).expanduser().absolute()
    except RuntimeError as error:  # there is no such user
        raise ValueError from error
    # What no Linux file system can have: every later look at it would be an error.
    longest = max(len(os.fsencode(part)) for part in path.parts)
    if "\0" in str(path) or longest > _NAME_MAX or len(os.fsencode(path)) > _PATH_MAX:
        raise ValueError
    return path


def _seconds(value: Any) -> float | None:
    if value is None:
        return None
    seconds = float(value)
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError
    return seconds


def _count(value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or int(value) < 1:
        raise ValueError
    return int(value)


# What ``disable`` may name: the kernel templates, and what a program is rewritten by.
DISABLE = (
    *("implicit_gemm_sm90", "depthwise", "gemm_sm80", "conv_sm80"),
    *("chain_sm90", "merged_sm90"),
    *("cast", "sequence", "auxiliary", "chain", "pool"),
)


def _names(value: Any) -> tuple[str, ...]:
    given = value.split(",") if isinstance(value, str) else list(value)
    names = tuple(name.strip() for name in given if name.strip())
    if not set(names) <= set(DISABLE):
        raise ValueError
    return names


def _one_of(*allowed: str) -> tuple[Callable[[Any], Any], str]:
    def parse(value: Any) -> str:
        if value not in allowed:
            raise ValueError
        return value

    return parse, "one of " + ", ".join(map(repr, allowed))


# option -> how a value or an environment variable's text is read, what is allowed
_PARSERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "cache_dir": (_path, "a directory"),
    "cuda_home": (_path, "a directory"),
    "on_miss": _one_of("tune", "heuristic", "xla", "error"),
    "on_error": _one_of("xla", "raise"),
    "warm": _one_of("build", "load", "off"),
    "budget_s": (_seconds, "a number of seconds, at least 0"),
    "jobs": (_count, "a whole number, at least 1"),
    "disable": (_names, f"some of {', '.join(DISABLE)}"),
    "dump_dir": (_path, "a directory"),
}


def _parse(name: str, label: str, value: Any) -> Any:
    parse, allowed = _PARSERS[name]
    try:
        return parse(value)
    except (TypeError, ValueError, AttributeError):
        raise ValueError(f"{label}={value!r} must be {allowed}") from None
