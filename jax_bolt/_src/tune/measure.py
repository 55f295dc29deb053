# SPDX-License-Identifier: Apache-2.0
"""Times and errors of one region on the GPU: a kernel's against XLA's.

Kernels were compared with each other elsewhere (``isolate.py``). The best of them and
XLA's own lowering are compared as what a program would run, rearranged operands and
all, through one and the same path: a jitted function that runs the region on several
sets of operands, dispatched behind a long matrix product that hides the host's time.

All memory is JAX's own, so tuning fits into what JAX left free.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .. import evaluate, invoke, ir
from ..chain import AnySite, ChainInfo, S
from ..invoke import JAX_DTYPES, AnyExecutable, Executable
from ..jit import loader
from ..launches import Launches, Promise, Roles
from ..primitive import SiteInfo, reference_fun
from . import db

_REPEATS = 7
_TARGET_US = 2e3  # device time of one timed batch
_MAX_CALLS = 16  # of one batch; a client with 32 executions in flight waits
_DRAWN = 1048573  # elements drawn of a large operand, then repeated; a prime


@dataclasses.dataclass(frozen=True, slots=True)
class Operands(Generic[S]):
    """Random operands of a region, several different sets, in the user's shapes."""

    site: S
    sets: tuple[tuple[jax.Array, ...], ...]

    def roles(self, index: int) -> tuple[Any, Any, list[Any], list[Any]]:
        """``(lhs, rhs, sides, vectors)`` of one set of a region's."""
        assert isinstance(self.site, SiteInfo)
        return split(self.site, self.sets[index])


def split(site: SiteInfo, operands: Sequence[Any]) -> tuple[Any, Any, list, list]:
    """The operands of a ``bolt_call`` by role: ``(lhs, rhs, sides, vectors)``."""
    lhs, rhs, *rest = (operands[i] for i in site.operands)
    count = len(site.region.epilogue.sides)
    return lhs, rhs, rest[:count], rest[count:]


def roles_of(site: AnySite, operands: Sequence[Any]) -> list[Roles]:
    """As ``split``, of every call of a chain; what is between two is None."""
    if not isinstance(site, ChainInfo):
        return [split(site, operands)]
    mine, others = site.split(operands)
    return [*roles_of(site.first, mine), split(site.second, site.joined(others, None))]


def sets_for(region: ir.Work, l2_bytes: int) -> int:
    """How many sets of operands exceed the L2 cache twice: 2 to 8."""
    return max(2, min(8, math.ceil(2 * l2_bytes / region.bytes_moved)))


def make_operands(site: S, l2_bytes: int, seed: int = 0) -> Operands[S]:
    """Random operands, ``sets_for`` of them."""
    count = sets_for(site.region, l2_bytes)
    sets = [
        tuple(
            jax.device_put(
                _random(site, position, np.random.default_rng([seed, i, position]))
            )
            for position in range(len(site.in_avals))
        )
        for i in range(count)
    ]
    return Operands(site, tuple(jax.block_until_ready(sets)))


