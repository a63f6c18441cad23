"""Triton kernels of the tile-union design: forward and dq over tiles of queries, dk and dv over a block's queries."""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selected_attention.triton_rows import (
    BLOCK,
    EMPTY,
    HIDDEN,
    ROWS,
    first_key,
    first_row,
    gathered_rows,
    key_offsets,
    row_offsets,
    shift_of,
    soften,
    store_attention,
    store_key_gradients,
)


@triton.jit
@no_type_check
def _causal(s, block, start, token):
    """Hides the keys of the block that come after the row's token, counted from the tile's first at `start`."""
    key = tl.arange(0, BLOCK)[None, :] + (block * BLOCK - start)
    return tl.where(key <= token[:, None], s, -HIDDEN)


@triton.jit
@no_type_check
def forward_kernel(
    q,
    k,
    v,
    entries,
    tiles,
    o,
    lse,
    scale: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """A program per tile of TOKENS queries of one KV head: the union of their blocks, read once.

    `scale` is that of logits to the base of 2; NUMBERS are a tile's in `entries`.
    """
    row = tl.program_id(1)
    tile = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count, whole = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    start, last = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    entry = entries + tile * NUMBERS

    r = tl.arange(0, TOKENS * ROWS)
    token, group_row = r // ROWS, r % ROWS
    query = tl.program_id(0) * TOKENS + token
    above = first_row(row, QUERIES, HEADS, GROUP)
    q, o, lse = q + above * SIZE, o + above * SIZE, lse + above
    places = row_offsets(query, group_row, HEADS, GROUP)
    channel = tl.arange(0, SIZE)[None, :]
    # What lies past the row's length may hold NaN.
    readable = (group_row < GROUP) & (query <= last)
    q_tile = tl.load(q + places[:, None] * SIZE + channel, mask=readable[:, None], other=0.0)

    base = first_key(row, KEYS, HEADS, SIZE)
    offsets = key_offsets(HEADS, SIZE)
    acc = tl.zeros((TOKENS * ROWS, SIZE), tl.float32)
    top = tl.full((TOKENS * ROWS,), EMPTY, tl.float32)
    total = tl.zeros((TOKENS * ROWS,), tl.float32)
    # An entry is read one step ahead of its block, so that the block's copy never waits for its index.
    block, mask = tl.load(entry), tl.load(entry + 1)
    for i in tl.range(0, count):
        at = base + block.to(tl.int64) * (BLOCK * HEADS * SIZE)
        k_block, v_block = tl.load(k + at + offsets), tl.load(v + at + offsets)
        s = tl.dot(q_tile, tl.trans(k_block))
        if i >= whole:
            s = _causal(s, block, start, token)
        seen = ((mask >> token) & 1) != 0
        p, top, rescale = soften(s, seen, top, scale)
        total = total * rescale + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * rescale[:, None])
        following = entry + 2 * tl.minimum(i + 1, count - 1)
        block, mask = tl.load(following), tl.load(following + 1)
    store_attention(o, lse, places, (group_row < GROUP) & (query < QUERIES), acc, top, total, SIZE)


