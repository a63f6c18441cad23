"""The composition against the float64 oracle: values to 1e-5, gradients to 1e-4 of the largest entry.

The bounds are those of test_attention_operations. The oracle's choice of blocks is injected: a near-tie must not decide
a comparison of values.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CORNERS, DRAWN, FORMS, Case, assert_close, cases, form
from hypothesis import given

from pallas_kernels import block_means, nsa_attention

forms = pytest.mark.parametrize("form_name", FORMS)


def sizes(case):
    return {"block_size": case.s, "window_size": case.w, "q_offset": case.q_offset, "branches": case.branches}


def inputs(case):
    """q, k, v, gate logits, NaN in all padding."""
    gate_logits = case.draw(case.B, case.T, case.N, case.G, 3)
    return case.queries(), *case.keys(), case.poison(gate_logits, case.q_offset)


def compiled(**options):
    return jax.jit(functools.partial(nsa_attention, **options))


def oracle_choice(case, q, k):
    k_blocks = oracle.block_means(k.astype(np.float64), case.s)
    place = {"block_size": case.s, "q_offset": case.q_offset, "lengths": case.oracle_lengths}
    return oracle.block_selection(q.astype(np.float64), k_blocks, **place, **case.choice)


def check(case, form_name):
    arrays = inputs(case)
    chosen = oracle_choice(case, *arrays[:2])
    do, _ = case.cotangents()
    with form(form_name) as implementation:

        @jax.jit
        def values_and_gradients(arrays, do):
            o, pull = jax.vjp(
                lambda *arrays: nsa_attention(
                    *arrays,
                    **sizes(case),
                    **case.choice,
                    lengths=case.array_lengths,
                    implementation=implementation,
                    block_indices=chosen,
                ),
                *arrays,
            )
            return o, pull(do)

        o, gradients = values_and_gradients(arrays, do)
    arrays64 = [x.astype(np.float64) for x in arrays]
    options = sizes(case) | {"lengths": case.oracle_lengths}
    assert_close(o, oracle.nsa(*arrays64, chosen, **options), 1e-5, "o")
    np.testing.assert_array_equal(np.asarray(o)[case.past], 0)
    expected = oracle.nsa(*arrays64, chosen, do.astype(np.float64), **options)
    for name, x, y in zip(("q", "k", "v", "gate_logits"), gradients, expected, strict=True):
        assert_close(x, y, 1e-4, f"d{name}")
    for i in (0, 3):
        np.testing.assert_array_equal(np.asarray(gradients[i])[case.past], 0)


@forms
@pytest.mark.parametrize("case", CORNERS.values(), ids=CORNERS.keys())
def test_nsa_at_corners(case, form_name):
    check(case, form_name)


@forms
@DRAWN
@given(case=cases())
def test_nsa(case, form_name):
    check(case, form_name)


@forms
@pytest.mark.parametrize("branches", [Case.branches, ("selected",)], ids=str)
def test_nsa_chooses_its_own_blocks(branches, form_name):
    """Whole, without injection; without the compressed branch its probabilities still choose."""
    case = Case(T=90, S=90, n=3, lengths=(90, 71), branches=branches)
    arrays = inputs(case)
    chosen = oracle_choice(case, *arrays[:2])
    assert 0 < (chosen == np.arange(3)).all(-1).mean() < 1, "the case leaves no choice"
    options = sizes(case)
    with form(form_name) as implementation:
        options |= case.choice | {"implementation": implementation}
        o = compiled(**options, lengths=case.array_lengths)(*arrays)
    expected = oracle.nsa(*(x.astype(np.float64) for x in arrays), chosen, **options | {"lengths": case.oracle_lengths})
    assert_close(o, expected, 1e-5, "o")


def test_the_implementations_may_be_mixed():
    case = Case(T=60, S=60)
    arrays = inputs(case)
    options = sizes(case) | case.choice
    mixed = compiled(**options, implementation={"window_attention": "reference", "block_selection": "xla"})(*arrays)
    assert_close(mixed, compiled(**options, implementation="reference")(*arrays), 1e-5, "o")


def test_the_offset_and_the_lengths_are_traced():
    case = Case(T=20, S=100)
    q, k, v, gate_logits = inputs(case)
    traces = []

    @jax.jit
    def run(q_offset, lengths):
        traces.append(1)
        return nsa_attention(q, k, v, gate_logits, **sizes(case) | {"q_offset": q_offset}, lengths=lengths)

    for q_offset in (0, 33, 80):
        place = {"q_offset": q_offset, "lengths": (100, 70)}
        chosen = oracle.block_selection(q, oracle.block_means(k, case.s), block_size=case.s, block_count=32, **place)
        expected = oracle.nsa(q, k, v, gate_logits, chosen, **sizes(case) | place)
        assert_close(run(q_offset, jnp.array([100, 70])), expected, 1e-5, "o")
    assert len(traces) == 1


def test_chunked_prefill_is_the_whole():
    case = Case(T=80, S=80, n=3, w=24)
    q, k, v, gate_logits = inputs(case)
    options = sizes(case) | case.choice
    del options["q_offset"]
    run = jax.jit(lambda q, gate_logits, q_offset: nsa_attention(q, k, v, gate_logits, **options, q_offset=q_offset))
    whole = run(q, gate_logits, 0)
    for a in (0, 7, 40):
        assert_close(run(q[:, a : a + 40], gate_logits[:, a : a + 40], a), whole[:, a : a + 40], 1e-6, "o")


def test_one_branch_does_not_change_the_gates_of_the_others():
    case = Case(T=40, S=40)
    arrays = inputs(case)
    options = sizes(case) | case.choice
    alone = [compiled(**options | {"branches": (branch,)})(*arrays) for branch in case.branches]
    assert_close(sum(alone), compiled(**options)(*arrays), 1e-6, "sum of the branches")
    assert not np.asarray(compiled(**options | {"branches": ()})(*arrays)).any()


def test_means_are_accumulated_in_float32():
    """In bfloat16 a running sum of 64 values near 1 would stop growing at 256 and err by 1/256 before."""
    x = jnp.asarray(1 + np.random.default_rng(0).random((1, 130, 1, 4)) / 8, jnp.bfloat16)
    means = block_means(x, 64)
    assert means.shape == (1, 2, 1, 4)
    assert means.dtype == jnp.bfloat16
    expected = oracle.block_means(np.asarray(x, np.float64), 64)
    np.testing.assert_allclose(np.asarray(means, np.float64), expected, rtol=2**-8)
