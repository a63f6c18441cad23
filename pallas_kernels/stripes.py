"""Two stripes of a stream on each rank of a mesh axis, one early and one late, so that causal work balances.

The stream is cut into 2 C stripes of equal length in sequence order, and rank r of C holds stripes r and 2 C - 1 - r.
What a causal query costs grows with its index: two such stripes cost the same on every rank, while of C contiguous
parts the last costs up to twice the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, Shaped


def striped_order(tokens: int, ranks: int) -> Int[np.ndarray, "tokens"]:
    """Which token of the sequence stands at each place of a striped stream.

    Args:
      tokens: T.
      ranks: C.

    Raises:
      ValueError: T does not divide into 2 C stripes.
    """
    if tokens % (2 * ranks):
        raise ValueError(
            f"a stream of {tokens} tokens in two stripes on each of {ranks} ranks, expected a multiple of {2 * ranks}"
        )
    stripes = np.arange(tokens, dtype=np.int32).reshape(2 * ranks, -1)
    early = np.arange(ranks)
    return stripes[np.stack([early, 2 * ranks - 1 - early], axis=1)].reshape(-1)


def stripe_starts(axis: str, length: int) -> tuple[jax.Array, jax.Array]:
    """Inside `shard_map`: indices of the first tokens of this rank's two stripes, each of `length` tokens."""
    rank, ranks = jax.lax.axis_index(axis), jax.lax.axis_size(axis)
    return rank * length, (2 * ranks - 1 - rank) * length


def gather_stripes(x: Shaped[jax.Array, "B L *rest"], axis: str) -> Shaped[jax.Array, "B T *rest"]:
    """Inside `shard_map`: the whole stream in sequence order, from each rank's two stripes."""
    by_rank = jax.lax.all_gather(x, axis, axis=1)
    batch, ranks, length, *rest = by_rank.shape
    early, late = jnp.split(by_rank, 2, axis=2)
    return jnp.concatenate([early, late[:, ::-1]], axis=1).reshape(batch, ranks * length, *rest)
