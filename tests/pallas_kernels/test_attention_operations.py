"""Every operation against the float64 oracle: values to 1e-5, gradients to 1e-4 of the largest entry.

Both bounds are some hundred roundings of float32 (6e-8), what sums over 100 keys and 70 queries collect.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CORNERS, DRAWN, FORMS, Case, assert_close, cases, form
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels import (
    block_means,
    block_selection,
    compressed_attention,
    merge_by_lse,
    prefix_attention,
    selected_attention,
    window_attention,
)

corners = pytest.mark.parametrize("case", CORNERS.values(), ids=CORNERS.keys())
# test_nsa_attention takes all corners through every operation; these few add the cotangent of the log-sum-exp.
FEW = ("ragged", "later queries", "queries without keys")
few_corners = pytest.mark.parametrize("case", [CORNERS[name] for name in FEW], ids=FEW)
forms = pytest.mark.parametrize("form_name", FORMS)


def values_and_gradients(run, arrays, cotangents):
    """`run(*arrays)` and its pulled-back cotangents, compiled as one."""

    @jax.jit
    def compiled(arrays, cotangents):
        results, pull = jax.vjp(run, *arrays)
        return results, pull(cotangents)

    return compiled(arrays, cotangents)


def check(run, arrays, visible, do, dlse, flat=None):
    """Compares `run(q, k, v) -> o, lse` and its gradients with the oracle under the mask `visible`."""

    (o, lse), gradients = values_and_gradients(run, arrays, (do, dlse))
    assert lse.dtype == jnp.float32
    flat = flat or (lambda x: x)
    arrays64 = [flat(np.asarray(x, np.float64)) for x in arrays]
    expected_o, expected_lse = oracle.attend(*arrays64, visible)
    empty = expected_lse == oracle.EMPTY_LSE
    np.testing.assert_array_equal(np.asarray(flat(lse))[empty], np.float32(-1e30))
    np.testing.assert_array_equal(np.asarray(flat(o))[empty], 0)
    assert_close(flat(o), expected_o, 1e-5, "o")
    assert_close(np.where(empty, 0, flat(lse)), np.where(empty, 0, expected_lse), 1e-5, "lse")
    expected = oracle.attend_gradient(*arrays64, visible, flat(do).astype(np.float64), flat(dlse).astype(np.float64))
    for name, x, y in zip("qkv", gradients, expected, strict=True):
        assert_close(flat(x), y, 1e-4, f"d{name}")


def check_compressed(case, form_name):
    q, (k, v) = case.queries(), case.keys()
    arrays = q, *(np.array(block_means(x, case.s)) for x in (k, v))
    place = {"block_size": case.s, "q_offset": case.q_offset}
    visible = oracle.compressed_visible(q, case.blocks, lengths=case.oracle_lengths, **place)
    with form(form_name) as implementation:

        def run(q, k, v):
            return compressed_attention(q, k, v, lengths=case.array_lengths, implementation=implementation, **place)

        check(run, arrays, visible, *case.cotangents())


def drawn_blocks(case):
    """Any distinct blocks, the current one among them or not, with holes."""
    generator = np.random.default_rng(case.seed)
    blocks = -(-case.S // case.s)
    indices = np.full((case.B, case.T, case.N, case.n), -1, np.int32)
    for row in np.ndindex(*indices.shape[:3]):
        taken = generator.permutation(blocks)[: generator.integers(0, case.n + 1)]
        indices[row][: len(taken)] = taken
    return indices


def check_selected(case, form_name):
    q, (k, v) = case.queries(), case.keys()
    indices = drawn_blocks(case)
    place = {"block_size": case.s, "q_offset": case.q_offset}
    visible = oracle.selected_visible(q, case.S, indices, lengths=case.oracle_lengths, **place)
    with form(form_name) as implementation:

        def run(q, k, v):
            lengths = case.array_lengths
            return selected_attention(q, k, v, indices, lengths=lengths, implementation=implementation, **place)

        check(run, (q, k, v), visible, *case.cotangents())


def check_window(case, form_name):
    q, (k, v) = case.queries(), case.keys()
    place = {"window_size": case.w, "q_offset": case.q_offset}
    visible = oracle.window_visible(q, case.S, lengths=case.oracle_lengths, **place)
    with form(form_name) as implementation:

        def run(q, k, v):
            return window_attention(q, k, v, lengths=case.array_lengths, implementation=implementation, **place)

        check(run, (q, k, v), visible, *case.cotangents())


def check_prefix(case, form_name, rows, own_keys, length_per_row):
    q = case.draw(case.B, rows, case.T, case.N, case.G, case.D)
    generator = np.random.default_rng(case.seed)
    count = generator.integers(0, case.S + 1, (case.B, rows, case.T)).astype(np.int32)
    lengths = generator.integers(0, case.S + 1, (case.B, rows)).astype(np.int32)
    if not length_per_row:
        lengths[:] = np.asarray(case.oracle_lengths)[:, None]
    k, v = (x.copy() for x in case.draw(2, case.B, rows, case.S, case.N, case.D))
    if own_keys:
        for x in (k, v):
            x[np.arange(case.S) >= lengths[..., None]] = np.nan
    else:
        # Shared keys are poisoned past the longest row.
        k, v = k[:, 0], v[:, 0]
        for x in (k, v):
            x[np.arange(case.S) >= lengths.max(1)[:, None]] = np.nan
    k_lengths = lengths if length_per_row else case.array_lengths
    visible = oracle.prefix_visible(q, case.S, count, lengths)
    do, dlse = case.draw(*q.shape)[::-1].copy(), case.draw(*q.shape[:-1])

    def flat(x):
        return np.asarray(x).reshape(case.B * rows, *x.shape[2:])

    with form(form_name) as implementation:

        def run(q, k, v):
            if not own_keys:
                # The oracle knows keys per row only: broadcasting sums their gradients.
                k, v = (x[:, 0] for x in (k, v))
            return prefix_attention(q, k, v, count, k_lengths, implementation=implementation)

        if own_keys:
            check(run, (q, k, v), visible, do, dlse, flat)
        else:
            check_shared_keys(run, q, k, v, visible, do, dlse, flat)


def check_shared_keys(run, q, k, v, visible, do, dlse, flat):
    """As `check`, where the oracle's gradients of keys are summed over the rows that share them."""
    rows = q.shape[1]
    (o, lse), (dq, dk, dv) = values_and_gradients(run, (q, k[:, None], v[:, None]), (do, dlse))
    arrays = flat(q), *(np.repeat(x, rows, axis=0) for x in (k, v))
    arrays = [x.astype(np.float64) for x in arrays]
    expected_o, expected_lse = oracle.attend(*arrays, visible)
    assert_close(flat(o), expected_o, 1e-5, "o")
    empty = expected_lse == oracle.EMPTY_LSE
    assert_close(np.where(empty, 0, flat(lse)), np.where(empty, 0, expected_lse), 1e-5, "lse")
    expected = oracle.attend_gradient(*arrays, visible, flat(do), flat(dlse))
    assert_close(flat(dq), expected[0], 1e-4, "dq")
    for name, x, y in zip("kv", (dk, dv), expected[1:], strict=True):
        assert_close(x[:, 0], y.reshape(len(k), rows, *y.shape[1:]).sum(1), 1e-4, f"d{name}")


