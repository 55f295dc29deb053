# SPDX-License-Identifier: Apache-2.0
"""Random programs of convs, products and what stands around them.

Three properties: the rewritten program computes what the user's does, so do its
gradients, and the IR of every region (what a kernel is made from) is worth what the
region's reference is. All is evaluated one operation at a time, since compiling each
program would take a second. ``JAX_BOLT_EXAMPLES`` sets how many are drawn.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax import lax

from jax_bolt._src import options, program
from jax_bolt._src.compat import jaxpr_as_fun
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import measure

EXAMPLES = int(os.environ.get("JAX_BOLT_EXAMPLES", "60"))
N, H, W, C = 2, 8, 5, 8  # as many rows as channels: a vector's axis must be looked at

Array: TypeAlias = Any
ACTIVATIONS: tuple[Callable[[Array], Array], ...] = (
    jax.nn.relu,
    jax.nn.silu,
    jax.nn.gelu,
    jnp.tanh,
    jax.nn.hard_swish,
    jax.nn.softplus,
    jax.nn.sigmoid,
    lambda x: jax.nn.leaky_relu(x, 0.1),
    lambda x: jnp.clip(x, -1.0, 1.5),
    jnp.abs,
    lambda x: x * 0.5 + 1.0,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps over a pool of activations; each appends one.

    A step is an operation's name, the positions of two operands and a number for it to
    use as it likes.
    """

    nchw: bool
    half: bool
    steps: tuple[tuple[str, int, int, int], ...]
    outputs: tuple[int, ...]
    head: bool

    def parameters(self, rng: np.random.Generator) -> list[dict[str, Array]]:
        def normal(*dims: int) -> Array:
            return jnp.asarray(rng.standard_normal(dims), jnp.float32)

        def near_one(*dims: int) -> Array:
            return jnp.asarray(rng.uniform(0.5, 1.5, dims), jnp.float32)

        taps = {"conv3": 3, "conv1": 1, "joined": 1, "block": 1}
        made = []
        for name, *_ in self.steps:
            size, inputs = taps.get(name, 3), C * (2 if name == "joined" else 1)
            w = normal(size, size, inputs, C) / (size * inputs**0.5)
            if self.nchw:
                w = w.transpose(3, 2, 0, 1)
            channels = {key: near_one(C) for key in ("mean", "var", "scale", "bias")}
            made.append({"w": w, **channels, "rows": near_one(H)})
        return [*made, {"dense": normal(C, C), "bias": normal(C)}]

    def image(self, rng: np.random.Generator) -> Array:
        dims = (N, C, H, W) if self.nchw else (N, H, W, C)
        return jnp.asarray(rng.standard_normal(dims), jnp.float32)

    def __call__(self, parameters: list[dict[str, Array]], x: Array) -> list[Array]:
        if self.half:
            x = x.astype(jnp.bfloat16)
        pool = [x]
        for (name, a, b, number), p in zip(self.steps, parameters, strict=False):
            first, second = pool[a % len(pool)], pool[b % len(pool)]
            step = getattr(self, f"_{name}")
            pool.append(step(p, first, second.astype(first.dtype), number))
        results = [pool[-1], *(pool[i % len(pool)] for i in self.outputs)]
        if self.head:
            last = parameters[-1]
            pooled = pool[-1].mean(axis=self._space)
            results.append(
                jax.nn.relu(pooled @ last["dense"].astype(pooled.dtype) + last["bias"])
            )
        return results

    @property
    def _space(self) -> tuple[int, int]:
        return (2, 3) if self.nchw else (1, 2)

    def _spread(self, vector: Array, like: Array) -> Array:
        vector = vector.astype(like.dtype)
        return vector[:, None, None] if self.nchw else vector

    def _conv3(self, p: Any, x: Array, _: Array, number: int) -> Array:
        form = ("NCHW", "OIHW", "NCHW") if self.nchw else ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x,
            p["w"].astype(x.dtype),
            (1, 1),
            "SAME",
            rhs_dilation=(1 + number % 2,) * 2,
            dimension_numbers=form,
        )

    _conv1 = _conv3

    def _joined(self, p: Any, x: Array, y: Array, number: int) -> Array:
        axis = 1 if self.nchw else 3
        return self._conv3(p, jnp.concatenate([x, y], axis), y, number)

    def _bias(self, p: Any, x: Array, _: Array, number: int) -> Array:
        return x + self._spread(p["bias"], x)

    def _norm(self, p: Any, x: Array, _: Array, number: int) -> Array:
        """BatchNorm in float32, as Flax has it."""
        dtype, x = x.dtype, x.astype(jnp.float32)
        mul = lax.rsqrt(p["var"] + 1e-5) * p["scale"]
        y = (x - self._spread(p["mean"], x)) * self._spread(mul, x)
        return (y + self._spread(p["bias"], x)).astype(dtype)

    def _block(self, p: Any, x: Array, y: Array, number: int) -> Array:
        """Of a pre-activation ResNet, which reads ``x`` twice."""
        before = self._act(p, self._norm(p, x, y, number), y, number)
        return self._conv3(p, before, y, number) + (y if number % 3 == 0 else x)

    def _act(self, p: Any, x: Array, _: Array, number: int) -> Array:
        return ACTIVATIONS[number % len(ACTIVATIONS)](x)

    def _add(self, p: Any, x: Array, y: Array, number: int) -> Array:
        return x + y

    def _mul(self, p: Any, x: Array, y: Array, number: int) -> Array:
        return x * jnp.tanh(y)

    def _pool(self, p: Any, x: Array, _: Array, number: int) -> Array:
        dims = (1, 1, 3, 3) if self.nchw else (1, 3, 3, 1)
        return lax.reduce_window(x, -jnp.inf, lax.max, dims, (1, 1, 1, 1), "SAME")

    def _where(self, p: Any, x: Array, y: Array, number: int) -> Array:
        # Without a jump where x is about y: rounding decides which is taken.
        return jnp.where(x > 0, x, y) if number % 2 else jnp.where(y > x, y, x)

    def _gate(self, p: Any, x: Array, y: Array, number: int) -> Array:
        """Squeeze and excite: by channel, and by image too."""
        mean = y.mean(axis=self._space, keepdims=True)
        return x * jax.nn.sigmoid(mean)

    def _rows(self, p: Any, x: Array, _: Array, number: int) -> Array:
        """What varies with the row is no channel's, however many there are."""
        return x + p["rows"].astype(x.dtype).reshape((H, 1) if self.nchw else (H, 1, 1))

    def _turned(self, p: Any, x: Array, _: Array, number: int) -> Array:
        there = (0, 2, 3, 1) if self.nchw else (0, 3, 1, 2)
        back = (0, 3, 1, 2) if self.nchw else (0, 2, 3, 1)
        return jnp.exp(-jnp.abs(x.transpose(there))).transpose(back)

    def _up(self, p: Any, x: Array, _: Array, number: int) -> Array:
        """A transposed conv, of which every second row and column is kept."""
        form = ("NCHW", "OIHW", "NCHW") if self.nchw else ("NHWC", "HWIO", "NHWC")
        w, size = p["w"].astype(x.dtype), 2 + number % 2
        w = w[:, :, :size, :size] if self.nchw else w[:size, :size]
        y = lax.conv_transpose(x, w, (2, 2), "SAME", dimension_numbers=form)
        y = jax.nn.relu(y + self._spread(p["bias"], y))
        return y[:, :, ::2, 1::2] if self.nchw else y[:, ::2, 1::2]

    def _line(self, p: Any, x: Array, _: Array, number: int) -> Array:
        """A conv over all pixels as one line, or over each row."""
        w = p["w"].astype(x.dtype)
        if self.nchw:
            line, w, form = x.reshape(N, C, H * W), w[:, :, 0], ("NCH", "OIH", "NCH")
        else:
            line, w, form = x.reshape(N * H, W, C), w[0], ("NHC", "HIO", "NHC")
        y = lax.conv_general_dilated(line, w, (1,), "SAME", dimension_numbers=form)
        return y.reshape(x.shape) * 2 + self._spread(p["bias"], x)

    def _channels(self, p: Any, x: Array, y: Array, number: int) -> Array:
        """A product with the weight first, as ``vmap`` leaves it."""
        w = (p["w"][:, :, 0, 0] if self.nchw else p["w"][0, 0]).astype(x.dtype)
        if self.nchw:
            made = jnp.einsum("oc,nchw->onhw", w, x).transpose(1, 0, 2, 3)
        else:
            made = jnp.einsum("oc,nhwc->onhw", w, x).transpose(1, 2, 3, 0)
        made = made + self._spread(p["bias"], x)
        return made + y if number % 2 else made

    def _attend(self, p: Any, x: Array, y: Array, number: int) -> Array:
        """Products of activations, over heads that are split off the channels."""
        x = x if not self.nchw else x.transpose(0, 2, 3, 1)
        q = x.reshape(N, H * W, 2, C // 2)
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, q) * (C * H * W) ** -0.5
        made = jnp.einsum("nhqk,nkhd->nqhd", jnp.tanh(scores), q) / (H * W)
        made = made.reshape(N, H, W, C)
        return made if not self.nchw else made.transpose(0, 3, 1, 2)

    def _cast(self, p: Any, x: Array, _: Array, number: int) -> Array:
        return x.astype(jnp.bfloat16 if number % 2 else jnp.float32)


