import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videonsa_jax.sampling import check_sampling, greedy, sample

PROBABILITIES = np.array([0.1, 0.4, 0.05, 0.3, 0.15])


def drawn(count=2000, **options):
    """How often each of five tokens is drawn."""
    sampling = check_sampling(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0} | options))
    logits = jnp.broadcast_to(jnp.log(PROBABILITIES), (count, 5))
    return np.bincount(np.asarray(jax.jit(sample)(logits, sampling, 0)), minlength=5) / count


def kept(probabilities, *tokens):
    only = np.where(np.isin(np.arange(5), tokens), probabilities, 0)
    return only / only.sum()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, PROBABILITIES),
        ({"temperature": 0.5}, kept(PROBABILITIES**2, *range(5))),
        ({"top_k": 2}, kept(PROBABILITIES, 1, 3)),
        ({"top_k": 9}, PROBABILITIES),
        ({"top_p": 0.69}, kept(PROBABILITIES, 1, 3)),  # 0.4 + 0.3 reach it
        ({"top_p": 0.71}, kept(PROBABILITIES, 1, 3, 4)),
        ({"top_p": 0.3}, kept(PROBABILITIES, 1)),
        # Of the two kept by top-k, the first has 4/7 of their probability.
        ({"top_k": 2, "top_p": 0.5}, kept(PROBABILITIES, 1)),
        ({"top_k": 2, "top_p": 0.6}, kept(PROBABILITIES, 1, 3)),
    ],
)
def test_frequencies(options, expected):
    frequencies = drawn(**options)
    np.testing.assert_array_equal(frequencies > 0, expected > 0)
    # Four standard deviations of a frequency of 2000 draws.
    np.testing.assert_allclose(frequencies, expected, atol=4 * (0.25 / 2000) ** 0.5)


def test_draws_differ_by_step_and_row_and_repeat_by_seed():
    sampling = check_sampling(1.0, 1.0, 0, seed=3)
    logits = jnp.zeros((2, 3, 1000))
    first = sample(logits, sampling, 0)
    assert len(np.unique(first)) == 6
    np.testing.assert_array_equal(sample(logits, sampling, 0), first)
    assert (np.asarray(sample(logits, sampling, 1)) != first).all()


def test_greedy_takes_the_lowest_of_equals():
    np.testing.assert_array_equal(greedy(jnp.array([[1.0, 3.0, 3.0], [0.0, -1.0, -2.0]])), [1, 0])
