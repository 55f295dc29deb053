# SPDX-License-Identifier: Apache-2.0
"""A region's IR, evaluated, is what its reference jaxpr computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import region_cases as cases

from jax_bolt._src.primitive import reference_fun
from jax_bolt._src.tune import measure

F32 = jnp.float32
TOLERANCE = {"bf16": 2e-2, "f16": 3e-3, "f32": 1e-5}


@pytest.mark.parametrize("case", [*cases.GEMMS, *cases.CONVS], ids=str)
def test_ir_and_reference_agree(case):
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1).sets[0]
    reference = reference_fun(site.reference)

    @jax.jit
    def both(operands):
        wanted = measure.truth(site, operands)
        found = [y.astype(F32).reshape(wanted[0].shape) for y in reference(*operands)]
        return list(zip(found, wanted, strict=True))

    for got, want in jax.tree.map(np.asarray, both(operands)):
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < TOLERANCE[site.region.problem.dtype], error


def test_operand_sets_differ():
    """Equal operands would let XLA compute what they share only once."""
    first, second = measure.make_operands(cases.GEMMS[0].site(), l2_bytes=1).sets
    for a, b in zip(first, second, strict=True):
        assert not np.array_equal(a, b)


def test_the_yardstick_sees_what_is_wrong():
    case = cases.CONVS[0]
    site = case.site()
    operands = measure.make_operands(site, l2_bytes=1)
    yardstick = measure.Yardstick(operands)
    (right,) = jax.jit(reference_fun(site.reference))(*operands.sets[0])

    def error(result):
        (found,) = yardstick.errors([result])
        return found

    assert error(right) < TOLERANCE[site.region.problem.dtype]
    assert error(right * 1.5) > 0.1
    assert error(jnp.zeros_like(right)) == 1.0
    assert not error(right.at[(0,) * right.ndim].set(jnp.nan)) < 1e9


def test_the_output_that_is_wrong_decides():
    region = cases.CONVS[0].site().region
    good, bad, nan = (1e-3, 1e-3), (2e-3, 1e-3), (float("nan"), 1e-3)

    def worst(*pairs):
        of_kernel, of_xla = zip(*pairs, strict=True)
        return measure.worst(of_kernel, of_xla, region)

    assert worst(good) == measure.Errors(*good)
    for wrong in (bad, nan, (1e-1, 1e-1)):
        for pairs in ((good, wrong), (wrong, good)):
            assert not measure.is_accurate(worst(*pairs), region)
    fine = worst((1e-3, 1e-3), (4e-3, 4e-3))
    assert measure.is_accurate(fine, region) and fine.kernel == 4e-3
