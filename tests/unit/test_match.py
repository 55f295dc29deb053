# SPDX-License-Identifier: Apache-2.0
"""Which equations a region takes, and why a root is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import io_callback

import jax_bolt
from jax_bolt._src import canonicalize, ir, match

BF16, F32 = jnp.bfloat16, jnp.float32


def find(fun, *args):
    program = canonicalize.inline_calls(jax.make_jaxpr(fun)(*args))
    return match.find_regions(program.jaxpr)


def one(fun, *args):
    (found,), refused = find(fun, *args)
    assert not refused
    return found


def shape(*dims, dtype=BF16):
    return jax.ShapeDtypeStruct(dims, dtype)


def conv(x, w, **kw):
    kw = {"window_strides": (1, 1), "padding": "SAME"} | kw
    return lax.conv_general_dilated(
        x, w, dimension_numbers=("NHWC", "HWIO", "NHWC"), **kw
    )


X, W = shape(2, 8, 8, 16), shape(3, 3, 16, 32)
WINDOW = (1, 2, 2, 1), (1, 2, 2, 1)
Y, V = shape(2, 8, 8, 32), shape(32, dtype=F32)


def names(found):
    return [op.name for op in found.region.epilogue.ops]


def batch_norm(y, mean, var, scale, offset):
    y = y.astype(F32) - mean
    y = y * (lax.rsqrt(var + F32(1e-5)) * scale)
    return (y + offset).astype(BF16)


def spread(v):
    return v.reshape(1, 1, 1, -1)


def test_live_batch_norm_and_relu_are_one_region():
    def fun(x, w, mean, var, scale, offset):
        y = batch_norm(conv(x, w), *map(spread, (mean, var, scale, offset)))
        return jax.nn.relu(y)

    found = one(fun, X, W, V, V, V, V)
    assert found.label == "conv3x3+bn+relu"
    assert len(found.region.epilogue.vectors) == 4
    assert not found.region.epilogue.sides
    assert found.region.epilogue.out_dtype == "bf16"
    # rsqrt(var + eps) * scale is computed once per channel, not per element.
    same = found.region.epilogue.per_channel()
    assert [n for n, s in zip(names(found), same, strict=True) if not s] == [
        *("acc", "sub", "mul", "add", "max")
    ]


@pytest.mark.parametrize("after", [True, False])
def test_residual_on_either_side_of_the_activation(after):
    def fun(x, w, r):
        y = conv(x, w)
        return jax.nn.relu(y) + r if after else jax.nn.relu(y + r)

    found = one(fun, X, W, Y)
    assert found.region.epilogue.sides == ("bf16",)
    body = [n for n in names(found) if n in ("add", "max")]
    assert body == (["max", "add"] if after else ["add", "max"])


@pytest.mark.parametrize(
    "activation",
    [
        *(jax.nn.relu, jax.nn.relu6, jax.nn.silu, jax.nn.hard_swish, jax.nn.softplus),
        *(jax.nn.mish, jnp.tanh, jax.nn.sigmoid, jax.nn.leaky_relu, jax.nn.elu),
        *(jax.nn.selu, jax.nn.celu, jax.nn.gelu, jax.nn.log_sigmoid, jax.nn.soft_sign),
        lambda x: jax.nn.gelu(x, approximate=False),
        lambda x: jnp.clip(x, -1, 1),
        lambda x: jnp.where(x > 0, x, jnp.exp(x)),
        lambda x: x * x + 2,
    ],
)
def test_any_activation(activation):
    traced = jax.make_jaxpr(lambda x, w: activation(conv(x, w)))(X, W)
    program = canonicalize.inline_calls(traced)
    (found,), _ = match.find_regions(program.jaxpr)
    assert found.output is program.jaxpr.outvars[0]


def stored(found):
    """What each output is: the operation, and the dtype."""
    epilogue = found.region.epilogue
    return [(epilogue.ops[o.value].name, o.dtype) for o in epilogue.outputs]


def test_a_leaking_intermediate_is_an_auxiliary_output():
    def fun(x, w):
        y = conv(x, w) * BF16(2)
        return jax.nn.relu(y), y

    found = one(fun, X, W)
    assert stored(found) == [("max", "bf16"), ("mul", "bf16")]
    assert found.label == "conv3x3+relu+aux"


def test_each_output_has_its_own_dtype():
    def fun(x, w):
        y = conv(x, w)
        return y, jnp.tanh(y.astype(F32))

    assert stored(one(fun, X, W)) == [("tanh", "f32"), ("acc", "bf16")]


@pytest.mark.parametrize(
    "later",
    [
        # What reads it computes it: a reduction, pooling, another root's epilogue.
        lambda z, y: (z.mean((1, 2)), y),
        lambda z, y: (lax.reduce_window(z, BF16(0), lax.max, *WINDOW, "SAME"), y),
        lambda z, y: (jnp.concatenate([z, y], 3), y),
        # Nothing reads it.
        lambda z, y: y,
    ],
)
def test_a_leaking_intermediate_ends_the_region_blocked(later):
    """Where nothing needs what follows in memory."""

    def fun(x, w):
        y = conv(x, w) * BF16(2)
        return later(jax.nn.relu(y), y)

    assert names(one(fun, X, W)) == ["acc", "const", "mul"]


def test_more_auxiliary_outputs_than_a_kernel_has_blocked():
    def fun(x, w):
        y = conv(x, w)
        z = jax.nn.relu(y)
        return jnp.tanh(z), z, y

    # The longest that stores one beside its result.
    assert stored(one(fun, X, W)) == [("max", "bf16"), ("acc", "bf16")]


def test_a_boolean_is_no_auxiliary_output_blocked():
    def fun(x, w):
        y = conv(x, w)
        positive = y > 0
        return jnp.where(positive, y, BF16(0)), positive

    assert stored(one(fun, X, W)) == [("acc", "bf16")]


def test_a_root_reads_what_follows_a_residual():
    """A block of a pre-activation ResNet."""

    def fun(x, w, u, v, r, s):
        total = conv(x, w) + r
        inner = conv(jax.nn.relu(total * s), u)
        return conv(jax.nn.relu(inner), v) + total

    s, u = shape(1, 1, 1, 32), shape(3, 3, 32, 32)
    (first, second, third), _ = find(fun, X, W, u, u, Y, s)
    assert stored(first) == [("max", "bf16"), ("add", "bf16")]
    assert second.inputs[0] is first.outputs[0]
    assert stored(second) == [("max", "bf16")]
    assert stored(third) == [("add", "bf16")]
    assert third.inputs[2] is first.outputs[1]


def test_a_reshape_lies_as_what_it_is_of():
    def fun(x, w, u):
        y = conv(x, w)
        return jax.nn.relu(y).reshape(2, -1) @ u, y

    (first, _), _ = find(fun, X, W, shape(8 * 8 * 32, 8))
    assert stored(first) == [("max", "bf16"), ("acc", "bf16")]


def test_a_loop_reads_what_is_in_memory():
    def fun(x, w):
        y = conv(x, w)
        z = jax.nn.relu(y)
        return y, lax.fori_loop(0, 3, lambda _, c: jnp.sort(c), z)

    assert stored(one(fun, X, W)) == [("max", "bf16"), ("acc", "bf16")]


@pytest.mark.parametrize("reduced", [True, False])
def test_a_region_that_would_wait_for_itself_blocked(reduced):
    """What it reads depends on what it stores: squeeze-and-excite, say."""

    def fun(x, w, u):
        y = conv(x, w)
        gate = y.mean((1, 2), keepdims=True) if reduced else conv(y, u)
        return conv(y * jax.nn.sigmoid(gate), u)

    found, _ = find(fun, X, W, shape(3, 3, 32, 32))
    assert stored(found[0]) == [("acc", "bf16")]


def test_two_regions_that_would_wait_for_each_other_blocked():
    """The first could end at its product, but for what the second one reads."""

    def fun(x, w, u):
        y, z = conv(x, w), conv(x, u)
        return y, z, y * jnp.tanh(z), z * jnp.tanh(y)

    (first, second), _ = find(fun, X, W, W)
    assert stored(first) == [("tanh", "bf16"), ("acc", "bf16")]
    assert stored(second) == [("mul", "bf16"), ("acc", "bf16")]
    assert second.inputs[2] is first.outputs[0]


@pytest.mark.parametrize("prints", [True, False])
def test_effects_stay_in_order_blocked(prints):
    """What is read comes after something that needs what is stored."""

    def fun(x, w):
        y = conv(x, w)
        if prints:
            jax.debug.print("{}", y[0, 0, 0, 0])
        r = io_callback(lambda: np.zeros(Y.shape, BF16), Y)
        return y, y + r

    both = [("add", "bf16"), ("acc", "bf16")]
    assert stored(one(fun, X, W)) == (both[1:] if prints else both)


def test_an_intermediate_that_is_reduced_ends_the_region():
    """Squeeze-and-excite: the scale depends on the root through a reduction."""

    def fun(x, w):
        y = conv(x, w)
        return y * jax.nn.sigmoid(y.mean((1, 2), keepdims=True))

    assert names(one(fun, X, W)) == ["acc"]


def test_values_that_meet_again_stay_inside():
    found = one(lambda x, w: (lambda y: y * jax.nn.sigmoid(y) + y)(conv(x, w)), X, W)
    assert names(found) == ["acc", "logistic", "mul", "add"]


def test_where_two_roots_meet_the_later_one_takes_the_add():
    def fun(x, w, u):
        return jax.nn.relu(conv(x, w) + conv(x, u))

    (first, second), _ = find(fun, X, W, W)
    assert names(first) == ["acc"]
    assert second.region.epilogue.sides == ("bf16",)
    assert second.inputs[2] is first.output


def test_an_axis_that_is_not_the_channels_is_no_vector():
    def fun(x, w, v):
        return conv(x, w) * v.reshape(2, 1, 1, 1)

    assert names(one(fun, X, W, shape(2))) == ["acc"]


def test_more_side_inputs_than_a_kernel_takes_stay_outside():
    def fun(x, w, a, b, c):
        return conv(x, w) + a + b + c

    found = one(fun, X, W, Y, Y, Y)
    assert len(found.region.epilogue.sides) == 2
    assert names(found).count("add") == 2


def test_dense_flattens_leading_dims():
    def fun(x, w, b):
        return jax.nn.gelu(jnp.dot(x, w) + b.reshape(1, 1, -1))

    found = one(fun, shape(4, 5, 16), shape(16, 24), shape(24))
    problem = found.region.problem
    assert isinstance(problem, ir.GemmProblem)
    assert (problem.m, problem.n, problem.k, problem.batch) == (20, 24, 16, 1)
    assert len(found.region.epilogue.vectors) == 1


def test_bias_over_several_channel_axes():
    """DenseGeneral's kernel [K, heads, dim] with a bias [heads, dim]."""

    def fun(x, w, b):
        return lax.dot_general(x, w, (((2,), (0,)), ((), ()))) + b[None, None]

    found = one(fun, shape(2, 5, 16), shape(16, 4, 8), shape(4, 8))
    assert found.region.problem.n == 32
    assert len(found.region.epilogue.vectors) == 1


