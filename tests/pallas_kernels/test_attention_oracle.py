"""The oracle's gradients against central differences of its values, and its values against a sum written out."""

import numpy as np
import oracle
import pytest

RANDOM = np.random.default_rng(0)
PLACE = {"q_offset": 3, "lengths": (13, 11)}
SHAPE = {"block_size": 4, "window_size": 3, "branches": ("compressed", "selected", "window"), **PLACE}


def draw(*shape):
    return RANDOM.standard_normal(shape)


def central_difference(function, x, step=1e-5):
    gradient = np.zeros(x.shape)
    for index in np.ndindex(*x.shape):
        kept = x[index]
        x[index] = kept + step
        above = function()
        x[index] = kept - step
        gradient[index] = (above - function()) / (2 * step)
        x[index] = kept
    return gradient


@pytest.fixture
def arrays():
    return draw(2, 9, 1, 2, 3), draw(2, 14, 1, 3), draw(2, 14, 1, 3)


def test_attend_is_the_softmax_written_out():
    q, k, v = draw(1, 1, 1, 1, 4), draw(1, 3, 1, 4), draw(1, 3, 1, 4)
    visible = np.array([True, False, True]).reshape(1, 1, 1, 3)
    o, lse = oracle.attend(q, k, v, visible)
    a, c = (np.exp(q.ravel() @ k[0, j, 0] / 2) for j in (0, 2))
    np.testing.assert_allclose(o.ravel(), (a * v[0, 0, 0] + c * v[0, 2, 0]) / (a + c), rtol=1e-14)
    np.testing.assert_allclose(lse.ravel(), np.log(a + c), rtol=1e-14)


def test_gradients_of_attend(arrays):
    q, k, v = arrays
    visible = RANDOM.integers(0, 2, (2, 9, 1, 14)).astype(bool)
    visible[0, 2] = False
    do, dlse = draw(*q.shape), draw(*q.shape[:-1])

    def loss():
        o, lse = oracle.attend(q, k, v, visible)
        return (o * do).sum() + (lse * dlse)[lse != oracle.EMPTY_LSE].sum()

    for x, gradient in zip(arrays, oracle.attend_gradient(*arrays, visible, do, dlse), strict=True):
        # Differences of step 1e-5 err by its square and by rounding / step.
        np.testing.assert_allclose(gradient, central_difference(loss, x), atol=1e-8)


@pytest.mark.parametrize(
    "branches", [SHAPE["branches"], ("compressed",), ("selected",), ("window", "compressed")], ids=str
)
def test_gradients_of_nsa(arrays, branches):
    q, k, v = arrays
    gate_logits, do = draw(*q.shape[:-1], 3), draw(*q.shape)
    options = SHAPE | {"branches": branches}
    chosen = oracle.block_selection(q, oracle.block_means(k, 4), block_size=4, block_count=2, **PLACE)

    def loss():
        return (oracle.nsa(q, k, v, gate_logits, chosen, **options) * do).sum()

    gradients = oracle.nsa(q, k, v, gate_logits, chosen, do, **options)
    for x, gradient in zip((q, k, v, gate_logits), gradients, strict=True):
        np.testing.assert_allclose(gradient, central_difference(loss, x), atol=1e-8)


def test_visibility_of_one_query():
    """The query at 9 of a row of 11 keys, blocks of 4: the rules of docs/attention.md by hand."""
    q = np.zeros((1, 1, 1, 1, 1))
    place = {"q_offset": 9, "lengths": (11,)}
    compressed = oracle.compressed_visible(q, 3, block_size=4, **place)
    np.testing.assert_array_equal(compressed.ravel(), [True, True, False])
    np.testing.assert_array_equal(np.flatnonzero(oracle.window_visible(q, 12, window_size=3, **place)), [7, 8, 9])
    selected = oracle.selected_visible(q, 12, np.array([0, 2, -1]).reshape(1, 1, 1, 3), block_size=4, **place)
    np.testing.assert_array_equal(np.flatnonzero(selected), [0, 1, 2, 3, 8, 9])
    # At key 7 the block that ends there is visible, whether or not more keys follow.
    ends = oracle.compressed_visible(q, 2, block_size=4, q_offset=7, lengths=(8,))
    np.testing.assert_array_equal(ends.ravel(), [True, True])
    # A block that reaches past the length does not count.
    cut = oracle.compressed_visible(q, 2, block_size=4, q_offset=6, lengths=(7,))
    np.testing.assert_array_equal(cut.ravel(), [True, False])


def test_choice_of_one_query():
    """Five blocks of one key each, the query at 4: importance follows the keys' values."""
    q = np.ones((1, 1, 1, 1, 1))
    k = np.array([0.0, 2, 1, 2, 0]).reshape(1, 5, 1, 1)
    place = {"block_size": 1, "q_offset": 4, "lengths": (5,)}

    def choose(count, **forced):
        return oracle.block_selection(q, k, block_count=count, **place, **forced).ravel().tolist()

    assert choose(1) == [4]
    assert choose(2) == [1, 4]
    assert choose(4) == [1, 2, 3, 4]
    assert choose(3, init_blocks=1) == [0, 1, 4]
    assert choose(3, local_blocks=2) == [1, 3, 4]
    assert choose(2, local_blocks=0) == [1, 4]
    assert choose(7) == [0, 1, 2, 3, 4, -1, -1]
