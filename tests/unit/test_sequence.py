# SPDX-License-Identifier: Apache-2.0
"""Consecutive calls as one: what is put together, and where its buffers lie."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import Build
from jax import export
from test_lower import TARGET, cuda_text, kernel, shape  # noqa: F401

import jax_bolt
from jax_bolt import _native
from jax_bolt._src import ir, options, rewrite, sequence
from jax_bolt._src.forms import Form
from jax_bolt._src.invoke import Executable
from jax_bolt._src.jit import loader
from jax_bolt._src.launches import Launches, Promise, _Arena, _Step


def dense(x, w):
    return jax.nn.relu(x @ w)


def names(fun, *args, disable=()):
    """The primitives of the rewritten program."""
    program = jax.make_jaxpr(fun)(*args)
    done = rewrite.rewrite(program, options.Options(disable=disable))
    return [eqn.primitive.name for eqn in done.program.jaxpr.eqns]


SQUARE = shape(8, 8)


def test_consecutive_calls_are_one_sequence():
    def fun(x, w):
        return dense(dense(dense(x, w), w), w)

    assert names(fun, SQUARE, SQUARE) == ["bolt_sequence"]
    assert names(fun, SQUARE, SQUARE, disable=("sequence",)) == ["bolt_call"] * 3
    assert names(lambda x, w: dense(x, w), SQUARE, SQUARE) == ["bolt_call"]


def test_depthwise_convs_belong_to_one():
    def conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def block(x, wide, w, narrow):
        y = conv(jax.nn.relu6(conv(x, wide)), w, groups=32)
        return conv(jax.nn.relu6(y), narrow) + x

    filters = shape(1, 1, 8, 32), shape(3, 3, 1, 32), shape(1, 1, 32, 8)
    assert names(block, shape(2, 7, 7, 8), *filters) == ["bolt_sequence"]


def test_what_reads_a_result_ends_the_sequence():
    def fun(x, w):
        y = dense(dense(x, w), w)
        return dense(dense(jnp.sort(y), w), w)

    found = names(fun, SQUARE, SQUARE)
    assert found == ["bolt_sequence", "sort", "bolt_sequence"]


def test_what_reads_none_goes_before_it():
    def fun(x, w):
        y = dense(x, w)
        return dense(y, jnp.sort(w))

    assert names(fun, SQUARE, SQUARE) == ["sort", "bolt_sequence"]


def test_only_results_that_others_read_leave():
    def fun(x, w):
        first = dense(x, w)
        second = dense(first, w)
        return dense(second, w), first

    program = jax.make_jaxpr(fun)(SQUARE, SQUARE)
    done = rewrite.rewrite(program, options.Options()).program
    (eqn,) = done.jaxpr.eqns
    assert eqn.primitive.name == "bolt_sequence" and len(eqn.outvars) == 2
    assert len(eqn.invars) == 2


def test_what_would_wait_too_long_ends_the_sequence(monkeypatch):
    """Weights that are made layer by layer must not all be alive at once."""

    def fun(x, *packed):
        for w in packed:
            x = dense(x, w.astype(jnp.bfloat16) * 2)
        return x

    packed = [shape(64, 64, dtype=jnp.int8)] * 6
    one = 2 * 2 * 64 * 64  # a cast weight, and that times two
    for limit, calls in ((6 * one, 1), (2 * one, 2)):
        monkeypatch.setattr(sequence, "MAX_EARLY_BYTES", limit)
        assert names(fun, shape(4, 64), *packed).count("bolt_sequence") == calls
    monkeypatch.setattr(sequence, "MAX_EARLY_BYTES", 0)
    assert "bolt_sequence" not in names(fun, shape(4, 64), *packed)


def test_symbolic_sizes_can_wait_for_no_sequence():
    def fun(x, w, y):
        return dense(dense(x, w), w + 1), jnp.sin(y)

    def other(x, w, y):
        first = dense(x, w)
        sine = jnp.sin(y)
        return dense(first, w + 1), sine

    (batch,) = export.symbolic_shape("b")
    args = (SQUARE, SQUARE, shape(batch, 8))
    assert names(fun, *args).count("bolt_sequence") == 1
    assert "bolt_sequence" not in names(other, *args)


def test_calls_that_nothing_reads_are_dropped():
    def fun(x, w):
        y = dense(x, w)
        dense(dense(y, w), w)
        return dense(y, w)

    program = jax.make_jaxpr(fun)(SQUARE, SQUARE)
    done = rewrite.rewrite(program, options.Options()).program
    (eqn,) = done.jaxpr.eqns
    assert len(eqn.params["calls"].jaxpr.eqns) == 2


def test_results_that_nothing_reads_cost_no_launch(kernel):  # noqa: F811
    def fun(x, w, v):
        y = dense(dense(x, w), w)
        return y, dense(dense(y, v), v)

    optimized = jax_bolt.optimize(fun)
    text = cuda_text(lambda *args: optimized(*args)[0], SQUARE, SQUARE, SQUARE)
    assert launches(text) == [2]
    text = cuda_text(lambda *args: optimized(*args)[1], SQUARE, SQUARE, SQUARE)
    assert launches(text) == [4]


def test_bodies_have_sequences_of_their_own():
    def fun(x, w):
        return jax.lax.scan(lambda c, _: (dense(dense(c, w), w), None), x, None, 3)[0]

    program = jax.make_jaxpr(fun)(SQUARE, SQUARE)
    done = rewrite.rewrite(program, options.Options())
    assert str(done.program).count("bolt_sequence[") == 1
    again = rewrite.rewrite(done.program, options.Options())
    assert again.roots == done.roots and not again.family.sites
    assert str(again.program) == str(done.program)


def model(x, w, v):
    y = dense(x, w)
    return dense(dense(y, v) + y, w), y


def test_every_transformation_means_the_same():
    keys = jax.random.split(jax.random.key(0), 3)
    args = [jax.random.normal(key, (6, 6)) for key in keys]
    fun = jax_bolt.optimize(model)

    def total(f):
        return lambda *xs: sum(jnp.sum(y * y) for y in f(*xs))

    def check(transform):
        want, got = transform(model), transform(fun)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), want, got
        )

    assert names(model, *args) == ["bolt_sequence"]
    check(lambda f: f(*args))
    check(lambda f: jax.jit(f)(*args))
    with jax.disable_jit():
        check(lambda f: f(*args))
    check(lambda f: jax.grad(total(f), argnums=(0, 1, 2))(*args))
    check(lambda f: jax.jvp(f, args, args))
    check(lambda f: jax.jvp(lambda x: f(x, *args[1:]), args[:1], args[:1]))
    stacked = jnp.stack([args[0], 2 * args[0]])
    check(lambda f: jax.vmap(f, (0, None, None))(stacked, *args[1:]))

    def linear(x, w):
        return (x @ w) @ w

    def transposed(f):
        return jax.linear_transpose(lambda x: f(x, args[1]), args[0])(args[2])

    assert names(linear, *args[:2]) == ["bolt_sequence"]
    want, got = transposed(linear), transposed(jax_bolt.optimize(linear))
    np.testing.assert_allclose(want[0], got[0], rtol=1e-5)


# --- The call


def test_one_custom_call_for_a_sequence(kernel):  # noqa: F811
    def fun(x, w):
        y = dense(dense(x, w), w)
        return dense(y, w), y

    text = cuda_text(fun, SQUARE, SQUARE)
    assert text.count(f"@{TARGET}(") == text.count("kind = 3") == 1
    assert "stablehlo.dot" not in text
    assert text.count("d" * 64) == 1
    # Two results, and an arena: a result of 128 bytes, and workspaces of 128.
    assert "(tensor<8x8xbf16>, tensor<8x8xbf16>, tensor<512xui8>)" in text


def launches(text: str) -> list[int]:
    """How many kernels every custom call launches."""
    programs = re.findall(r"program = dense<\[2, (\d+),", text)
    return [int(count) for count in programs] + [1] * text.count("sides = ")


def padded(x, f, g):
    """Two convs; XLA pads the operands of both where channels are too few."""
    return conv(conv(x, f), g)


def conv(x, w):
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


IMAGE = shape(1, 6, 6, 20)
PADDED = (IMAGE, shape(3, 3, 20, 20), shape(3, 3, 20, 20))


def test_a_result_that_xla_rearranges_ends_the_call(kernel):  # noqa: F811
    assert names(padded, *PADDED) == ["bolt_sequence"]
    assert launches(cuda_text(padded, *PADDED)) == [1, 1]
    text = cuda_text(padded, IMAGE, shape(3, 3, 20, 24), shape(3, 3, 24, 8))
    assert launches(text) == [2]


def test_a_result_that_is_a_filter_ends_the_call(kernel):  # noqa: F811
    def fun(x, w):
        y = dense(x, w)
        return dense(w, y), y @ y.T

    assert names(fun, SQUARE, SQUARE)[0] == "bolt_sequence"
    assert launches(cuda_text(fun, SQUARE, SQUARE))[0] == 1


@pytest.fixture(scope="session")
def host(build: Build) -> str:
    """Sequences of kernels of host code, on the CPU."""
    path: Path = build("kernel.cc", "kernel.so")
    _native.load("kernel", str(path))
    name = "jax_bolt_test.launch_sequence"
    jax.ffi.register_ffi_target(name, _native.host_handlers(), platform="cpu")
    return name


def product(
    m: int, n: int, k: int, sides: int = 0, batch: int = 1, auxiliary: int = 0
) -> Executable:
    """A x B + side_0 of float32; with a batch it has a workspace of 64 bytes.

    An auxiliary output is A x B.
    """
    problem = ir.GemmProblem(m=m, n=n, k=k, dtype="f32")
    epilogue = ir.Epilogue(
        (ir.Op("acc"),),
        0,
        "f32",
        sides=("f32",) * sides,
        auxiliary=(ir.Output(0, "f32"),) * auxiliary,
    )
    form = Form("direct", ir.Region(problem=problem, epilogue=epilogue))
    return Executable("kernel", problem, form, 64 if batch > 1 else 0)


def rand(*dims: int) -> np.ndarray:
    rng = np.random.default_rng(sum(dims))
    return rng.standard_normal(dims, dtype=np.float32)


def test_kernels_find_their_buffers(host, monkeypatch):
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    x, w, v, u = rand(4, 5), rand(5, 6), rand(6, 6), rand(6, 3)

    def fun(x, w, v, u):
        calls = Launches()
        (first,) = calls.add(product(4, 6, 5), x, w, [], [], (4, 6))
        (second,) = calls.add(product(4, 6, 6, 1), first, v, [first], [], (4, 6))
        (third,) = calls.add(product(4, 6, 6, 1), second, v, [first], [], (4, 6))
        (last,) = calls.add(product(4, 3, 6), third, u, [], [], (4, 3))
        made = calls.launch([last, second])
        assert not len(calls) and list(made) == [last, second]
        return list(made.values())

    last, second = jax.jit(fun)(x, w, v, u)
    one = x @ w
    two = one @ v + one
    np.testing.assert_allclose(second, two, rtol=1e-5)
    np.testing.assert_allclose(last, (two @ v + one) @ u, rtol=1e-4, atol=1e-5)


def test_auxiliary_outputs_are_read_and_returned(host, monkeypatch):
    """One inside the call alone, one that is a result of the call."""
    monkeypatch.setattr(loader, "ffi_target", lambda: host)
    x, w, v = rand(4, 5), rand(5, 6), rand(6, 6)

    def fun(x, w, v):
        calls = Launches()
        (one,) = calls.add(product(4, 6, 5), x, w, [], [], (4, 6))
        two, bare = calls.add(product(4, 6, 6, 1, 1, 1), one, v, [one], [], (4, 6))
        (three,) = calls.add(product(4, 6, 6, 1), two, v, [bare], [], (4, 6))
        four, kept = calls.add(product(4, 6, 6, 1, 1, 1), three, v, [two], [], (4, 6))
        made = calls.launch([four, kept])
        assert not len(calls)
        return [made[four], made[kept]]

    four, kept = jax.jit(fun)(x, w, v)
    bare = x @ w @ v
    two = bare + x @ w
    np.testing.assert_allclose(kept, (two @ v + bare) @ v, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(four, kept + two, rtol=1e-4, atol=1e-5)


def steps(kernels: list[Executable], reads: list[list[int]]) -> list[Any]:
    made: list[Any] = []
    for index, (kernel_, read) in enumerate(zip(kernels, reads, strict=True)):
        p = kernel_.problem
        promise = Promise(index, (p.rows, p.channels), jnp.float32)
        first, *others = [made[i].promises[0] for i in read] or [None]
        made.append(_Step(kernel_, first, None, others, [], [promise]))
    return made


def starts(arena: Any, found: list[Any]) -> list[int]:
    """Where the outputs of ``found`` lie."""
    return [arena.results[promise] for step in found for promise in step.promises]


def test_the_arena_is_used_again():
    """Results of 1024 bytes, each read by the next launch alone: two are alive."""
    kernels = [product(16, 16, 16) for _ in range(6)]
    found = steps(kernels, [[], [0], [1], [2], [3], [4]])
    arena = _Arena(found, {found[-1].promises[0]: 0})
    assert arena.bytes == 2048
    assert starts(arena, found[:-1]) == [0, 1024, 0, 1024, 0]


def test_a_place_inside_a_larger_one_is_taken():
    """The largest result is alive throughout; small ones must not lie inside it."""
    kernels = [product(m, 16, 16) for m in (64, 4, 4, 4)]
    found = steps(kernels, [[], [0], [1, 0], [2, 0]])
    arena = _Arena(found, {})
    first, *others = starts(arena, found)
    assert first == 0
    assert all(start >= 64 * 16 * 4 for start in others)


def test_nothing_in_the_arena_overlaps_what_is_alive():
    kernels = [
        product(m, 16, 16, batch=b) for m, b in ((3, 1), (40, 2), (7, 2), (9, 1))
    ]
    found = steps(kernels, [[], [0], [1, 0], [2, 0]])
    arena = _Arena(found, {})
    sizes = [step.promises[0].bytes for step in found]
    alive = {0: (0, 3), 1: (1, 2), 2: (2, 3), 3: (3, 3)}
    spans = [(*alive[i], starts(arena, found)[i], sizes[i]) for i in range(4)]
    spans += [(i, i, arena.workspaces[i], 64) for i in (1, 2)]
    for i, (first, last, start, size) in enumerate(spans):
        assert start % 256 == 0 and start + size <= arena.bytes
        for other_first, other_last, other, other_size in spans[:i]:
            if other_first <= last and first <= other_last:
                assert start + size <= other or other + other_size <= start


def call(host: str, program: list[int], **attributes: Any) -> Any:
    given: dict[str, Any] = {"kind": np.int64(3), "digests": "kernel"}
    given |= {"program": np.asarray(program, np.int64)} | attributes
    results = [jax.ShapeDtypeStruct((4, 3), jnp.float32)]
    fun = jax.jit(lambda *xs: jax.ffi.ffi_call(host, results)(*xs, **given))
    return fun(rand(4, 5), rand(5, 3))


GOOD = [2, 1, 0, 0, 4, 4, 3, 5, 1, 0, 1, 0, 1, 1, 2, 0, 0, 0, 0, 0, 0, 0]


def changed(index: int, value: int) -> list[int]:
    return [*GOOD[:index], value, *GOOD[index + 1 :]]


@pytest.mark.parametrize(
    ("program", "attributes", "message"),
    [
        (changed(0, 1), {}, "the program has another version"),
        (changed(1, 2), {}, "the program is not valid at number 22"),
        (changed(1, 10**15), {}, "the program is not valid at number 1"),
        (changed(2, 1), {}, "the program is not valid at number 2"),
        (changed(3, 7), {}, "kernel kernel: "),
        (changed(4, 10**9), {}, "the program is not valid at number 4"),
        (changed(4, 17), {}, "the program is not valid at number"),
        (changed(9, 10**9), {}, "the program is not valid at number 9"),
        (changed(10, 4), {}, "the program is not valid at number 10"),
        (changed(10, -1), {}, "the program is not valid at number 10"),
        (changed(18, 4), {}, "the program is not valid at number 18"),
        (changed(20, 2), {}, "the program is not valid at number 20"),
        ([*GOOD, 0], {}, "the program is longer than it says"),
        (GOOD[:-1], {}, "the program is not valid at number 21"),
        ([], {}, "the program has another version"),
        (changed(11, 2), {}, "a buffer is not there"),
        (changed(15, 1), {}, "a buffer is not there"),
        (
            changed(8, 2),
            {},
            "it needs 64 bytes of workspace on device 0 and was given 0",
        ),
        (GOOD, {"digests": "other"}, "kernel other: "),
        (GOOD, {"digests": ""}, "kernel : "),
    ],
)
def test_bad_programs(host, program, attributes, message):
    with pytest.raises(Exception, match=r"jax_bolt.launch") as caught:
        call(host, program, **attributes)
    assert message in str(caught.value)


def test_a_good_program(host):
    (got,) = call(host, GOOD)
    np.testing.assert_allclose(got, rand(4, 5) @ rand(5, 3), rtol=1e-5)
