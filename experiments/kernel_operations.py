"""What `experiments.bench_kernels` times: every operation as a function of arrays."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.drawn_cases import draw_choice
from experiments.kernel_floors import TEXT_QUERIES
from experiments.layer_operations import GATE_PARAMETERS, PARAMETERS, draw_layer, run_layer
from pallas_kernels import (
    block_means,
    block_selection,
    compressed_attention,
    nsa_attention,
    prefix_attention,
    registry,
    selected_attention,
    window_attention,
)
from pallas_kernels.common import Scalar
from pallas_kernels.specs import Spec

DENSE = {"cudnn_dense": None, "mosaic_dense": "mosaic_gpu", "xla_dense": "xla", "reference": "reference"}
"""Implementations of dense attention: cuDNN's, and those of `prefix_attention`."""

DENSE_OF = {"nsa_attention": "dense_attention", "nsa_layer": "dense_layer"}
"""What stands beside NSA without it."""

PARTS = ("compressed_attention", "block_selection", "selected_attention", "window_attention")
"""Operations that `nsa_attention` is made of."""

TOKEN_MAJOR = dict.fromkeys(PARTS, "triton") | {"selected_attention": "triton_token_major"}
"""The whole with the selected attention of the published kernels."""

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation under test.

    Attributes:
      call: (spec, implementation, q_offset, *arrays) -> result; implementation "reference" is the float32 reference.
      draw: (spec, seed, choice) -> arrays, the differentiable ones first; choice is a rho, or None for its own.
      differentiable: how many arrays have a gradient.
      query_axes: per array the axis of the queries, None where it has none.
      implementations: names that exist.
      chooses: whether the result depends on which blocks are chosen.
    """

    call: Callable[..., Any]
    draw: Callable[[Spec, int, float | None], Arrays]
    differentiable: int
    query_axes: tuple[int | None, ...]
    implementations: tuple[str, ...]
    chooses: bool = False


def _heads(spec: Spec, seed: Scalar) -> Arrays:
    return spec.draw(seed)[:3]


def _means(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    q, k, v = _heads(spec, seed)
    return q, block_means(k, spec.block_size), block_means(v, spec.block_size)


def _with_lse(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    q, k_blocks, v_blocks = _means(spec, seed, choice)
    return q, k_blocks, compressed_attention(q, k_blocks, v_blocks, block_size=spec.block_size)[1]


def _with_choice(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    return *_heads(spec, seed), draw_choice(spec, choice, seed)


def _whole(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    return *spec.draw(seed), *(() if choice is None else (draw_choice(spec, choice, seed),))


def _nsa_layer(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    assert choice is not None, "a layer is timed with drawn blocks"
    return *draw_layer(spec, seed, gated=True), draw_choice(spec, choice, seed)


def _dense_layer(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
    return draw_layer(spec, seed, gated=False)


def _few_queries(count: int) -> Callable[[Spec, int, float | None], Arrays]:
    def draw(spec: Spec, seed: Scalar, choice: float | None) -> Arrays:
        _, k, v = _heads(spec, seed)
        q, *_ = dataclasses.replace(spec, queries=count).draw(seed)
        return q[:, None], k, v, jnp.full((spec.batch, 1, count), spec.keys, jnp.int32)

    return draw


def _compressed(spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array) -> Any:
    options = {"block_size": spec.block_size, "q_offset": q_offset}
    return compressed_attention(*arrays, **options, implementation=implementation)[0]


def _selection(spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array) -> Any:
    options = {"block_size": spec.block_size, "block_count": spec.block_count, "q_offset": q_offset}
    return block_selection(*arrays, **options, implementation=implementation)


def _selected(spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array) -> Any:
    options = {"block_size": spec.block_size, "q_offset": q_offset}
    return selected_attention(*arrays, **options, implementation=implementation)[0]


def _window(spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array) -> Any:
    options = {"window_size": spec.window_size, "q_offset": q_offset}
    return window_attention(*arrays, **options, implementation=implementation)[0]


def _nsa(
    spec: Spec,
    implementation: str,
    q_offset: Scalar,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate_logits: jax.Array,
    block_indices: jax.Array | None = None,
) -> Any:
    """With drawn blocks, the own choice is made all the same, and thrown away."""
    backend = TOKEN_MAJOR if implementation == "triton_token_major" else implementation
    options = spec.options | {"q_offset": q_offset, "implementation": backend}
    choose_anyway = block_indices is not None and implementation != "reference"
    return nsa_attention(q, k, v, gate_logits, block_indices=block_indices, choose_anyway=choose_anyway, **options)


def _prefix(spec: Spec, implementation: str, q_offset: Scalar, *arrays: jax.Array) -> Any:
    return prefix_attention(*arrays, implementation=implementation)[0]


def _dense(spec: Spec, implementation: str, q_offset: Scalar, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    if implementation == "cudnn_dense":
        heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
        return jax.nn.dot_product_attention(heads, k, v, is_causal=True, implementation="cudnn").reshape(q.shape)
    visible = q_offset + jnp.arange(1, q.shape[1] + 1, dtype=jnp.int32)
    visible = jnp.broadcast_to(visible, (q.shape[0], 1, q.shape[1]))
    return prefix_attention(q[:, None], k, v, visible, implementation=DENSE[implementation])[0][:, 0]


def _block_means(spec: Spec, implementation: str, q_offset: Scalar, k: jax.Array, v: jax.Array) -> Any:
    return block_means(k, spec.block_size), block_means(v, spec.block_size)


def _registered(operation: str) -> tuple[str, ...]:
    return tuple(name for name in registry.available(operation) if name != "reference")


def _whole_implementations() -> tuple[str, ...]:
    names = [name for name in registry.NAMES if name != "reference"]
    backends = {name: TOKEN_MAJOR if name == "triton_token_major" else dict.fromkeys(PARTS, name) for name in names}
    return tuple(
        name for name, backend in backends.items() if all(backend[part] in registry.available(part) for part in PARTS)
    )


OPERATIONS = {
    "nsa_attention": Operation(_nsa, _whole, 4, (1, None, None, 1, 1), _whole_implementations(), chooses=True),
    "dense_attention": Operation(
        _dense, lambda spec, seed, choice: _heads(spec, seed), 3, (1, None, None), tuple(DENSE)[:3]
    ),
    "nsa_layer": Operation(
        functools.partial(run_layer, _nsa, True),
        _nsa_layer,
        2 + PARAMETERS + GATE_PARAMETERS,
        (1, *[None] * (1 + PARAMETERS + GATE_PARAMETERS), 1),
        _whole_implementations(),
        chooses=True,
    ),
    "dense_layer": Operation(
        functools.partial(run_layer, _dense, False),
        _dense_layer,
        2 + PARAMETERS,
        (1, *[None] * (1 + PARAMETERS)),
        tuple(DENSE)[:3],
    ),
    "selected_attention": Operation(
        _selected, _with_choice, 3, (1, None, None, 1), _registered("selected_attention"), chooses=True
    ),
    "compressed_attention": Operation(_compressed, _means, 3, (1, None, None), _registered("compressed_attention")),
    "block_selection": Operation(_selection, _with_lse, 0, (1, None, 1), _registered("block_selection")),
    "window_attention": Operation(
        _window, lambda spec, seed, choice: _heads(spec, seed), 3, (1, None, None), _registered("window_attention")
    ),
    "block_means": Operation(
        _block_means, lambda spec, seed, choice: _heads(spec, seed)[1:], 2, (None, None), ("xla",)
    ),
    "text_queries": Operation(
        _prefix, _few_queries(TEXT_QUERIES), 3, (2, None, None, 2), _registered("prefix_attention")
    ),
    "decode": Operation(_prefix, _few_queries(1), 0, (2, None, None, 2), _registered("prefix_attention")),
}