@forms
@few_corners
def test_compressed_attention_at_corners(case, form_name):
    check_compressed(case, form_name)


@forms
@DRAWN
@given(case=cases())
def test_compressed_attention(case, form_name):
    check_compressed(case, form_name)


@forms
@few_corners
def test_selected_attention_at_corners(case, form_name):
    check_selected(case, form_name)


@forms
@DRAWN
@given(case=cases())
def test_selected_attention(case, form_name):
    check_selected(case, form_name)


@forms
@few_corners
def test_window_attention_at_corners(case, form_name):
    check_window(case, form_name)


@forms
@DRAWN
@given(case=cases())
def test_window_attention(case, form_name):
    check_window(case, form_name)


@forms
@few_corners
@pytest.mark.parametrize("own_keys", [False, True], ids=["shared keys", "own keys"])
def test_prefix_attention_at_corners(case, form_name, own_keys):
    check_prefix(case, form_name, rows=2, own_keys=own_keys, length_per_row=own_keys)


@forms
@DRAWN
@given(case=cases(), rows=st.integers(1, 3), own_keys=st.booleans(), length_per_row=st.booleans())
def test_prefix_attention(case, form_name, rows, own_keys, length_per_row):
    check_prefix(case, form_name, rows, own_keys, length_per_row)


def check_selection(case, form_name):
    """Places differ from the oracle's only where importances are within 1e-5: float32's error of exp(logit - lse)."""
    q, (k, _) = case.queries(), case.keys()
    k_blocks = np.array(block_means(k, case.s))
    place = {"block_size": case.s, "q_offset": case.q_offset}
    with form(form_name) as implementation:

        @jax.jit
        def run(q, k_blocks):
            options = {"lengths": case.array_lengths, "implementation": implementation, **place}
            _, lse = compressed_attention(q, k_blocks, k_blocks, **options)
            return block_selection(q, k_blocks, lse, **options, **case.choice)

        chosen = np.asarray(run(q, k_blocks))
    place["lengths"] = case.oracle_lengths
    q64, k64 = q.astype(np.float64), k_blocks.astype(np.float64)
    expected = oracle.block_selection(q64, k64, **place, **case.choice)
    assert chosen.dtype == np.int32
    assert chosen.shape == expected.shape
    # Importances of a partial last block are never compared: it is the current one.
    importance = oracle.block_importance(q64, k64, **place)
    for row in np.ndindex(*chosen.shape[:3]):
        ours, theirs = chosen[row], expected[row]
        count = (theirs >= 0).sum()
        assert (ours[count:] == -1).all()
        assert (np.diff(ours[:count]) > 0).all()
        assert (ours[:count] >= 0).all()
        swapped_in, swapped_out = set(ours) - set(theirs), set(theirs) - set(ours)
        assert len(swapped_in) == len(swapped_out)
        for a, b in zip(sorted(swapped_in), sorted(swapped_out), strict=True):
            assert abs(importance[row][a] - importance[row][b]) <= 1e-5 * importance[row][b]


