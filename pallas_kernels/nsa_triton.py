"""Native Sparse Attention in Triton: the kernels for the gradient rule of `nsa_gpu`."""

import functools
from typing import Any

import jax

from pallas_kernels import gpu_flash, triton_flash, triton_flash_config
from pallas_kernels.block_selection import triton as block_selection
from pallas_kernels.nsa_gpu import HOPPER, Branch, Operations, Settings, Words, chosen_blocks, prepared_lists
from pallas_kernels.selected_attention import gpu_lists, triton_rule
from pallas_kernels.selected_attention import triton as selected_attention
from pallas_kernels.selected_attention import triton_config as selected_config


def _rule(settings: Settings, windowed: bool, q: jax.Array, k: jax.Array) -> triton_flash.Rule:
    window = settings.window_size if windowed else None
    batch, queries, heads, group, _ = q.shape
    return triton_flash.Rule(
        "nsa", window, triton_flash_config.heuristic(queries, k.shape[1], batch * heads, group, window)
    )


def _flash_forward(
    windowed: bool, settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, visible: gpu_flash.Visible
) -> tuple[jax.Array, jax.Array]:
    return triton_flash.attend(_rule(settings, windowed, q, k), q, k, v, visible)


def _flash_backward(
    windowed: bool,
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    visible: gpu_flash.Visible,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return triton_flash.gradients(_rule(settings, windowed, q, k), q, k, v, visible, do, lse, delta)


def _prepare_selected(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    choice: Words | jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[Any, Any]:
    triton_rule.check_covered(q, k, settings.block_size)
    config = _selected_config(q)
    return prepared_lists(settings, config.forward.tokens, config.dq.tokens, k, choice, length, q_offset)


def _selected_forward(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, lists: gpu_lists.TileLists
) -> tuple[jax.Array, jax.Array]:
    return selected_attention.forward(_selected_config(q), q, k, v, lists)


def _selected_backward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    prepared: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    choice, q_offset, lists = prepared
    chosen, config = chosen_blocks(settings, choice), _selected_config(q)
    dq = selected_attention.query_gradient(config, q, k, v, do, lse, delta, lists)
    queries_of = gpu_lists.block_lists(chosen, q_offset, k.shape[1], settings.block_size, config.dkdv.part)
    return dq, *selected_attention.key_gradients(config, q, k, v, do, lse, delta, queries_of)


def _selected_config(q: jax.Array) -> selected_config.Config:
    return selected_config.heuristic(q.shape[1], q.shape[0] * q.shape[2], q.shape[4])


def _choose(
    settings: Settings, q: jax.Array, k_blocks: jax.Array, lse: jax.Array, length: jax.Array, q_offset: jax.Array
) -> Words:
    lengths = length if settings.ragged else None
    return Words(block_selection.block_words(q, k_blocks, lse, **settings.choice, q_offset=q_offset, lengths=lengths))


TRITON = Operations(
    compressed=Branch(
        HOPPER.compressed.prepare,
        functools.partial(_flash_forward, False),
        functools.partial(_flash_backward, False),
    ),
    selected=Branch(_prepare_selected, _selected_forward, _selected_backward),
    window=Branch(
        HOPPER.window.prepare,
        functools.partial(_flash_forward, True),
        functools.partial(_flash_backward, True),
    ),
    choose=_choose,
)
