# SPDX-License-Identifier: Apache-2.0
"""A region's IR, evaluated, is what its reference jaxpr computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

from jax_bolt._src import evaluate, ir
from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import measure

TOLERANCE = {"bf16": 2e-2, "f16": 3e-3, "f32": 1e-5}


@pytest.mark.parametrize("case", [*cases.GEMMS, *cases.CONVS], ids=str)
def test_ir_and_reference_agree(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    lhs, rhs, sides, vectors = measure.split(site, operands)
    if isinstance(site.region.problem, ir.ConvProblem):
        rhs = jnp.transpose(rhs, (3, 0, 1, 2))
    want = evaluate.evaluate(site.region, lhs, rhs, sides, vectors)
    got = jax.jit(reference_fun(site.reference))(*operands)
    got = np.asarray(got, np.float32).reshape(want.shape)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < TOLERANCE[site.region.problem.dtype], error


def test_operand_sets_differ_where_they_should():
    site = cases.GEMMS[0].site()
    first, second = measure.make_operands(site, l2_bytes=1).sets
    lhs, rhs, (side,), vectors = measure.split(site, first)
    other = measure.split(site, second)
    assert not np.array_equal(lhs, other[0])
    assert not np.array_equal(side, other[2][0])
    assert rhs is other[1] and vectors[0] is other[3][0]
