"""Attention as the published VideoNSA code computes it (NSAConfig(dialect="released")), for its checkpoint.

Espere-1119-Song/VideoNSA at commit 377eeb9 departs from the paper; a checkpoint trained with it needs its arithmetic.
Point by point, over the whole sequence of T visual and text tokens:

- A visual token is one whose three M-RoPE ids are not all equal. Other tokens keep their places, with queries, keys and
  values of 0: they take softmax mass, and blocks are counted from the start of the sequence.
- Query heads are [all, all again, heads of 0] up to a power of two of at least 16 for each KV head, which slots read in
  order; the output is the mean of the two copies.
- Compressed: query t sees block j when t <= (j + 1) s - 1: its own block and all later ones. A partial last block is
  the mean over what it has.
- Selected: earlier blocks score the sum over a KV head's slots of exp(q . k - LSE), the LSE of the branch above; the
  own block scores 1 a slot, and may lose. The LSE's memory, [slots, T], is read as [T, slots]; in the training copy the
  queries' likewise. The block count is rounded up to a power of two, and ties fall as a bitonic network leaves them.
- Window: tokens t - w + 1 ... t. Gates: sigmoid(logits / temperature), logits of 0 where the token is not visual.
- Dense causal attention with the queries of visual tokens set to 0 is added, its outputs unmasked, so each side adds
  uniform averages to the other's tokens. The evaluation copy leaves out the dense part where every token is visual.

A correctness path in plain XLA: arrays of queries x keys exist for `_QUERIES_AT_ONCE` queries at a time. It meets
arrays recorded from the published code (tests/models/test_released.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from videonsa_jax.configs import NSAConfig

_QUERIES_AT_ONCE = 128
_MIN_SLOTS_PER_KV_HEAD = 16  # of the published kernel
_MASKED = -1e30

type Streams = tuple[Shaped[Array, "B Lv *heads"], Shaped[Array, "B 1 Lt *heads"]]


def slots_per_kv_head(group_size: int) -> int:
    """Padded query heads of one KV head: both copies of all heads, and heads of 0 (16 for Qwen2.5-VL-7B's G = 7)."""
    return max(_MIN_SLOTS_PER_KV_HEAD, 1 << (2 * group_size - 1).bit_length())


def sequence_places(
    visible_text: Int[Array, "B Lv"],
    visible_visual: Int[Array, "B 1 Lt"],
    visual_lengths: Int[Array, "B"],
    text_lengths: Int[Array, "B 1"],
) -> tuple[Int[Array, "B Lv"], Int[Array, "B Lt"]]:
    """Where each token of the two streams stands in its sequence; padding lies behind all valid tokens.

    Args:
      visible_text: text tokens before each visual token.
      visible_visual: visual tokens before each text token.
      visual_lengths: valid visual tokens.
      text_lengths: valid text tokens.

    Returns:
      Places of the visual and of the text tokens, a permutation of 0 ... Lv + Lt - 1 for each row.
    """
    visual = jnp.arange(visible_text.shape[1], dtype=jnp.int32)
    text = jnp.arange(visible_visual.shape[2], dtype=jnp.int32)
    return (
        jnp.where(visual < visual_lengths[:, None], visual + visible_text, visual + text_lengths),
        jnp.where(text < text_lengths, text + visible_visual[:, 0], text + len(visual)),
    )


def merge_streams(streams: Streams, places: tuple[Int[Array, "B Lv"], Int[Array, "B Lt"]]) -> Array:
    """Interleaves two streams `[B, Lv, ...]` and `[B, 1, Lt, ...]` into sequences `[B, Lv + Lt, ...]`."""
    joined = jnp.concatenate([streams[0], streams[1][:, 0]], axis=1)
    order = jnp.argsort(jnp.concatenate(places, axis=1), axis=1)
    return jnp.take_along_axis(joined, order.reshape(*order.shape, *(1,) * (joined.ndim - 2)), axis=1)


def split_streams(sequence: Array, places: tuple[Int[Array, "B Lv"], Int[Array, "B Lt"]]) -> Streams:
    """What `merge_streams` interleaved, as two streams again."""
    visual, text = (
        jnp.take_along_axis(sequence, place.reshape(*place.shape, *(1,) * (sequence.ndim - 2)), axis=1)
        for place in places
    )
    return visual, text[:, None]


def released_attention(
    query: Float[Array, "B L N G D"],
    key: Float[Array, "B L N D"],
    value: Float[Array, "B L N D"],
    gate_logits: Float[Array, "B L N G 3"],
    is_visual: Bool[Array, "B L"],
    lengths: Int[Array, "B"],
    nsa: NSAConfig,
) -> Float[Array, "B L N G D"]:
    """The published layer's attention over whole sequences, prefill or training; see the module's docstring.

    Args:
      query: after M-RoPE.
      key: after M-RoPE.
      value: values.
      gate_logits: of the compressed, selected and window branch.
      is_visual: whether a token's three M-RoPE ids are not all equal.
      lengths: valid tokens of each sequence (T), which come first.
      nsa: its block_size, block_count, window_size, gate_temperature and released_copy.

    Returns:
      The heads' outputs before the output projection, in the queries' dtype, computed in float32; 0 at padding.
    """

    def attend(*row: Array) -> Array:
        return _attend(*row, nsa=nsa)

    return jax.vmap(attend)(query, key, value, gate_logits, is_visual, lengths)


class _Prepared(NamedTuple):
    """What all queries of a sequence share; P slots for each KV head."""

    slots: Float[Array, "L N P D"]
    key: Float[Array, "L N D"]
    value: Float[Array, "L N D"]
    compressed_key: Float[Array, "blocks N D"]
    compressed_value: Float[Array, "blocks N D"]
    block_sizes: Int[Array, "blocks"]
    slots_read: Float[Array, "L N P D"]
    lse_read: Float[Array, "L N P"]


def _prepare(
    query: Float[Array, "L N G D"],
    key: Float[Array, "L N D"],
    value: Float[Array, "L N D"],
    is_visual: Bool[Array, "L"],
    length: Int[Array, ""],
    nsa: NSAConfig,
) -> _Prepared:
    index = jnp.arange(len(query), dtype=jnp.int32)
    query, key, value = (jnp.where(_under(is_visual, x), x, 0) for x in (query, key, value))
    slots = _padded_heads(query)
    blocks = -(-len(index) // nsa.block_size)
    block_sizes = jnp.clip(length - jnp.arange(blocks) * nsa.block_size, 0, nsa.block_size)
    means = [_block_means(x, block_sizes, nsa.block_size) for x in (key, value)]

    def log_sum_exp(rows: Int[Array, "C"]) -> Float[Array, "C N P"]:
        return jax.nn.logsumexp(_compressed_scores(slots, means[0], block_sizes, rows, nsa), axis=-1)

    lse = _by_chunks(log_sum_exp, index)
    # What the selection kernel reads where it expects query t and slot p: the same place of another layout's memory.
    slot_count, length = slots.shape[1] * slots.shape[2], jnp.maximum(length, 1)
    place = jnp.minimum(index, length - 1)[:, None] * slot_count + jnp.arange(slot_count)
    read_slot, read_index = place // length, place % length

    def read(x: Array) -> Array:
        return x.reshape(len(index), slot_count, *x.shape[3:])[read_index, read_slot].reshape(x.shape)

    slots_read = read(slots) if nsa.released_copy == "training" else slots
    return _Prepared(slots, key, value, *means, block_sizes, slots_read, read(lse))


def _compressed_scores(
    slots: Float[Array, "L N P D"],
    compressed_key: Float[Array, "blocks N D"],
    block_sizes: Int[Array, "blocks"],
    rows: Int[Array, "C"],
    nsa: NSAConfig,
) -> Float[Array, "C N P blocks"]:
    scores = jnp.einsum("cnpd,bnd->cnpb", slots[rows], compressed_key) * slots.shape[-1] ** -0.5
    ends = (jnp.arange(len(block_sizes)) + 1) * nsa.block_size - 1
    visible = (rows[:, None] <= ends) & (block_sizes > 0)
    return jnp.where(visible[:, None, None], scores, _MASKED)


def selected_blocks(
    query: Float[Array, "L N G D"],
    key: Float[Array, "L N D"],
    is_visual: Bool[Array, "L"],
    length: Int[Array, ""],
    nsa: NSAConfig,
) -> Int[Array, "L N S"]:
    """The blocks that each query of one sequence selects, in the published kernel's order; -1 = none.

    S is `nsa.released_block_count`; the arguments are those of `released_attention`, without the batch axis.
    """
    prepared = _prepare(query, key, jnp.zeros_like(key), is_visual, length, nsa)
    return _by_chunks(lambda rows: _choose_blocks(prepared, rows, nsa), jnp.arange(len(query), dtype=jnp.int32))


def _attend(
    query: Float[Array, "L N G D"],
    key: Float[Array, "L N D"],
    value: Float[Array, "L N D"],
    gate_logits: Float[Array, "L N G 3"],
    is_visual: Bool[Array, "L"],
    length: Int[Array, ""],
    *,
    nsa: NSAConfig,
) -> Float[Array, "L N G D"]:
    L, N, G, D = query.shape
    dtype, scale = query.dtype, D**-0.5
    index = jnp.arange(L, dtype=jnp.int32)
    valid = index < length
    is_visual &= valid
    query, key, value = (jnp.where(_under(valid, x), x.astype(jnp.float32), 0) for x in (query, key, value))
    prepared = _prepare(query, key, value, is_visual, length, nsa)
    logits = jnp.where(_under(is_visual, gate_logits), gate_logits.astype(jnp.float32) / nsa.gate_temperature, 0)
    gates = _padded_heads(jax.nn.sigmoid(logits))

    def attend(rows: Int[Array, "C"]) -> Float[Array, "C N G D"]:
        chosen = _choose_blocks(jax.lax.stop_gradient(prepared), rows, nsa)
        causal = index <= rows[:, None]
        in_chosen = jnp.any(chosen[..., None] == jnp.arange(len(prepared.block_sizes)), axis=-2)
        selected = jnp.repeat(in_chosen, nsa.block_size, axis=-1)[..., :L] & causal[:, None]
        window = causal & (index > rows[:, None] - nsa.window_size)
        compressed = _compressed_scores(prepared.slots, prepared.compressed_key, prepared.block_sizes, rows, nsa)
        scores = jnp.einsum("cnpd,lnd->cnpl", prepared.slots[rows], prepared.key) * scale
        branches = (
            _weighted_mean(compressed, prepared.compressed_value),
            _weighted_mean(jnp.where(selected[:, :, None], scores, _MASKED), prepared.value),
            _weighted_mean(jnp.where(window[:, None, None], scores, _MASKED), prepared.value),
        )
        gated = sum(gates[rows, ..., branch, None] * output for branch, output in enumerate(branches))
        copies = gated.reshape(len(rows), -1, D)[:, : 2 * N * G].reshape(len(rows), 2, N, G, D)
        text_query = jnp.where(_under(is_visual[rows], query[rows]), 0, query[rows])
        scores = jnp.einsum("cngd,lnd->cngl", text_query, key) * scale
        dense = _weighted_mean(jnp.where(causal[:, None, None], scores, _MASKED), value)
        if nsa.released_copy == "evaluation":
            dense = jnp.where(jnp.all(is_visual | ~valid), 0, dense)
        return copies.mean(axis=1) + dense

    return jnp.where(_under(valid, query), _by_chunks(attend, index), 0).astype(dtype)


def _under(mask: Bool[Array, "L"], x: Array) -> Array:
    return mask.reshape(-1, *(1,) * (x.ndim - 1))


def _padded_heads(x: Float[Array, "L N G last"]) -> Float[Array, "L N slots last"]:
    """[all heads, all heads again, heads of 0] in checkpoint order, cut into one run of slots for each KV head."""
    L, N, G, last = x.shape
    total = N * slots_per_kv_head(G)
    heads = x.reshape(L, N * G, last)
    rest = jnp.zeros((L, total - 2 * N * G, last), x.dtype)
    return jnp.concatenate([heads, heads, rest], axis=1).reshape(L, N, -1, last)


def _block_means(
    x: Float[Array, "L N D"], block_sizes: Int[Array, "blocks"], block_size: int
) -> Float[Array, "blocks N D"]:
    blocks = len(block_sizes)
    padded = jnp.pad(x, [(0, blocks * block_size - len(x)), (0, 0), (0, 0)])
    sums = padded.reshape(blocks, block_size, *x.shape[1:]).sum(axis=1)
    return sums / jnp.maximum(block_sizes, 1)[:, None, None]


def _weighted_mean(scores: Float[Array, "C N P L"], value: Float[Array, "L N D"]) -> Float[Array, "C N P D"]:
    return jnp.einsum("cnpl,lnd->cnpd", jax.nn.softmax(scores, axis=-1), value)


def _by_chunks(function: Callable[[Array], Array], index: Int[Array, "L"]) -> Array:
    """Maps a function of query rows over all of them, a bounded number at a time, recomputed in the backward pass."""
    L = len(index)
    size = min(_QUERIES_AT_ONCE, L)
    padded = jnp.minimum(jnp.arange(-(-L // size) * size, dtype=jnp.int32), L - 1)
    mapped = jax.lax.map(jax.checkpoint(function), padded.reshape(-1, size))
    return mapped.reshape(-1, *mapped.shape[2:])[:L]


def _choose_blocks(prepared: _Prepared, rows: Int[Array, "C"], nsa: NSAConfig) -> Int[Array, "C N S"]:
    scaled = prepared.slots_read[rows] * prepared.slots.shape[-1] ** -0.5
    scores = jnp.einsum("cnpd,bnd->cnpb", scaled, prepared.compressed_key)
    probabilities = jnp.exp(scores - prepared.lse_read[rows][..., None])
    block, own = jnp.arange(len(prepared.compressed_key)), rows // nsa.block_size
    is_own, is_past = (compare[:, None, None] for compare in (block == own[:, None], block < own[:, None]))
    importance = jnp.where(is_own, 1.0, jnp.where(is_past, probabilities, 0.0)).sum(axis=2)
    C, N, blocks = importance.shape
    return _sorted_blocks(importance.reshape(C * N, blocks), jnp.repeat(own, N), nsa).reshape(C, N, -1)


def _sorted_blocks(scores: Float[Array, "R blocks"], own: Int[Array, "R"], nsa: NSAConfig) -> Int[Array, "R S"]:
    """The kernel's running top half: chunks of `block_size` blocks, sorted and merged by a bitonic network."""
    width = nsa.block_size
    stages = width.bit_length() - 1
    index = np.arange(width)
    alternating = [_merge_steps(stage, (index >> stage & 1).astype(bool)) for stage in range(1, stages)]
    ascending, descending = (_merge_steps(stages, np.full(width, flag)) for flag in (False, True))
    best = jnp.full((len(scores), width), -1.0)
    best_ids = jnp.zeros((len(scores), width), jnp.int32)  # block + 1; 0 = none
    for start in range(0, scores.shape[1], width):
        block = start + index
        chunk = scores[:, start : start + width]
        chunk = jnp.pad(chunk, [(0, 0), (0, width - chunk.shape[1])])
        is_candidate = block <= own[:, None]
        x, ids = jnp.where(is_candidate, chunk, 0.0), jnp.where(is_candidate, block + 1, 0)
        if start:
            x, ids = _run_network(x, ids, [*alternating, ascending])
            # The last half now holds this chunk's best; the first takes the best so far.
            is_first_half = index < width // 2
            x, ids = jnp.where(is_first_half, best, x), jnp.where(is_first_half, best_ids, ids)
            x, ids = _run_network(x, ids, [descending])
        else:
            x, ids = _run_network(x, ids, [*alternating, descending])
        is_active = start <= own[:, None]
        best, best_ids = jnp.where(is_active, x, best), jnp.where(is_active, ids, best_ids)
    return best_ids[:, : nsa.released_block_count] - 1


def _merge_steps(stage: int, descending: Bool[np.ndarray, "width"]) -> np.ndarray:
    """Compare-and-swap steps at distances 2^(stage - 1) ... 1, each as (partner, is left of the pair, descending)."""
    index = np.arange(len(descending))
    distances = [1 << step for step in reversed(range(stage))]
    steps = [np.stack([index ^ distance, index & distance == 0, descending]) for distance in distances]
    return np.stack(steps).astype(np.int32)


def _run_network(
    x: Float[Array, "R width"], ids: Int[Array, "R width"], merges: list[np.ndarray]
) -> tuple[Float[Array, "R width"], Int[Array, "R width"]]:
    """Runs the steps of several merges; equal values change places where `descending`, which decides ties."""

    def compare_and_swap(carry: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], None]:
        (x, ids), (partner, is_left, descending) = carry, step
        other, other_ids = x[:, partner], ids[:, partner]
        is_greater = jnp.where(is_left == 1, x > other, other > x)  # the left of the pair is greater than the right
        swap = is_greater != (descending == 1)
        return (jnp.where(swap, other, x), jnp.where(swap, other_ids, ids)), None

    # A loop, since XLA would fuse the unrolled steps into each other, twice as much work for each.
    return jax.lax.scan(compare_and_swap, (x, ids), jnp.asarray(np.concatenate(merges)))[0]
