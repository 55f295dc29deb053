# SPDX-License-Identifier: Apache-2.0
"""Everything that depends on a JAX version or on JAX's private modules.

No other file imports ``jax._src`` or compares versions; ruff's TID251 keeps it so.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
from jax._src import config as _config
from jax._src import core as _jax_core
from jax._src import distributed as _distributed
from jax._src import source_info_util as _source_info
from jax._src.interpreters import partial_eval as _partial_eval
from jax._src.sharding_impls import ShardingContext, SPMDAxisContext
from jax.extend import core as _core
from jax.extend.core import (
    Jaxpr,
    JaxprEqn,
    Literal,
    Primitive,
    Var,
    gensym,
    jaxpr_as_fun,
    new_jaxpr_eqn,
)
from jax.interpreters import ad, batching, mlir
from jax.lax import transpose_p

__all__ = [
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Primitive",
    "Var",
    "ad",
    "aval_of",
    "batching",
    "call_equation",
    "closed",
    "cuda_device",
    "device_count",
    "distributed_client",
    "equations_of",
    "fresh_vars",
    "has_bound_axes",
    "is_drop",
    "is_outermost",
    "jaxpr_as_fun",
    "like_body",
    "live_equations",
    "make_jaxpr",
    "mlir",
    "name_stack",
    "new_equation",
    "operation_name",
    "part_of_jaxpr",
    "place_of",
    "prefixed",
    "program_like",
    "program_processes",
    "rebuilt",
    "register_dce",
    "renamed",
    "runs_on",
    "source_line",
    "sub_jaxprs",
    "substituted",
    "trace_context",
    "transpose_p",
    "transposed",
    "variables",
    "without_unused",
]

# From JAX 0.12 on another name of Jaxpr, which then has its constants with it.
ClosedJaxpr: TypeAlias = _core.ClosedJaxpr  # pyright: ignore[reportPrivateImportUsage]

# Parameters that hold the bodies of the higher-order primitives we look into. A
# primitive not listed here is left exactly as it is.
_BODIES: dict[str, tuple[str, ...]] = {
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "closed_call": ("call_jaxpr",),
    "core_call": ("call_jaxpr",),
    "custom_jvp_call": ("call_jaxpr",),
    "custom_vjp_call": ("call_jaxpr",),
    "remat": ("jaxpr",),
    "remat2": ("jaxpr",),
    "checkpoint": ("jaxpr",),
    "scan": ("jaxpr",),
    "while": ("cond_jaxpr", "body_jaxpr"),
    "cond": ("branches",),
    "shard_map": ("jaxpr",),
}


def sub_jaxprs(eqn: JaxprEqn) -> Iterator[tuple[str, Any]]:
    """Yields ``(parameter, body)`` for the bodies of ``eqn`` that may be rewritten.

    A body is a ``ClosedJaxpr``, an open ``Jaxpr``, or a tuple of them.
    """
    for name in _BODIES.get(eqn.primitive.name, ()):
        if name in eqn.params:
            yield name, eqn.params[name]


def make_jaxpr(fun: Callable, static_argnums: Sequence[int], args, kwargs):
    """``(ClosedJaxpr, output tree)`` of ``fun(*args, **kwargs)``."""
    traced, shape = jax.make_jaxpr(fun, tuple(static_argnums), return_shape=True)(
        *args, **kwargs
    )
    return traced, jax.tree.structure(shape)


def trace_context() -> Any:
    """What of JAX's state a trace depends on; hashable."""
    return _config.trace_context()


def is_outermost() -> bool:
    """Whether nothing is being traced: arrays are what they seem."""
    return _jax_core.trace_state_clean()


def place_of(x: Any) -> Any:
    """The one device on which an array lies in rows, as custom calls want it; or None:
    XLA copies what lies otherwise ahead of them."""
    given = getattr(x, "format", None)  # None of arrays of keys
    if not isinstance(x, jax.Array) or given is None or len(x.devices()) > 1:
        return None
    layout = given.layout
    if layout is not None and layout.major_to_minor != (*range(x.ndim),):
        return None
    (device,) = x.devices()
    return device


