"""Selected attention for TPU, interpreted, against the reference in float32.

Values to 1e-5 and gradients to 1e-4 of the largest entry: some hundred roundings of float32 (6e-8).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_close
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import selected_attention, tile_lists, tpu
from pallas_kernels.selected_attention import mosaic_tpu, mosaic_tpu_steps

CASES = {
    "ragged": Case(B=2, T=77, S=150, N=1, G=2, D=64, s=32, n=3, q_offset=70, lengths=(150, 101)),
    "group of 7, T not a multiple": Case(B=1, T=150, S=150, N=2, G=7, D=64, s=64, n=2),
    "released sizes": Case(B=1, T=40, S=240, N=1, G=7, D=128, s=64, n=3, q_offset=200),
    "empty row": Case(B=2, T=35, S=35, N=1, G=1, D=64, s=32, n=2, lengths=(0, 35)),
    "wide blocks": Case(B=1, T=20, S=300, N=1, G=8, D=64, s=128, n=2, q_offset=280),
}


def chosen(case, *, sinks=False, duplicates=False):
    """Any blocks, the current one among them or not, with holes; the future ones are to be ignored."""
    generator = np.random.default_rng(case.seed)
    blocks = -(-case.S // case.s)
    indices = np.full((case.B, case.T, case.N, case.n), -1, np.int32)
    for row in np.ndindex(*indices.shape[:3]):
        taken = generator.permutation(blocks)[: generator.integers(0, case.n + 1)]
        indices[row][: len(taken)] = taken
    if sinks:
        indices[..., 0] = 0
    if duplicates:
        indices[..., -1] = indices[..., 0]
    return indices


def values_and_gradients(case, indices, implementation, dtype=jnp.float32):
    arrays = [jnp.asarray(x, dtype) for x in (case.queries(), *case.keys())]
    do, dlse = case.cotangents()
    cotangents = jnp.asarray(do, dtype), jnp.asarray(dlse)

    @jax.jit
    def compiled(arrays, cotangents, q_offset):
        def run(q, k, v):
            options = {"q_offset": q_offset, "lengths": case.array_lengths, "implementation": implementation}
            return selected_attention(q, k, v, indices, block_size=case.s, **options)

        results, pull = jax.vjp(run, *arrays)
        return *results, *pull(cotangents)

    return compiled(arrays, cotangents, case.q_offset)


def check(case, indices, dtype=jnp.float32, value=1e-5, gradient=1e-4):
    actual = values_and_gradients(case, indices, "mosaic_tpu", dtype)
    expected = values_and_gradients(case, indices, "reference", dtype)
    for name, x, y in zip(("o", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert_close(x, y, gradient if name[0] == "d" else value, name)
    np.testing.assert_array_equal(actual[1] == -1e30, expected[1] == -1e30)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients(case):
    check(case, chosen(case))


def test_a_block_that_every_query_chose_and_one_named_twice():
    case = CASES["ragged"]
    check(case, chosen(case, sinks=True, duplicates=True))