@pytest.mark.parametrize(
    ("spec", "a", "b", "layouts", "batch"),
    [
        ("mk,kn->mn", (4, 8), (8, 6), ("row", "row"), 1),
        ("km,kn->mn", (8, 4), (8, 6), ("col", "row"), 1),
        ("mk,nk->mn", (4, 8), (6, 8), ("row", "col"), 1),
        ("bmk,bkn->bmn", (3, 4, 8), (3, 8, 6), ("row", "row"), 3),
        ("bkm,bnk->bmn", (3, 8, 4), (3, 6, 8), ("col", "col"), 3),
    ],
)
def test_layouts_of_a_product(spec, a, b, layouts, batch):
    found = one(lambda x, y: jnp.einsum(spec, x, y), shape(*a), shape(*b))
    problem = found.region.problem
    assert isinstance(problem, ir.GemmProblem)
    assert (problem.a_layout, problem.b_layout) == layouts
    assert problem.batch == batch


def test_casts_of_a_vector_round_and_casts_of_the_accumulator_do_not():
    def fun(x, w, b):
        b = spread(b.astype(BF16).astype(F32))
        return (conv(x, w).astype(F32) * 2 + b).astype(BF16)

    assert "to_bf16" in names(one(fun, X, W, V))
    assert names(one(lambda x, w: conv(x, w).astype(F32), X, W)) == ["acc"]