def runs_on(device: Any, args: Iterable[Any]) -> bool:
    """Whether a jitted call of ``args`` runs on ``device``, where arrays are that are
    committed to none."""
    if jax.local_device_count() == 1:
        return True
    default = jax.config.values["jax_default_device"] or jax.local_devices()[0]
    committed = (x.devices() for x in args if getattr(x, "committed", False))
    return device == default and all(devices == {device} for devices in committed)


def has_bound_axes() -> bool:
    """Whether what is traced now is one part of a mapped axis (``shard_map``, say)."""
    return bool(_jax_core.get_axis_env().axis_sizes)


def closed(body: Any) -> ClosedJaxpr:
    """``body`` as a ``ClosedJaxpr``; an open one must have no constants."""
    return body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, [])


def aval_of(atom: Any) -> Any:
    """The shaped abstract value of a variable or literal."""
    return atom.aval


def transposed(aval: Any, permutation: Sequence[int]) -> Any:
    """The abstract value of a transpose."""
    (made,) = _result_avals(transpose_p, [aval], {"permutation": tuple(permutation)})
    return made


def _result_avals(primitive: Primitive, avals: Iterable[Any], params: Any) -> list[Any]:
    # On, the result varies over the manual axes that the operands do, if any.
    with _config._check_vma(True):
        found = primitive.abstract_eval(*avals, **params)
    made = found[0] if isinstance(found, tuple) else found  # the others are effects
    return list(made) if primitive.multiple_results else [made]


def variables(atoms: Sequence[Any]) -> list[Var]:
    """Those that are no literals."""
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def substituted(env: Mapping[Var, Any], atom: Any) -> Any:
    """What ``env`` has for a variable, or else the atom itself."""
    return atom if isinstance(atom, Literal) else env.get(atom, atom)


def live_equations(
    eqns: Sequence[JaxprEqn],
    outvars: Sequence[Any],
    may_drop: Callable[[JaxprEqn], bool],
) -> list[JaxprEqn]:
    """``eqns`` without those that ``may_drop`` names and nothing reads."""
    needed = set(variables(outvars))
    kept: list[JaxprEqn] = []
    for eqn in reversed(eqns):
        if needed.isdisjoint(eqn.outvars) and may_drop(eqn):
            continue
        kept.append(eqn)
        needed.update(variables(eqn.invars))
    return kept[::-1]


def operation_name(eqn: JaxprEqn) -> str:
    """The primitive's, or of a call the function's."""
    for body in eqn.params.values():
        if isinstance(body, (ClosedJaxpr, Jaxpr)):
            jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
            name = getattr(jaxpr.debug_info, "func_name", "")
            return str(eqn.params.get("name", name)) or eqn.primitive.name
    return eqn.primitive.name