NAMES = [
    name[1:] for name in vars(Program) if name.startswith("_") and "__" not in name
]
NAMES = sorted(set(NAMES) - {"space", "spread"})
STEP = st.tuples(
    # Convs most often: without one there is nothing to see.
    st.one_of(st.sampled_from(NAMES), st.sampled_from(["conv3", "conv1"])),
    # Mostly the last one, or one shortly before.
    st.one_of(st.just(-1), st.integers(-3, 5)),
    st.integers(-4, 8),
    st.integers(0, 10),
)
PROGRAMS = st.builds(
    Program,
    nchw=st.booleans(),
    half=st.booleans(),
    steps=st.lists(STEP, min_size=2, max_size=12).map(tuple),
    outputs=st.lists(st.integers(0, 12), max_size=2).map(tuple),
    head=st.booleans(),
)


def check_close(got: Array, want: Array, bound: float) -> None:
    got, want = (np.asarray(v, np.float64) for v in (got, want))
    assert got.shape == want.shape
    scale = max(np.linalg.norm(want), 1e-3 * want.size**0.5)
    assert np.linalg.norm(got - want) <= bound * scale


def check_ir(site: Any, bound: float) -> None:
    """The region's IR in float32, which rounds nowhere, against its reference."""
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    truths = measure.truth(site, operands)
    found = reference_fun(site.reference)(*operands)
    for output, truth in zip(found, truths, strict=True):
        check_close(output.reshape(truth.shape), truth, bound)


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES <= 60,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(PROGRAMS, st.integers(0, 2**16))
# Blocks, one after the other: sums are stored, and what the next conv reads.
@example(Program(False, False, (("block", -1, 0, 1),) * 4, (2, 3), True), 4)
@example(Program(True, True, (("block", -1, -2, 3),) * 4, (), False), 1)
# A vector along the rows, of as many as there are channels.
@example(Program(True, False, (("conv3", 0, 0, 0), ("rows", -1, 0, 0)), (), False), 1)
def test_programs_gradients_and_regions(drawn: Program, seed: int) -> None:
    # Users' code is not held to what ours is.
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        check(drawn, seed)