@forms
@corners
def test_block_selection_at_corners(case, form_name):
    check_selection(case, form_name)


@forms
@DRAWN
@given(case=cases())
def test_block_selection(case, form_name):
    check_selection(case, form_name)


@forms
def test_equal_importance_takes_the_lower_block(form_name):
    q, k_blocks = np.ones((1, 160, 1, 2, 8), np.float32), np.ones((1, 10, 1, 8), np.float32)
    with form(form_name) as implementation:

        @jax.jit
        def run(q, k_blocks):
            options = {"block_size": 16, "implementation": implementation}
            _, lse = compressed_attention(q, k_blocks, k_blocks, **options)
            return block_selection(q, k_blocks, lse, block_count=4, **options)

        chosen = np.asarray(run(q, k_blocks))
    np.testing.assert_array_equal(chosen[0, 150, 0], [0, 1, 2, 9])
    np.testing.assert_array_equal(chosen[0, 20, 0], [0, 1, -1, -1])


@forms
def test_no_gradient_flows_through_the_choice(form_name):
    case = Case(T=60, S=60)
    q, (k, _) = case.queries(), case.keys()
    k_blocks = block_means(k, case.s)
    with form(form_name) as implementation:

        def score(q, k_blocks):
            options = {"block_size": case.s, "implementation": implementation}
            _, lse = compressed_attention(q, k_blocks, k_blocks, **options)
            return block_selection(q, k_blocks, lse, block_count=2, **options).astype(jnp.float32).sum()

        for gradient in jax.jit(jax.grad(score, argnums=(0, 1)))(q, k_blocks):
            np.testing.assert_array_equal(gradient, 0)


def test_merging_by_lse_is_attention_over_the_union():
    case = Case(T=40, S=60, B=1, N=1)
    q, (k, v) = case.queries(), case.keys()
    generator = np.random.default_rng(1)
    part = generator.integers(0, 2, (1, 40, 1, 60)).astype(bool)
    part[:, 3], part[:, 4] = True, False
    visible = np.ones_like(part)
    visible[:, 5] = False
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    first = oracle.attend(*arrays, part & visible)
    second = oracle.attend(*arrays, ~part & visible)
    expected = oracle.attend(*arrays, visible)
    as32 = [tuple(x.astype(np.float32) for x in pair) for pair in (first, second)]
    o, lse = merge_by_lse(*as32)
    assert_close(o, expected[0], 1e-5, "o")
    np.testing.assert_allclose(lse, expected[1], rtol=1e-5, atol=1e-5)

    gradients = jax.jit(jax.grad(lambda parts: sum(x.sum() for x in merge_by_lse(*parts))))(as32)
    for x in jax.tree.leaves(gradients):
        assert np.isfinite(x).all()
        np.testing.assert_array_equal(x[:, 5], 0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("form_name", ["reference", "xla"])
def test_narrow_types_keep_float32_sums(form_name, dtype):
    """2e-2 is some roundings of bfloat16 (4e-3) in the probabilities, the output and the products of the gradient."""
    case = Case(T=70, S=70, w=64)
    q, (k, v) = case.queries(), case.keys()
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    visible = oracle.window_visible(q, case.S, window_size=64, q_offset=0, lengths=case.oracle_lengths)
    arrays64 = [np.asarray(x, np.float64) for x in arrays]
    do, dlse = case.cotangents()

    def run(q, k, v):
        return window_attention(q, k, v, window_size=64, implementation=form_name)

    (o, lse), gradients = values_and_gradients(run, arrays, (jnp.asarray(do, dtype), dlse))
    assert o.dtype == dtype
    assert lse.dtype == jnp.float32
    expected_o, expected_lse = oracle.attend(*arrays64, visible)
    assert_close(o, expected_o, 1e-2, "o")
    assert_close(lse, expected_lse, 1e-5, "lse")
    expected = oracle.attend_gradient(*arrays64, visible, do.astype(np.float64), dlse.astype(np.float64))
    for x, y in zip(gradients, expected, strict=True):
        assert x.dtype == dtype
        assert_close(x, y, 2e-2, "gradient")


@forms
def test_results_are_the_same_bits_twice(form_name):
    case = Case(T=60, S=60)
    q, (k, v) = case.queries(), case.keys()
    indices = drawn_blocks(case)
    with form(form_name) as implementation:
        run = jax.jit(
            jax.value_and_grad(
                lambda q, k, v: selected_attention(q, k, v, indices, block_size=16, implementation=implementation)[
                    0
                ].sum(),
                argnums=(0, 1, 2),
            )
        )
        first, second = run(q, k, v), run(q, k, v)
    jax.tree.map(np.testing.assert_array_equal, first, second)
