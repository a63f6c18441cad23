"""A decoder layer's attention as `experiments.bench_kernels` times it: projections, rope, gates, attention, output.

The parameters are arrays of the operation like any other, so that their gradients are computed, checked and timed.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.common import Scalar
from pallas_kernels.specs import Spec
from videonsa_jax.configs import NSAConfig, TextConfig
from videonsa_jax.models import rope
from videonsa_jax.models.attention import Attention

PARAMETERS = 7
"""Arrays of a layer's parameters: weights and biases of query, key and value, the output's weights."""

GATE_PARAMETERS = 4
"""Weights and biases of the gate MLP."""

Attend = Callable[..., jax.Array]
"""(spec, implementation, q_offset, q, k, v, [gate logits, [block_indices]]) -> heads."""


@functools.cache
def _text_config(spec: Spec) -> TextConfig:
    """Qwen2.5's ratio of heads to width, so that 28 heads of 128 are the 7B model's 3584."""
    half = spec.head_dim // 2
    height = 3 * half // 8
    return TextConfig(
        hidden_size=spec.kv_heads * spec.group_size * spec.head_dim,
        num_attention_heads=spec.kv_heads * spec.group_size,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        mrope_section=(half - 2 * height, height, height),
    )


def hidden_size(spec: Spec) -> int:
    """Width of the layer's hidden states."""
    return _text_config(spec).hidden_size


def _module(spec: Spec, *, gated: bool, dtype: str, seed: Scalar) -> Attention:
    nsa = NSAConfig(block_size=spec.block_size, block_count=spec.block_count, window_size=spec.window_size)
    options = {"rngs": nnx.Rngs(jax.random.key(seed)), "dtype": jnp.dtype(dtype), "param_dtype": jnp.dtype(dtype)}
    return Attention(_text_config(spec), nsa if gated else None, **options)


@functools.cache
def _structure(spec: Spec, *, gated: bool, dtype: str) -> tuple[nnx.GraphDef, jax.tree_util.PyTreeDef]:
    graph, params = nnx.split(nnx.eval_shape(lambda: _module(spec, gated=gated, dtype=dtype, seed=0)))
    return graph, jax.tree.structure(params)


def draw_layer(spec: Spec, seed: Scalar, *, gated: bool) -> tuple[jax.Array, ...]:
    """Hidden states, twice (of queries and of keys), and the parameters.

    Args:
      spec: shape of the heads.
      seed: same seed, same values.
      gated: whether the layer has a gate MLP.
    """
    shape = (spec.batch, spec.keys, hidden_size(spec))
    x = jax.random.normal(jax.random.key(seed), shape, spec.dtype)
    params = nnx.split(_module(spec, gated=gated, dtype=spec.dtype, seed=seed))[1]
    return x, x, *jax.tree.leaves(params)


def run_layer(
    attend: Attend, gated: bool, spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array
) -> jax.Array:
    """The layer's output before the residual.

    Args:
      attend: what is between projections and output.
      gated: whether the layer has a gate MLP, whose logits `attend` then gets.
      spec: shape of the heads.
      implementation: of `attend`.
      q_offset: absolute index of the first query.
      *arrays: from `draw_layer`, and further ones for `attend`.
    """
    x, x_keys, *rest = arrays
    graph, structure = _structure(spec, gated=gated, dtype=str(x.dtype))
    params, further = rest[: structure.num_leaves], rest[structure.num_leaves :]
    layer = nnx.merge(graph, jax.tree.unflatten(structure, params))
    heads = attend(
        spec,
        implementation,
        q_offset,
        layer.queries(x, _tables(spec, x.shape[1], q_offset)),
        *layer.keys_values(x_keys, _tables(spec, x_keys.shape[1], 0)),
        *([layer.gate_logits(x)] if gated else []),
        *further,
    )
    return layer.output(heads)


def _tables(spec: Spec, tokens: int, first: Scalar) -> tuple[jax.Array, jax.Array]:
    config = _text_config(spec)
    positions = jnp.broadcast_to(first + jnp.arange(tokens), (3, spec.batch, tokens))
    return rope.mrope_tables(positions, config.mrope_section, config.rope_theta)