def test_reshapes_and_transposes_between_the_equations_stay_inside():
    """As ``vmap`` leaves a layer whose weight comes first."""

    def fun(x, w, b, r):
        y = lax.dot_general(w, x, (((1,), (2,)), ((), ()))).transpose(1, 2, 0)
        y = (y + b.reshape(1, 1, -1)).reshape(2, 5, 4, 6)
        return jax.nn.relu(y * BF16(2)) + r

    args = shape(2, 5, 16), shape(24, 16), shape(24), shape(2, 5, 4, 6)
    found = one(fun, *args)
    problem = found.region.problem
    assert isinstance(problem, ir.GemmProblem)
    assert (problem.m, problem.n, problem.a_layout, problem.b_layout) == (
        *(10, 24),
        *("row", "col"),
    )
    body = ["add", "const", "mul", "const", "max", "side", "add"]
    assert names(found) == ["acc", "vector", *body]
    assert not found.is_rearranged


def test_a_reshape_across_rows_and_channels_ends_the_region():
    found = one(
        lambda x, w: (x @ w).reshape(16, 3) * BF16(2), shape(6, 16), shape(16, 8)
    )
    assert names(found) == ["acc"]


def test_a_transpose_that_stays_ends_the_region():
    """XLA moves the result and adds to it in one go."""

    def fun(x, w, b, r):
        return (jnp.dot(x, w) + b.reshape(1, 1, -1)).mT + r

    args = shape(2, 5, 16), shape(16, 24), shape(24), shape(2, 24, 5)
    assert names(one(fun, *args)) == ["acc", "vector", "add"]


