"""Triton kernels of the token-major design: a program per (token, KV head), and one per block taking token by token."""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels.selected_attention.triton_rows import (
    BLOCK,
    EMPTY,
    HIDDEN,
    first_key,
    first_row,
    key_offsets,
    row_offsets,
    shift_of,
    store_attention,
    store_key_gradients,
)

PADDED = tl.constexpr(16)
"""Rows of a token: its query heads and zeros, up to the fewest that a product takes."""


@triton.jit
@no_type_check
def forward_kernel(
    q,
    k,
    v,
    chosen,
    offset,
    o,
    lse,
    scale: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """A program per query of one KV head reads the query's own blocks; `offset` [1] is q_offset."""
    query, row = tl.program_id(0), tl.program_id(1)
    group_row = tl.arange(0, PADDED)
    inside = group_row < GROUP
    above = first_row(row, QUERIES, HEADS, GROUP)
    q, o, lse = q + above * SIZE, o + above * SIZE, lse + above
    places = row_offsets(query, group_row, HEADS, GROUP)
    pointers = places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    q_tile = tl.load(q + pointers, mask=inside[:, None], other=0.0)
    position = query + tl.load(offset)
    listed = chosen + (row.to(tl.int64) * QUERIES + query) * PLACES
    base = first_key(row, KEYS, HEADS, SIZE)
    offsets = key_offsets(HEADS, SIZE)
    acc = tl.zeros((PADDED, SIZE), tl.float32)
    top = tl.full((PADDED,), EMPTY, tl.float32)
    total = tl.zeros((PADDED,), tl.float32)
    for i in tl.range(0, PLACES):
        # -1 is no block: the first one is read and hidden.
        block = tl.load(listed + i)
        at = base + tl.maximum(block, 0).to(tl.int64) * (BLOCK * HEADS * SIZE)
        k_block, v_block = tl.load(k + at + offsets), tl.load(v + at + offsets)
        seen = (tl.arange(0, BLOCK) + block * BLOCK <= position) & (block >= 0)
        s = tl.where(seen[None, :], tl.dot(q_tile, tl.trans(k_block)) * scale, -HIDDEN)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        p = tl.where(seen[None, :], tl.exp2(s - new_top[:, None]), 0.0)
        rescale = tl.exp2(top - new_top)
        total = total * rescale + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v_block.dtype), v_block, acc * rescale[:, None])
        top = new_top
    store_attention(o, lse, places, inside, acc, top, total, SIZE)


@triton.jit
@no_type_check
def query_gradient_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    chosen,
    offset,
    dq,
    scale: tl.constexpr,
    factor: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The forward's walk with the probabilities from the log-sum-exp; `factor` is that of the logits."""
    query, row = tl.program_id(0), tl.program_id(1)
    group_row = tl.arange(0, PADDED)
    inside = group_row < GROUP
    above = first_row(row, QUERIES, HEADS, GROUP)
    q, do, dq = q + above * SIZE, do + above * SIZE, dq + above * SIZE
    lse, delta = lse + above, delta + above
    places = row_offsets(query, group_row, HEADS, GROUP)
    pointers = places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    q_tile = tl.load(q + pointers, mask=inside[:, None], other=0.0)
    do_tile = tl.load(do + pointers, mask=inside[:, None], other=0.0)
    shift = shift_of(tl.load(lse + places, mask=inside, other=EMPTY))
    row_delta = tl.load(delta + places, mask=inside, other=0.0)
    position = query + tl.load(offset)
    listed = chosen + (row.to(tl.int64) * QUERIES + query) * PLACES
    base = first_key(row, KEYS, HEADS, SIZE)
    offsets = key_offsets(HEADS, SIZE)
    acc = tl.zeros((PADDED, SIZE), tl.float32)
    for i in tl.range(0, PLACES):
        block = tl.load(listed + i)
        at = base + tl.maximum(block, 0).to(tl.int64) * (BLOCK * HEADS * SIZE)
        k_block, v_block = tl.load(k + at + offsets), tl.load(v + at + offsets)
        seen = (tl.arange(0, BLOCK) + block * BLOCK <= position) & (block >= 0)
        s = tl.dot(q_tile, tl.trans(k_block)) * scale
        dp = tl.dot(do_tile, tl.trans(v_block))
        ds = tl.where(seen[None, :], tl.exp2(s - shift[:, None]) * (dp - row_delta[:, None]), 0.0)
        acc = tl.dot(ds.to(k_block.dtype), k_block, acc)
    # The cotangent of a query without keys may be NaN.
    gradient = tl.where((shift >= HIDDEN)[:, None], 0.0, acc * factor)
    tl.store(dq + pointers, gradient.to(dq.dtype.element_ty), mask=inside[:, None])


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
):
    """A program per part of a block's list takes its queries one by one."""
    item = items + tl.program_id(0) * 7
    row, block = tl.load(item), tl.load(item + 1)
    if row >= 0:
        begin, end = tl.load(item + 2), tl.load(item + 3)
        slot, origin = tl.load(item + 5), tl.load(item + 6)
        base = first_key(row, KEYS, HEADS, SIZE) + block.to(tl.int64) * (BLOCK * HEADS * SIZE)
        offsets = key_offsets(HEADS, SIZE)
        above = first_row(row, QUERIES, HEADS, GROUP)
        q_row, do_row, lse_row, delta_row = q + above * SIZE, do + above * SIZE, lse + above, delta + above
        k_block, v_block = tl.load(k + base + offsets), tl.load(v + base + offsets)
        group_row = tl.arange(0, PADDED)
        inside = group_row < GROUP
        key = tl.arange(0, BLOCK)
        dk_sum = tl.zeros((BLOCK, SIZE), tl.float32)
        dv_sum = tl.zeros((BLOCK, SIZE), tl.float32)
        for i in tl.range(begin, end):
            token = tl.load(tokens + i)
            places = row_offsets(token, group_row, HEADS, GROUP)
            pointers = places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
            q_tile = tl.load(q_row + pointers, mask=inside[:, None], other=0.0)
            do_tile = tl.load(do_row + pointers, mask=inside[:, None], other=0.0)
            shift = shift_of(tl.load(lse_row + places, mask=inside, other=EMPTY))
            row_delta = tl.load(delta_row + places, mask=inside, other=0.0)
            s = tl.where((key <= token - origin)[:, None], tl.dot(k_block, tl.trans(q_tile)) * scale, -HIDDEN)
            p = tl.exp2(s - shift[None, :])
            dv_sum = tl.dot(p.to(do_tile.dtype), do_tile, dv_sum)
            dp = tl.dot(v_block, tl.trans(do_tile))
            ds = p * (dp - row_delta[None, :])
            dk_sum = tl.dot(ds.to(q_tile.dtype), q_tile, dk_sum)
        store_key_gradients(dk, dv, dk_parts, dv_parts, dk_sum * factor, dv_sum, base, slot, HEADS, SIZE)