def test_blocks_store_their_sums() -> None:
    blocks = Program(False, False, (("block", -1, 0, 1),) * 4, (), False)
    rng = np.random.default_rng(0)
    args = blocks.parameters(rng), blocks.image(rng)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        traced, _ = program.trace(blocks, (), args, {}, options.Options())
    stored = [len(s.region.epilogue.outputs) for s in traced.family.sites]
    assert stored == [2, 2, 2, 1]


def check(drawn: Program, seed: int) -> None:
    rng = np.random.default_rng(seed)
    args = drawn.parameters(rng), drawn.image(rng)
    leaves = jax.tree.leaves(args)
    rewritten, _ = program.trace(drawn, (), args, {}, options.Options())
    fun = jaxpr_as_fun(rewritten.program)

    def ours(*args: Any) -> list[Array]:
        return list(fun(*jax.tree.leaves(args)))

    wanted = drawn(*args)
    halves = drawn.half or "cast" in [name for name, *_ in drawn.steps]
    bound = 2e-2 if halves else 1e-5
    for got, want in zip(fun(*leaves), wanted, strict=True):
        assert got.dtype == want.dtype
        check_close(got, want, bound)
    for site in rewritten.family.sites:
        check_ir(site, 5e-2 if halves else 1e-4)
    if seed % 4 == 0 and not halves:

        def loss(f: Callable[..., list[Array]]) -> Callable[..., Array]:
            return lambda *a: sum(jnp.sin(y).sum() for y in f(*a))

        got, want = (jax.grad(loss(f), argnums=(0, 1))(*args) for f in (ours, drawn))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            check_close(a, b, 1e-3)