def is_drop(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


def fresh_vars() -> Callable[[Any], Var]:
    """A maker of variables: ``make(aval) -> Var``."""
    return gensym()


def like_body(program: ClosedJaxpr, body: Any) -> Any:
    """``program`` in the form ``body`` had: open where ``body`` was open."""
    return program if isinstance(body, ClosedJaxpr) else program.jaxpr


def rebuilt(
    program: ClosedJaxpr,
    eqns: Sequence[JaxprEqn],
    *,
    outvars: Sequence[Any] | None = None,
    constvars: Sequence[Var] | None = None,
    consts: Sequence[Any] | None = None,
) -> ClosedJaxpr:
    """``program`` with other equations and, where given, results and constants."""
    old = program.jaxpr
    jaxpr = Jaxpr(
        list(old.constvars if constvars is None else constvars),
        list(old.invars),
        list(old.outvars if outvars is None else outvars),
        list(eqns),
        old.effects,
        old.debug_info,
    )
    return ClosedJaxpr(jaxpr, list(program.consts if consts is None else consts))


def program_like(
    program: ClosedJaxpr,
    eqns: Sequence[JaxprEqn],
    invars: Sequence[Var],
    outvars: Sequence[Any],
    effects: Any,
) -> ClosedJaxpr:
    """Another program, with the constants and the name of ``program``."""
    old = program.jaxpr
    debug_info = old.debug_info._replace(arg_names=None, result_paths=None)
    constvars = list(old.constvars)
    jaxpr = Jaxpr(
        constvars, list(invars), list(outvars), list(eqns), effects, debug_info
    )
    return ClosedJaxpr(jaxpr, list(program.consts))


def part_of_jaxpr(
    parent: Jaxpr,
    eqns: Sequence[JaxprEqn],
    invars: Sequence[Var],
    outvars: Sequence[Var],
) -> ClosedJaxpr:
    """A closed, effect-free jaxpr of some of ``parent``'s equations."""
    debug_info = parent.debug_info._replace(arg_names=None, result_paths=None)
    body = Jaxpr([], list(invars), list(outvars), list(eqns), frozenset(), debug_info)
    return ClosedJaxpr(body, [])


def call_equation(
    invars: Sequence[Any],
    outvars: Sequence[Var],
    primitive: Primitive,
    params: dict[str, Any],
    like: JaxprEqn,
) -> JaxprEqn:
    """An equation with the source information and context of ``like``."""
    source, ctx = like.source_info, like.ctx
    return new_jaxpr_eqn(
        list(invars), list(outvars), primitive, params, set(), source, ctx
    )


def equations_of(
    fun: Callable[[Any], Any], var: Var, like: JaxprEqn, make_var: Callable[[Any], Var]
) -> tuple[list[JaxprEqn], Var]:
    """``fun`` of ``var`` as equations with the source and context of ``like``.

    Returns them and the variable that holds the result; ``fun`` makes no constants.
    """
    like_var = jax.ShapeDtypeStruct(aval_of(var).shape, aval_of(var).dtype)
    traced = jax.make_jaxpr(fun)(like_var).jaxpr
    names = {traced.invars[0]: var}
    eqns: list[JaxprEqn] = []
    for eqn in traced.eqns:
        invars = [substituted(names, v) for v in eqn.invars]
        # From the variable's own: that may vary over manual axes, or be weakly typed.
        avals = _result_avals(eqn.primitive, map(aval_of, invars), eqn.params)
        made = [make_var(aval) for aval in avals]
        names.update(zip(eqn.outvars, made, strict=True))
        eqns.append(call_equation(invars, made, eqn.primitive, eqn.params, like))
    return eqns, names[traced.outvars[0]]


def renamed(eqns: Sequence[JaxprEqn], names: Mapping[Var, Var]) -> list[JaxprEqn]:
    """``eqns`` with some of their variables replaced."""
    return [
        eqn.replace(
            invars=[substituted(names, v) for v in eqn.invars],
            outvars=[names.get(v, v) for v in eqn.outvars],
        )
        for eqn in eqns
    ]


def new_equation(
    invars: Sequence[Any],
    outvars: Sequence[Var],
    primitive: Primitive,
    params: dict[str, Any],
    ctx: Any,
) -> JaxprEqn:
    """An equation that is no one line's or layer's own."""
    source = _source_info.new_source_info()
    return new_jaxpr_eqn(
        list(invars), list(outvars), primitive, params, set(), source, ctx
    )


def register_dce(
    primitive: Primitive,
    rule: Callable[[list[bool], JaxprEqn], tuple[list[bool], JaxprEqn | None]],
) -> None:
    """``rule`` gets which results are used, and says which operands then are."""
    # From JAX 0.12 on, which references are live comes between the two.
    _partial_eval.dce_rules[primitive] = lambda used, *rest: rule(used, rest[-1])


def without_unused(
    program: ClosedJaxpr, used: Sequence[bool], *, keep_inputs: bool = False
) -> tuple[ClosedJaxpr, list[bool]]:
    """``program`` with only the ``used`` results, and which operands it then has.

    Those that these results need, or all.
    """
    jaxpr, read = _partial_eval.dce_jaxpr(
        program.jaxpr, list(used), instantiate=keep_inputs
    )
    return ClosedJaxpr(jaxpr, list(program.consts)), list(read)


def name_stack(eqn: JaxprEqn) -> str:
    return str(eqn.source_info.name_stack)


def prefixed(inner: JaxprEqn, outer: JaxprEqn) -> Any:
    """Source information of ``inner`` once inlined in place of ``outer``."""
    # As JAX names what it lowers from a call, so that profiles read the same.
    call = f"jit({outer.params.get('name', outer.primitive.name)})"
    stack = outer.source_info.name_stack.extend(call) + inner.source_info.name_stack
    # What is traced as a call knows no lines but those inside.
    own = _users_frame(inner) is not None or _users_frame(outer) is None
    source = (inner if own else outer).source_info
    return source.replace(name_stack=stack)


def source_line(eqn: JaxprEqn) -> str:
    """``file.py:12:4 (function)`` of the user's line, or an empty text.

    The innermost line outside of installed packages (where a layer of Flax's is called,
    say), named from the working directory on where it is below that. Where there is
    none, the innermost of all, named from its package on.
    """
    frame = _users_frame(eqn)
    if frame is not None:
        file = _below_here(frame.file_name)
    else:
        frame = next(_source_info.user_frames(eqn.source_info.traceback), None)
        if frame is None:
            return ""
        file = _INSTALLED.split(frame.file_name)[-1]
    column = f":{frame.start_column}" if frame.start_column else ""
    return f"{file}:{frame.start_line}{column} ({frame.function_name})"


_INSTALLED = re.compile(r"/(?:site|dist)-packages/")
_OURS = f"{Path(__file__).parents[1]}/"  # in a checkout, which is no installed package


def _users_frame(eqn: JaxprEqn) -> Any | None:
    frames = _source_info.user_frames(eqn.source_info.traceback)
    return next((frame for frame in frames if _is_users(frame.file_name)), None)


@functools.cache
def _is_users(file: str) -> bool:
    outside = (_OURS, "<frozen ")
    return not file.startswith(outside) and _INSTALLED.search(file) is None


def _below_here(file: str) -> str:
    """Relative to the working directory, where that is above it."""
    try:
        return file.removeprefix(f"{Path.cwd()}/")
    except OSError:  # it was removed
        return file


def device_count(ctx: mlir.LoweringRuleContext) -> int:
    """Devices that XLA's partitioner may spread this lowering's values over.

    Inside a ``shard_map`` whose axes are all manual every value is one device's own,
    so the answer is 1.
    """
    axis_context = ctx.module_context.axis_context
    if isinstance(axis_context, ShardingContext):
        return axis_context.num_devices
    if isinstance(axis_context, SPMDAxisContext):
        mesh = axis_context.mesh
        automatic = set(mesh.axis_names) - set(axis_context.manual_axes)
        count = 1
        for axis in automatic:
            count *= mesh.shape[axis]
        return count
    return 1


def program_processes(ctx: mlir.LoweringRuleContext) -> frozenset[int]:
    """Indices of the processes whose devices run the program that is lowered.

    Empty where JAX does not say: in an export, or under an abstract mesh.
    """
    axis_context = ctx.module_context.axis_context
    devices: Any = ()
    if isinstance(axis_context, ShardingContext):
        devices = axis_context.device_assignment or ()
    elif isinstance(axis_context, SPMDAxisContext):
        mesh = axis_context.mesh
        devices = mesh.devices.flat if isinstance(mesh, jax.sharding.Mesh) else ()
    return frozenset(device.process_index for device in devices)


def distributed_client() -> Any | None:
    """JAX's client of the key-value store that the processes of a program share.

    None where there is one process, or ``jax.distributed`` was not initialised.
    """
    state = _distributed.global_state
    return state.client if state.num_processes > 1 else None


def cuda_device() -> Any | None:
    """The first local CUDA device of this process, or None.

    Only called from CUDA lowering rules and from tuning, so the backend already
    exists or is about to.
    """
    try:
        return jax.local_devices(backend="cuda")[0]
    except RuntimeError:
        return None