def test_a_vector_is_read_where_its_axis_is_the_channels():
    """Rows as many as channels: after a transpose a vector along them is none."""

    def fun(x, w, v):
        return ((x @ w + v[None]).T + v[None]).T

    found = one(fun, shape(8, 16), shape(16, 8), shape(8))
    assert names(found) == ["acc", "vector", "add"]


@pytest.mark.parametrize(
    ("spec", "a", "b", "rearranged"),
    [
        ("bqhd,bkhd->bhqk", (2, 5, 3, 8), (2, 6, 3, 8), 2),
        ("bhqk,bkhd->bqhd", (2, 3, 5, 6), (2, 6, 3, 8), 1),
        ("btc,ts->bsc", (2, 5, 8), (5, 7), 1),
        ("abc,cbd->ad", (3, 4, 5), (5, 4, 7), 1),
    ],
)
def test_products_in_any_order(spec, a, b, rearranged):
    found = one(lambda x, y: jnp.einsum(spec, x, y), shape(*a), shape(*b))
    assert sum(view is not None for view in found.views) == rearranged


@pytest.mark.parametrize(
    ("numbers", "x", "w", "problem"),
    [
        (("NHC", "HIO", "NHC"), (2, 9, 16), (3, 16, 32), (2, 9, 1, 3, 1)),
        (
            ("NDHWC", "DHWIO", "NDHWC"),
            (2, 3, 9, 7, 16),
            (1, 3, 3, 16, 32),
            (6, 9, 7, 3, 3),
        ),
    ],
)
def test_convs_of_one_and_of_three_dimensions(numbers, x, w, problem):
    strides = (1,) * (len(x) - 2)

    def fun(x, w, v):
        y = lax.conv_general_dilated(x, w, strides, "SAME", dimension_numbers=numbers)
        return jax.nn.relu(y + v.reshape((1,) * (y.ndim - 1) + (-1,)))

    found = one(fun, shape(*x), shape(*w), shape(32))
    p = found.region.problem
    assert isinstance(p, ir.ConvProblem)
    assert (p.n, p.h, p.w, p.r, p.s) == problem
    assert not found.is_rearranged and len(found.region.epilogue.vectors) == 1