def _random(site: AnySite, position: int, rng: np.random.Generator) -> np.ndarray:
    """One operand of the ``bolt_call``; NumPy's, since JAX would compile for each."""
    if isinstance(site, ChainInfo):
        site, position = site.owner(position)
    aval = site.in_avals[position]
    drawn = min(aval.size, _DRAWN)
    roles = [r for r, p in enumerate(site.operands) if p == position]
    if not roles:  # made of another operand, and read in its place
        return np.zeros(aval.shape, aval.dtype)
    role = roles[-1]  # of several the last: a matrix's square is scaled as a filter is
    if aval.dtype == bool:
        value = rng.random(drawn) < 0.5
    elif role >= 2 + len(site.region.epilogue.sides):
        # Positive: a per-channel input may be a variance.
        value = rng.uniform(0.5, 1.5, drawn)
    else:
        value = rng.standard_normal(drawn, np.float32)
    if role == 1:
        _, filter_elements = site.region.problem.operand_elements
        depth = max(1, filter_elements // site.region.problem.channels)
        value = value / np.float32(math.sqrt(depth))
    value = np.resize(value.astype(aval.dtype), aval.shape)
    view = site.views[position]
    if view is not None and view.is_redundant:
        value = np.asarray(view.there(view.back(jnp.asarray(value))))
    return value


def kernel_function(site: AnySite, kernel: AnyExecutable) -> Callable:
    """The region on ``kernel``, as a function of the ``bolt_call``'s operands.

    Of a chain, as a function of the operands of all its calls.
    """

    def fun(*operands: Any) -> list[Any]:
        if isinstance(kernel, Executable):
            assert isinstance(site, SiteInfo)
            shape = site.out_avals[0].shape
            return invoke.call(kernel, *split(site, operands), shape)
        launches = Launches()
        promised = _add(launches, site, kernel, operands)
        return list(launches.launch(promised).values())

    return fun


def _add(
    launches: Launches, site: AnySite, kernel: AnyExecutable, operands: Sequence[Any]
) -> list[Promise]:
    if isinstance(kernel, Executable):
        assert isinstance(site, SiteInfo)
        shape = site.out_avals[0].shape
        return launches.add(kernel, *split(site, operands), shape)
    assert isinstance(site, ChainInfo)
    shapes = [each.out_avals[0].shape for each in site.sites]
    return launches.add_chain(kernel, roles_of(site, operands), shapes)


@dataclasses.dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors in the 2-norm against the float32 yardstick, XLA's and ours.

    With auxiliary outputs, those of one output: ``worst``.
    """

    kernel: float
    xla: float


class Yardstick:
    """The outputs of a region on the first set of operands, from its IR in float32."""

    def __init__(self, operands: Operands):
        site, values = operands.site, operands.sets[0]
        # It runs once: XLA need not look for the fastest way.
        on_gpu = any(device.platform == "gpu" for device in values[0].devices())
        how = {"xla_gpu_autotune_level": 0} if on_gpu else {}
        evaluated = jax.jit(lambda *v: truth(site, v), compiler_options=how)
        self._truth = evaluated(*values)

    def errors(self, results: Sequence[jax.Array]) -> list[float]:
        """Of the outputs for that set, in the region's own shape."""
        pairs = zip(results, self._truth, strict=True)
        return [float(_relative(result, truth)) for result, truth in pairs]


def errors(operands: Operands, kernel: AnyExecutable) -> Errors:
    """Compares the region on ``kernel`` and on XLA with the IR's value."""
    yardstick = Yardstick(operands)
    ours = kernel_function(operands.site, kernel)
    xla = reference_fun(operands.site.reference)
    of_kernel, of_xla = (
        yardstick.errors(jax.jit(f)(*operands.sets[0])) for f in (ours, xla)
    )
    return worst(of_kernel, of_xla, operands.site.region)


def worst(kernel: Sequence[float], xla: Sequence[float], region: ir.Work) -> Errors:
    """Of the outputs' errors those that decide: of one that is wrong, if any is."""
    pairs = [Errors(*pair) for pair in zip(kernel, xla, strict=True)]
    wrong = [pair for pair in pairs if not is_accurate(pair, region)]
    return wrong[0] if wrong else max(pairs, key=lambda pair: pair.kernel)


def is_accurate(found: Errors, region: ir.Work) -> bool:
    """Whether the errors satisfy contract 1."""
    return db.is_accurate(found.kernel, found.xla, db.SANE_ERROR[region.dtype])


def truth(
    site: AnySite, operands: Sequence[Any], dtype: Any = jnp.float32
) -> tuple[jax.Array, ...]:
    """The region's outputs from its IR; see ``evaluate.outputs``.

    Of a chain what is between two regions is rounded, as these and others read it.
    """
    if isinstance(site, ChainInfo):
        mine, others = site.split(operands)
        first = truth(site.first, mine, dtype)
        between = first[0].astype(JAX_DTYPES[site.region.made.epilogue.out_dtype])
        second = truth(site.second, site.joined(others, between), dtype)
        return (*first, *second) if site.region.stored else second
    lhs, rhs, sides, vectors = split(site, operands)
    region = site.region
    if isinstance(region.problem, ir.ConvProblem):
        stored = dataclasses.replace(region.problem, filter_layout="hwio")
        region = dataclasses.replace(region, problem=stored)
    return evaluate.outputs(region, lhs, rhs, sides, vectors, dtype)


@jax.jit
def _relative(value: Any, truth: Any) -> Any:
    # Where the truth itself is not finite, only the kind of value can be compared.
    value = value.reshape(truth.shape).astype(truth.dtype)
    same = (value == truth) | (jnp.isnan(value) & jnp.isnan(truth))
    difference = jnp.where(same, 0.0, value - truth)
    scale = jnp.sum(jnp.square(jnp.where(jnp.isfinite(truth), truth, 0.0)))
    return jnp.sqrt(jnp.sum(jnp.square(difference)) / jnp.maximum(scale, 1e-30))


class Run(NamedTuple):
    """Median µs of a region, and its outputs on the first set of operands."""

    micros: float
    outputs: Sequence[jax.Array]


def time_region(fun: Callable, operands: Operands, ordinal: int) -> Run:
    """The region as a jitted function, operand sets rotated."""

    def rotation(sets: Sequence[tuple]) -> list[Any]:
        return [fun(*values) for values in sets]

    return _time_rotation(rotation, operands, ordinal)


def time_in_sequence(kernel: AnyExecutable, operands: Operands, ordinal: int) -> Run:
    """As ``time_region``, of a kernel as programs run it: among others in one custom
    call, where one may start while the one before it ends."""

    def add(launches: Launches, values: Sequence[Any]) -> list[Promise]:
        return _add(launches, operands.site, kernel, values)

    return _time_launches(add, operands, ordinal)


def time_apart(
    kernels: tuple[AnyExecutable, Executable], operands: Operands, ordinal: int
) -> Run:
    """As ``time_in_sequence``, of what a chain joins on a kernel each.

    The second kernel must take the first one's result as it lies.
    """
    site = operands.site
    assert isinstance(site, ChainInfo)
    first, second = kernels

    def add(launches: Launches, values: Sequence[Any]) -> list[Promise]:
        mine, others = site.split(values)
        (between,) = _add(launches, site.first, first, mine)
        made = _add(launches, site.second, second, site.joined(others, between))
        return [between, *made] if site.region.stored else made

    return _time_launches(add, operands, ordinal)


def _time_launches(
    add: Callable[[Launches, Sequence[Any]], list[Promise]],
    operands: Operands,
    ordinal: int,
) -> Run:
    def rotation(sets: Sequence[tuple]) -> list[Any]:
        launches = Launches()
        promised = [add(launches, values) for values in sets]
        made = launches.launch([promise for outputs in promised for promise in outputs])
        return [[made[promise] for promise in outputs] for outputs in promised]

    return _time_rotation(rotation, operands, ordinal)


def _viewed(site: AnySite, values: Sequence[Any]) -> tuple[Any, ...]:
    """The operands of the ``bolt_call``, from the program's own."""
    pairs = zip(values, site.views, strict=True)
    return tuple(x if view is None else view.there(x) for x, view in pairs)


def _written(site: AnySite, values: Sequence[Any]) -> tuple[Any, ...]:
    """The program's own values, from the operands of the ``bolt_call``."""
    pairs = zip(values, site.views, strict=True)
    return tuple(x if view is None else view.back(x) for x, view in pairs)


def time_function(fun: Callable, sets: Sequence[tuple], ordinal: int) -> float:
    """Median µs of any function, jitted, over several sets of arguments in turn."""

    def rotation(sets: Sequence[tuple]) -> list[Any]:
        return [fun(*values) for values in sets]

    return _time(rotation, sets, ordinal)[0]


def _time_rotation(rotation: Callable, operands: Operands, ordinal: int) -> Run:
    """From the program's own values and to them.

    What a kernel needs rearranged is part of its time. Of XLA's own path, which takes
    them as they are, the views and the reference's undone ones cancel.
    """
    site = operands.site
    sets = [_written(site, values) for values in operands.sets]

    def back(outputs: Sequence[Any]) -> list[Any]:
        pairs = zip(outputs, site.results, strict=True)
        return [x if view is None else view.back(x) for x, view in pairs]

    def whole(sets: Sequence[tuple]) -> list[Any]:
        return [back(made) for made in rotation([_viewed(site, v) for v in sets])]

    micros, outputs = _time(whole, sets, ordinal)
    pairs = zip(outputs, site.results, strict=True)
    return Run(micros, [x if view is None else view.there(x) for x, view in pairs])


def _time(rotation: Callable, sets: Sequence[tuple], ordinal: int) -> tuple[float, Any]:
    """Median µs of one of ``sets``, and what the first one gives."""
    # Not lowered ahead of time: such a call takes the host ten times as long.
    jitted = jax.jit(rotation)
    first: list[Any] = []

    def call() -> list[Any]:
        made = jitted(sets)
        first.extend(made[:1] if not first else ())
        return made

    return time_queued(call, ordinal) / len(sets), first[0]


def time_queued(call: Callable[[], Any], ordinal: int) -> float:
    """Median µs of the device's time from one ``call`` to the next, without the host's.

    The device times itself, by events on XLA's own stream, which is held up until a
    batch of calls is enqueued, so that the device never waits for the host; where that
    takes the host too long, a batch has fewer calls.
    """
    jax.block_until_ready(call())
    mark = _marker()

    def batch(calls: int) -> tuple[float, bool]:
        held = [mark(0), *(call() for _ in range(calls))]
        jax.block_until_ready((held[-1], mark(1)))
        return loader.native().read_stopwatch(ordinal)

    once, _ = batch(1)
    calls = max(1, min(_MAX_CALLS, math.ceil(_TARGET_US / max(once, 1.0))))
    times: list[float] = []
    queued = True
    while len(times) < _REPEATS:
        micros, queued = batch(calls)
        if queued or calls == 1:
            times.append(micros / calls)
        else:
            times.clear()
            calls //= 2
    # The host only ever adds to a time that it is part of.
    return statistics.median(times) if queued else min(times)


@functools.cache
def _marker() -> Callable[[int], jax.Array]:
    """Starts (0) or stops (1) the native stopwatch, in stream order."""
    call = jax.ffi.ffi_call(
        loader.mark_target(), jax.ShapeDtypeStruct((), jnp.int32), has_side_effect=True
    )
    return jax.jit(lambda slot: call(slot=np.int64(slot)), static_argnums=0)
