"""How the next token is chosen from logits."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from videonsa_jax.streams import register_pytree


@register_pytree
@dataclass(frozen=True)
class Sampling:
    """The options of sampling; arrays, so that other values need no other program.

    Attributes:
      temperature: divides the logits.
      top_p: least probability of the kept tokens together (nucleus sampling, arXiv 1904.09751); 1 keeps all.
      top_k: how many tokens are kept; the size of the vocabulary or more keeps all.
      key: the source of randomness.
    """

    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    top_k: Int[Array, ""]
    key: Key[Array, ""]


def check_sampling(temperature: float, top_p: float, top_k: int, seed: int) -> Sampling:
    """The options as arrays.

    Args:
      temperature: 0 is greedy; the others then play no part.
      top_p: in (0, 1].
      top_k: 0 keeps all tokens.
      seed: of the random numbers.

    Raises:
      ValueError: a value out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature}, expected a number of at least 0")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, expected a number above 0 and at most 1")
    if top_k < 0 or int(top_k) != top_k:
        raise ValueError(f"top_k is {top_k}, expected a whole number, 0 for all tokens")
    return Sampling(
        temperature=jnp.float32(temperature or 1.0),
        top_p=jnp.float32(top_p),
        top_k=jnp.int32(top_k or jnp.iinfo(jnp.int32).max),
        key=jax.random.key(seed),
    )


def sample(logits: Float[Array, "*rows V"], sampling: Sampling, step: int | Int[Array, ""]) -> Int[Array, "*rows"]:
    """Draws a token for every row, as transformers orders it: temperature, then top-k, then top-p of what is left.

    A row's draw depends on the key, the step and the row's place alone.

    Args:
      logits: of the next token.
      sampling: the options.
      step: number of the token in the answer.
    """
    shape = logits.shape[:-1]
    logits = logits.reshape(-1, logits.shape[-1]).astype(jnp.float32) / sampling.temperature
    order = jnp.argsort(-logits, axis=-1, stable=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    ranked = jnp.where(jnp.arange(ranked.shape[-1]) < sampling.top_k, ranked, -jnp.inf)
    probabilities = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest token has nothing before it, so one is always left.
    ranked = jnp.where(before < sampling.top_p, ranked, -jnp.inf)
    keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(sampling.key, step), row))(
        jnp.arange(ranked.shape[0])
    )
    drawn = jax.vmap(jax.random.categorical)(keys, ranked)
    return jnp.take_along_axis(order, drawn[:, None], axis=-1)[:, 0].reshape(shape).astype(jnp.int32)


def greedy(logits: Float[Array, "*rows V"]) -> Int[Array, "*rows"]:
    """The likeliest token of every row; of equals the one with the lowest id."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)