@pytest.mark.parametrize(
    ("size", "taps", "channels"),
    [(2, 1, 128), (3, 2, 128), (4, 3, 128)],
)
def test_transposed_convs_have_a_channel_for_each_phase(size, taps, channels):
    def fun(x, w, v, r):
        y = lax.conv_transpose(
            x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(y + v.reshape(1, 1, 1, -1)) + r

    args = X, shape(size, size, 16, 32), shape(32), shape(2, 16, 16, 32)
    found = one(fun, *args)
    p = found.region.problem
    assert isinstance(p, ir.ConvProblem)
    assert (p.h, p.w, p.r, p.s, p.k, p.stride) == (8, 8, taps, taps, channels, (1, 1))
    # A side input would have to be taken apart: XLA adds it to the pixels it moves.
    assert names(found) == ["acc", "vector", "add", "const", "max"]
    assert found.label == f"conv_transpose{size}x{size}+bias+relu"


def test_a_transposed_conv_may_have_fewer_taps_than_its_dilation():
    """Three taps for four results: 16 / 9 of the products, in both axes together."""

    def fun(x, w):
        return lax.conv_transpose(
            x, w, (4, 4), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert one(fun, X, shape(3, 3, 16, 32)).region.problem.k == 16 * 32
    found, (refusal,) = find(fun, X, shape(2, 2, 16, 32))
    assert not found and "has 4 times the products" in refusal.reason


@pytest.mark.parametrize(
    ("fun", "args", "reason"),
    [
        (
            lambda x, w: conv(x, w),
            (shape(2, 8, 8, 4, dtype=jnp.int8),) * 2,
            "dtype int8",
        ),
        (
            lambda x, w: conv(
                *(x, w),
                feature_group_count=4,
                lhs_dilation=(2, 2),
                padding=((1, 1), (1, 1)),
            ),
            (X, shape(3, 3, 4, 32)),
            "feature_group_count=4: transposed conv in groups",
        ),
        (
            lambda x, w: conv(x, w, batch_group_count=2),
            (X, W),
            "batch_group_count=2",
        ),
        (
            lambda x, w: conv(x, w, precision="highest"),
            (shape(2, 8, 8, 16, dtype=F32), shape(3, 3, 16, 32, dtype=F32)),
            "precision=HIGHEST",
        ),
        (
            lambda x, w: conv(x, w, lhs_dilation=(2, 2), padding=((1, 1), (1, 1))),
            (X, W),
            "lhs_dilation=(2, 2): 15 results",
        ),
        (
            lambda x, w: conv(
                x, w, lhs_dilation=(2, 2), rhs_dilation=(2, 1), padding=((2, 3), (1, 2))
            ),
            (X, W),
            "transposed conv with a stride or a dilation",
        ),
        (
            lambda x, w: conv(x, w, lhs_dilation=(2, 2), padding=((0, 1), (0, 1))),
            (X, shape(1, 1, 16, 32)),
            "has 4 times the products as a plain one",
        ),
        (
            lambda x, w: conv(x, w, padding=((-1, 0), (0, 0))),
            (X, W),
            "negative padding",
        ),
        (
            lambda x, w: lax.conv_general_dilated(
                x, w, (1, 1, 1), "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC")
            ),
            (shape(2, 4, 8, 8, 16), shape(3, 3, 3, 16, 32)),
            "3-D conv",
        ),
        (
            lambda x, y: jnp.dot(x, y, precision="highest"),
            (shape(4, 4, dtype=F32),) * 2,
            "precision=HIGHEST",
        ),
        (lambda x, y: jnp.outer(x, y), (shape(4),) * 2, None),
        (lambda x, y: jnp.dot(x, y), (shape(4, 0), shape(0, 4)), "dimension is zero"),
    ],
)
def test_refusals_have_reasons(fun, args, reason):
    if args[0].dtype == jnp.int8:
        args = (args[0], shape(3, 3, 4, 8, dtype=jnp.int8))
    matches, refused = find(fun, *args)
    if reason is None:
        assert all(r.reason for r in refused)
        return
    assert not matches
    assert any(reason in r.reason for r in refused), refused


def test_casts_of_a_vector_round_inside_a_custom_call_too():
    @jax.custom_jvp
    def scaled(y, b):
        return y.astype(F32) * b.astype(BF16).astype(F32)

    scaled.defjvp(lambda p, t: (scaled(*p), scaled(*p)))
    found = one(lambda x, w, b: scaled(conv(x, w), spread(b)), X, W, V)
    assert names(found) == ["acc", "vector", "to_bf16", "mul"]


def test_rounding_methods_are_told_apart():
    for method, name in [
        (lax.RoundingMethod.TO_NEAREST_EVEN, "round_even"),
        (lax.RoundingMethod.AWAY_FROM_ZERO, "round_away"),
    ]:
        found = one(lambda x, w, m=method: lax.round(conv(x, w), m), X, W)
        assert names(found) == ["acc", name]


def test_zeros_of_either_sign_are_two_constants():
    found = one(lambda x, w: jnp.copysign(1, 1) * (conv(x, w) + 0.0) * -0.0, X, W)
    values = [op.attr for op in found.region.epilogue.ops if op.name == "const"]
    assert sorted(str(v) for v in values if v == 0) == ["-0.0", "0.0"]


@pytest.mark.parametrize("multiplier", [1, 2])
def test_a_depthwise_conv_and_its_epilogue_are_one_region(multiplier):
    def fun(x, w, mean, var, scale, offset):
        y = conv(x, w, feature_group_count=16, window_strides=(2, 2))
        y = batch_norm(y, *map(spread, (mean, var, scale, offset)))
        return jax.nn.silu(y)

    k = 16 * multiplier
    found = one(fun, X, shape(3, 3, 1, k), *(shape(k, dtype=F32),) * 4)
    problem = found.region.problem
    assert found.label == "depthwise3x3+bn+silu"
    assert isinstance(problem, ir.ConvProblem)
    assert (problem.groups, problem.c, problem.k) == (16, 16, k)
    assert " g16]" in problem.text
    assert problem.flops == 2 * problem.rows * k * 9
    assert problem.operand_elements == (2 * 8 * 8 * 16, 9 * k)


def test_a_grouped_conv():
    found = one(
        lambda x, w: jax.nn.relu(conv(x, w, feature_group_count=4)),
        X,
        shape(3, 3, 4, 32),
    )
    problem = found.region.problem
    assert found.label == "grouped3x3+relu"
    assert isinstance(problem, ir.ConvProblem)
    assert (problem.groups, problem.group_channels, problem.k) == (4, 4, 32)
    assert problem.flops == 2 * problem.rows * 32 * 9 * 4


def test_a_conv_of_one_channel_is_no_depthwise_one():
    x, w = shape(2, 8, 8, 1), shape(3, 3, 1, 8)
    found = one(lambda x, w: conv(x, w, feature_group_count=1), x, w)
    assert not getattr(found.region.problem, "is_depthwise", True)
    assert " g" not in found.region.problem.text


def test_depthwise_convs_are_exact_in_float32():
    """No tensor cores, no TF32: any precision may be asked for."""
    x, w = shape(2, 8, 8, 16, dtype=F32), shape(3, 3, 1, 16, dtype=F32)
    for precision in (None, "high", "highest"):
        one(
            lambda x, w, p=precision: conv(x, w, feature_group_count=16, precision=p),
            *(x, w),
        )


def test_highest_precision_means_nothing_to_bfloat16():
    one(lambda x, y: jnp.dot(x, y, precision="highest"), shape(4, 4), shape(4, 4))


def test_f64_is_refused():
    with jax.enable_x64(True):
        _, refused = find(jnp.dot, *(shape(4, 4, dtype=jnp.float64),) * 2)
    assert "float64" in refused[0].reason


def test_a_value_that_is_both_operand_and_vector_stays_outside():
    """With one row, the next root's input is per channel, too."""

    def fun(x, w, v):
        y = jax.nn.relu(x @ w)
        return jax.nn.relu(y @ v + y)

    for rows in (1, 2):
        found, refused = find(fun, shape(rows, 8), shape(8, 8), shape(8, 8))
        assert not refused
        first, second = found
        assert second.inputs[0] is first.output and not second.absorbed


def test_roots_of_literals_are_refused():
    w = np.ones((8, 8), np.float32)
    flag = "jax_use_simplified_jaxpr_constants"
    before = getattr(jax.config, flag)
    jax.config.update(flag, True)
    try:
        found, refused = find(lambda x: x @ w, shape(4, 8, dtype=F32))
    finally:
        jax.config.update(flag, before)
    assert not found
    assert [refusal.reason for refusal in refused] == [
        "an operand is a literal of the program"
    ]


def test_a_channel_shuffle_lies_between_two_regions():
    def fun(x, w, u, v):
        y = jax.nn.relu(conv(x, w))
        y = y.reshape(2, 8, 8, 2, 16).swapaxes(3, 4).reshape(2, 8, 8, 32)
        return jax.nn.relu(conv(y, u) + spread(v).astype(BF16))

    (first, second), refused = find(fun, X, W, shape(1, 1, 32, 32), V)
    assert not refused
    assert names(first) == ["acc", "const", "max"]
    assert [n for n in names(second) if n in ("add", "max")] == ["add", "max"]


def test_a_vector_over_shuffled_channels_is_none():
    def fun(x, w, v):
        y = (x @ w).reshape(4, 2, 8).swapaxes(1, 2)
        return (y + v.reshape(1, 8, 2)).swapaxes(1, 2)

    assert names(one(fun, shape(4, 16), shape(16, 16), shape(16))) == ["acc"]


# --- Where a root is, for a reader


LAYER = "def layer(x, w):\n    return x @ w\n"
MODEL = "def apply(layer, x, w):\n    y = 1 * x\n    return layer(y, w)\n"


def defined(path, text):
    """The function of a file ``path`` with ``text``."""
    names = {}
    exec(compile(text, str(path), "exec"), names)
    return next(f for name, f in names.items() if name in ("layer", "apply"))


def name_of(fun):
    return one(fun, shape(4, 4), shape(4, 4)).name


@pytest.mark.parametrize("packages", ["site-packages", "dist-packages"])
def test_a_line_is_the_models_not_a_packages(packages, tmp_path, monkeypatch):
    installed = tmp_path / "project" / "env" / packages / "flax"
    layer = defined(installed / "linear.py", LAYER)
    lift = functools.partial(defined(installed / "lift.py", MODEL), layer)
    model = defined(tmp_path / "project" / "src" / "model.py", MODEL)
    fun = functools.partial(model, lift)
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    assert name_of(fun) == "src/model.py:3:11 (apply)"
    monkeypatch.chdir(tmp_path)
    assert name_of(fun) == "project/src/model.py:3:11 (apply)"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert name_of(fun) == f"{tmp_path}/project/src/model.py:3:11 (apply)"
    (tmp_path / "elsewhere").rmdir()
    assert name_of(fun) == f"{tmp_path}/project/src/model.py:3:11 (apply)"


def test_a_jitted_layer_of_a_package_is_where_it_is_called():
    """Its body is traced once, for all callers, and knows none of them."""
    layer = jax.jit(defined("/env/site-packages/flax/linear.py", LAYER))
    text = "def apply(layer, x, w):\n  y = layer(x, w)\n  return layer(y, w)\n"
    model = defined("/project/model.py", text)
    matches, _ = find(functools.partial(model, layer), shape(4, 4), shape(4, 4))
    assert [match.name for match in matches] == [
        "/project/model.py:2:6 (apply)",
        "/project/model.py:3:9 (apply)",
    ]
    # One of the user's own is told by its own line.
    layer = jax.jit(defined("/project/layer.py", LAYER))
    matches, _ = find(functools.partial(model, layer), shape(4, 4), shape(4, 4))
    assert {match.name for match in matches} == {"/project/layer.py:2:11 (layer)"}


def test_without_a_line_of_the_users_a_package_is_named():
    """Our own are none: a frozen function is called from ours."""
    layer = defined("/env/site-packages/flax/linear.py", LAYER)
    frozen = jax_bolt.freeze(layer, shape(4, 4))
    for fun, args in ((layer, 2), (frozen, 1)):
        (site,) = jax_bolt.explain(fun, *[shape(4, 4)] * args).sites
        assert site.name == site.line == "flax/linear.py:2:11 (layer)"