@triton.jit
@no_type_check
def _add_to_dq(
    dq,
    q_tile,
    do_tile,
    k_block,
    v_block,
    shift,
    delta,
    block,
    start,
    token,
    scale: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    s = tl.dot(q_tile, tl.trans(k_block))
    dp = tl.dot(do_tile, tl.trans(v_block))
    if CAUSAL:
        s = _causal(s, block, start, token)
    ds = tl.exp2(s * scale - shift[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(k_block.dtype), k_block, dq)


@triton.jit
@no_type_check
def query_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    entries,
    tiles,
    dq,
    scale: tl.constexpr,
    factor: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    """The forward's walk with the probabilities from the log-sum-exp; `factor` is that of the logits."""
    row = tl.program_id(1)
    tile = row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count, whole = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    start, last = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    entry = entries + tile * NUMBERS

    r = tl.arange(0, TOKENS * ROWS)
    token, group_row = r // ROWS, r % ROWS
    query = tl.program_id(0) * TOKENS + token
    above = first_row(row, QUERIES, HEADS, GROUP)
    q, do, dq = q + above * SIZE, do + above * SIZE, dq + above * SIZE
    lse, delta = lse + above, delta + above
    places = row_offsets(query, group_row, HEADS, GROUP)
    pointers = places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    readable = (group_row < GROUP) & (query <= last)
    q_tile = tl.load(q + pointers, mask=readable[:, None], other=0.0)
    do_tile = tl.load(do + pointers, mask=readable[:, None], other=0.0)
    shift = shift_of(tl.load(lse + places, mask=readable, other=EMPTY))
    row_delta = tl.load(delta + places, mask=readable, other=0.0)

    base = first_key(row, KEYS, HEADS, SIZE)
    offsets = key_offsets(HEADS, SIZE)
    acc = tl.zeros((TOKENS * ROWS, SIZE), tl.float32)
    block, mask = tl.load(entry), tl.load(entry + 1)
    # One loop with a condition, as in the forward, was slower here and for dk and dv.
    for i in tl.range(0, whole):
        at = base + block.to(tl.int64) * (BLOCK * HEADS * SIZE)
        k_block, v_block = tl.load(k + at + offsets), tl.load(v + at + offsets)
        row_shift = tl.where(((mask >> token) & 1) != 0, shift, HIDDEN)
        acc = _add_to_dq(
            acc, q_tile, do_tile, k_block, v_block, row_shift, row_delta, block, start, token, scale, CAUSAL=False
        )
        following = entry + 2 * tl.minimum(i + 1, count - 1)
        block, mask = tl.load(following), tl.load(following + 1)
    for i in tl.range(whole, count, num_stages=1):
        at = base + block.to(tl.int64) * (BLOCK * HEADS * SIZE)
        k_block, v_block = tl.load(k + at + offsets), tl.load(v + at + offsets)
        row_shift = tl.where(((mask >> token) & 1) != 0, shift, HIDDEN)
        acc = _add_to_dq(
            acc, q_tile, do_tile, k_block, v_block, row_shift, row_delta, block, start, token, scale, CAUSAL=True
        )
        following = entry + 2 * tl.minimum(i + 1, count - 1)
        block, mask = tl.load(following), tl.load(following + 1)
    # The cotangent of a query without keys may be NaN.
    gradient = tl.where((shift >= HIDDEN)[:, None], 0.0, acc * factor)
    written = (group_row < GROUP) & (query < QUERIES)
    tl.store(dq + pointers, gradient.to(dq.dtype.element_ty), mask=written[:, None])


@triton.jit
@no_type_check
def _add_key_gradients(
    dk,
    dv,
    k_block,
    v_block,
    q,
    do,
    lse,
    delta,
    row,
    token,
    there,
    origin,
    scale: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    group_row = tl.arange(0, TOKENS * ROWS) % ROWS
    places = gathered_rows(row, token, group_row, QUERIES, HEADS, GROUP)
    pointers = places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    readable = there & (group_row < GROUP)
    q_tile = tl.load(q + pointers, mask=readable[:, None], other=0.0)
    do_tile = tl.load(do + pointers, mask=readable[:, None], other=0.0)
    shift = shift_of(tl.load(lse + places, mask=readable, other=EMPTY))
    row_delta = tl.load(delta + places, mask=readable, other=0.0)
    s = tl.dot(k_block, tl.trans(q_tile))
    if CAUSAL:
        s = tl.where(tl.arange(0, BLOCK)[:, None] <= (token - origin)[None, :], s, -HIDDEN)
    p = tl.exp2(s * scale - shift[None, :])
    dv = tl.dot(p.to(do_tile.dtype), do_tile, dv)
    dp = tl.dot(v_block, tl.trans(do_tile))
    ds = p * (dp - row_delta[None, :])
    return tl.dot(ds.to(q_tile.dtype), q_tile, dk), dv


@triton.jit
@no_type_check
def key_gradients_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    tokens,
    items,
    dk,
    dv,
    dk_parts,
    dv_parts,
    scale: tl.constexpr,
    factor: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program per part of a block's list: gathers TOKENS of its queries at a time, so that no product is wasted."""
    item = items + tl.program_id(0) * 7
    row, block = tl.load(item), tl.load(item + 1)
    if row >= 0:
        begin, end, partial_end = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
        slot, origin = tl.load(item + 5), tl.load(item + 6)
        base = first_key(row, KEYS, HEADS, SIZE) + block.to(tl.int64) * (BLOCK * HEADS * SIZE)
        offsets = key_offsets(HEADS, SIZE)
        k_block, v_block = tl.load(k + base + offsets), tl.load(v + base + offsets)

        dk_sum = tl.zeros((BLOCK, SIZE), tl.float32)
        dv_sum = tl.zeros((BLOCK, SIZE), tl.float32)
        steps = (end - begin + TOKENS - 1) // TOKENS
        in_part = (tl.minimum(tl.maximum(partial_end - begin, 0), end - begin) + TOKENS - 1) // TOKENS
        ahead = begin + tl.arange(0, TOKENS * ROWS) // ROWS
        # Tokens are read one step ahead of their rows, as entries are in the kernels over tiles.
        token = tl.load(tokens + ahead, mask=ahead < end, other=0)
        for i in tl.range(0, in_part, num_stages=1):
            there = ahead + i * TOKENS < end
            dk_sum, dv_sum = _add_key_gradients(
                dk_sum,
                dv_sum,
                k_block,
                v_block,
                q,
                do,
                lse,
                delta,
                row,
                token,
                there,
                origin,
                scale,
                QUERIES,
                HEADS,
                GROUP,
                SIZE,
                TOKENS,
                CAUSAL=True,
            )
            following = ahead + (i + 1) * TOKENS
            token = tl.load(tokens + following, mask=following < end, other=0)
        for i in tl.range(in_part, steps):
            there = ahead + i * TOKENS < end
            dk_sum, dv_sum = _add_key_gradients(
                dk_sum,
                dv_sum,
                k_block,
                v_block,
                q,
                do,
                lse,
                delta,
                row,
                token,
                there,
                origin,
                scale,
                QUERIES,
                HEADS,
                GROUP,
                SIZE,
                TOKENS,
                CAUSAL=False,
            )
            following = ahead + (i + 1) * TOKENS
            token = tl.load(tokens + following, mask=following < end, other=0)
        store_key_gradients(dk, dv, dk_parts, dv_parts, dk_sum * factor, dv_sum, base, slot, HEADS, SIZE)
