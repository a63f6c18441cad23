"""The order of a striped stream, and what it does for causal work; sharded_check has it on devices."""

import numpy as np
import pytest

from pallas_kernels.stripes import striped_order

TOKENS, RANKS = 1024, 8


def largest_over_mean(work_of_token, order):
    of_ranks = work_of_token[order].reshape(RANKS, -1).sum(axis=1)
    return of_ranks.max() / of_ranks.mean()


def test_a_rank_holds_an_early_and_a_late_stripe():
    assert striped_order(12, 2).tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]


def test_causal_work_balances():
    causal_pairs = np.arange(TOKENS) + 1
    assert largest_over_mean(causal_pairs, striped_order(TOKENS, RANKS)) == 1.0
    assert largest_over_mean(causal_pairs, np.arange(TOKENS)) > 1.87  # of C contiguous parts: near (2 C - 1) / C


def test_a_stream_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"a stream of 100 tokens .* 8 ranks, expected a multiple of 16"):
        striped_order(100, 8)
