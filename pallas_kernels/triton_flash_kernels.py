"""Interval attention in Triton: the kernels of the forward pass, of dq, and of dk and dv.

A tile is as many tokens as fit ROWS rows with all heads of one KV head: 18 tokens of 7 heads are 126 of 128 rows. They
share their keys, and a row's place in q is a constant of the tile. Import this module only where Triton is called.
"""

from typing import no_type_check

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_EMPTY_LSE = tl.constexpr(-1e30)
_HIDDEN = tl.constexpr(1e30)


@triton.jit
@no_type_check
def _first_row(batch, token, head, TOKENS: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Place of a token's first query head among all [B, T, N, G]: past 32 bits for long batches."""
    return ((batch.to(tl.int64) * TOKENS + token) * N + head) * G


@triton.jit
@no_type_check
def _rows_of_tile(ROWS: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Token of each row of a tile, the row's place past the tile's first, and whether there is such a row."""
    row = tl.arange(0, ROWS)
    token = row // G
    return token, token * (N * G) + row % G, row < ROWS // G * G


@triton.jit
@no_type_check
def _row_terms(lse, delta, first_row, place, present):
    """What is subtracted from the exponents and from dP of each row; rows that are not there get probability 0."""
    row_lse = tl.load(lse + first_row + place, mask=present, other=_EMPTY_LSE)
    shift = tl.where(row_lse <= _EMPTY_LSE, _HIDDEN, row_lse * _LOG2_E)
    return shift, tl.load(delta + first_row + place, mask=present, other=0.0)


@triton.jit
@no_type_check
def _visible(key, end, WINDOW: tl.constexpr):
    """Whether queries of this end see the keys; either may be broadcast."""
    seen = key < end
    if WINDOW > 0:
        seen = seen & (key >= end - WINDOW)
    return seen


@triton.jit
@no_type_check
def _tile_keys(end, present, KEYS: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that some row of a tile sees, [low, high), and how many steps from low on every row sees whole."""
    high = tl.max(end)
    if WINDOW > 0:
        low = tl.min(tl.where(end > 0, tl.maximum(end - WINDOW, 0), high))
        return low, high, 0
    return 0, high, tl.min(tl.where(present, end, high)) // KEYS


@triton.jit
@no_type_check
def _attend(
    acc,
    top,
    total,
    q_tile,
    k,
    v,
    end,
    first,
    high,
    begin,
    stop,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of FlashAttention-2 per KEYS keys, for the steps [begin, stop)."""
    index = tl.arange(0, KEYS)
    place = index[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k += (first + begin * KEYS).to(tl.int64) * STRIDE
    v += (first + begin * KEYS).to(tl.int64) * STRIDE
    for step in tl.range(begin, stop):
        key = first + step * KEYS + index
        k_tile = tl.load(k + place, mask=(key < high)[:, None], other=0.0) if MASKED else tl.load(k + place)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if MASKED:
            s = tl.where(_visible(key[None, :], end[:, None], WINDOW), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * SCALE)
        p = tl.math.exp2(s * SCALE - new_top[:, None])
        rescale = tl.math.exp2(top - new_top)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None]
        v_tile = tl.load(v + place, mask=(key < high)[:, None], other=0.0) if MASKED else tl.load(v + place)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
        top = new_top
        k += KEYS * STRIDE
        v += KEYS * STRIDE
    return acc, top, total


@triton.jit
@no_type_check
def forward(
    q,
    k,
    v,
    ends,
    o,
    lse,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile's output and log-sum-exp over a part of its keys; grid (tiles x PARTS, B x N), the last tiles first."""
    tile = tl.num_programs(0) // PARTS - 1 - tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    token, place, present = _rows_of_tile(ROWS, N, G)
    token += tile * (ROWS // G)
    present = present & (token < T)
    first_row = _first_row(batch, tile * (ROWS // G), head, T, N, G)
    channel = tl.arange(0, D)[None, :]

    end = tl.load(ends + batch * T + token, mask=present, other=0)
    q_tile = tl.load(q + first_row * D + place[:, None] * D + channel, mask=(end > 0)[:, None], other=0.0)
    low, high, whole = _tile_keys(end, present, KEYS, WINDOW)
    steps = tl.cdiv(high - low, KEYS)
    begin = steps * part // PARTS
    stop = steps * (part + 1) // PARTS

    keys_of = (batch.to(tl.int64) * S * N + head) * D
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], _EMPTY_LSE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if WINDOW == 0:
        whole = tl.minimum(tl.maximum(whole, begin), stop)
        acc, top, total = _attend(
            acc, top, total, q_tile, k + keys_of, v + keys_of, end, low, high, begin, whole,
            D, N * D, WINDOW, KEYS, SCALE, False,
        )  # fmt: skip
        begin = whole
    acc, top, total = _attend(
        acc, top, total, q_tile, k + keys_of, v + keys_of, end, low, high, begin, stop,
        D, N * D, WINDOW, KEYS, SCALE, True,
    )  # fmt: skip

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    first_row += part * (tl.num_programs(1) // N).to(tl.int64) * (T * N * G)
    tl.store(lse + first_row + place, tl.where(empty, _EMPTY_LSE, top * _LN_2 + tl.log(divisor)), mask=present)
    output = acc / divisor[:, None]
    tl.store(o + first_row * D + place[:, None] * D + channel, output.to(o.dtype.element_ty), mask=present[:, None])


@triton.jit
@no_type_check
def _query_gradient(
    dq,
    q_tile,
    do_tile,
    shift,
    delta,
    k,
    v,
    end,
    first,
    high,
    begin,
    stop,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    MASKED: tl.constexpr,
):
    index = tl.arange(0, KEYS)
    place = index[:, None] * STRIDE + tl.arange(0, D)[None, :]
    k += (first + begin * KEYS).to(tl.int64) * STRIDE
    v += (first + begin * KEYS).to(tl.int64) * STRIDE
    for step in tl.range(begin, stop):
        key = first + step * KEYS + index
        if MASKED:
            k_tile = tl.load(k + place, mask=(key < high)[:, None], other=0.0)
            v_tile = tl.load(v + place, mask=(key < high)[:, None], other=0.0)
        else:
            k_tile = tl.load(k + place)
            v_tile = tl.load(v + place)
        p = tl.math.exp2(tl.dot(q_tile, tl.trans(k_tile)) * SCALE - shift[:, None])
        if MASKED:
            p = tl.where(_visible(key[None, :], end[:, None], WINDOW), p, 0.0)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile)) - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq)
        k += KEYS * STRIDE
        v += KEYS * STRIDE
    return dq


@triton.jit
@no_type_check
def query_gradient(
    q,
    k,
    v,
    do,
    lse,
    delta,
    ends,
    dq,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """A tile's gradient of q over a part of its keys; the grid of `forward`."""
    tile = tl.num_programs(0) // PARTS - 1 - tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    token, place, present = _rows_of_tile(ROWS, N, G)
    token += tile * (ROWS // G)
    present = present & (token < T)
    first_row = _first_row(batch, tile * (ROWS // G), head, T, N, G)
    elements = place[:, None] * D + tl.arange(0, D)[None, :]

    end = tl.load(ends + batch * T + token, mask=present, other=0)
    # Query and cotangent of a row without keys may be NaN.
    sees = end > 0
    q_tile = tl.load(q + first_row * D + elements, mask=sees[:, None], other=0.0)
    do_tile = tl.load(do + first_row * D + elements, mask=sees[:, None], other=0.0)
    shift, row_delta = _row_terms(lse, delta, first_row, place, sees)
    low, high, whole = _tile_keys(end, present, KEYS, WINDOW)
    steps = tl.cdiv(high - low, KEYS)
    begin = steps * part // PARTS
    stop = steps * (part + 1) // PARTS

    keys_of = (batch.to(tl.int64) * S * N + head) * D
    acc = tl.zeros([ROWS, D], tl.float32)
    if WINDOW == 0:
        whole = tl.minimum(tl.maximum(whole, begin), stop)
        acc = _query_gradient(
            acc, q_tile, do_tile, shift, row_delta, k + keys_of, v + keys_of, end, low, high, begin, whole,
            D, N * D, WINDOW, KEYS, SCALE, False,
        )  # fmt: skip
        begin = whole
    acc = _query_gradient(
        acc, q_tile, do_tile, shift, row_delta, k + keys_of, v + keys_of, end, low, high, begin, stop,
        D, N * D, WINDOW, KEYS, SCALE, True,
    )  # fmt: skip
    acc *= SCALE / _LOG2_E
    first_row += part * (tl.num_programs(1) // N).to(tl.int64) * (T * N * G)
    tl.store(dq + first_row * D + elements, acc.to(dq.dtype.element_ty), mask=present[:, None])


@triton.jit
@no_type_check
def key_gradients(
    q,
    k,
    v,
    do,
    lse,
    delta,
    ends,
    tiles,
    key_lengths,
    dk,
    dv,
    T: tl.constexpr,
    S: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The gradients of KEYS keys from a part of the queries; grid (key tiles x PARTS, B x N).

    `tiles` [B, key tiles, 2] says which tiles of queries see them: from the first number up to the second. Transposed
    products keep the probabilities in registers: S^T = K Q^T and dP^T = V dO^T are the left operands of dV += P^T dO
    and dK += dS^T Q. The others need fewer registers, and P and dS pass through shared memory.
    """
    key_tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    key = key_tile * KEYS + tl.arange(0, KEYS)
    keys_of = (batch.to(tl.int64) * S + key_tile * KEYS) * (N * D) + head * D
    elements = tl.arange(0, KEYS)[:, None] * (N * D) + tl.arange(0, D)[None, :]
    valid = key < tl.load(key_lengths + batch)
    k_tile = tl.load(k + keys_of + elements, mask=valid[:, None], other=0.0)
    v_tile = tl.load(v + keys_of + elements, mask=valid[:, None], other=0.0)

    about = tiles + (batch * (tl.num_programs(0) // PARTS) + key_tile) * 2
    first = tl.load(about)
    count = tl.load(about + 1) - first
    begin = first + count * part // PARTS
    stop = first + count * (part + 1) // PARTS

    tokens: tl.constexpr = ROWS // G
    token, place, present = _rows_of_tile(ROWS, N, G)
    row_elements = place[:, None] * D + tl.arange(0, D)[None, :]
    first_row = _first_row(batch, begin * tokens, head, T, N, G)
    ends += batch * T
    dk_acc = tl.zeros([KEYS, D], tl.float32)
    dv_acc = tl.zeros([KEYS, D], tl.float32)
    for tile in tl.range(begin, stop):
        end = tl.load(ends + tile * tokens + token, mask=present & (tile * tokens + token < T), other=0)
        sees = end > 0
        q_tile = tl.load(q + first_row * D + row_elements, mask=sees[:, None], other=0.0)
        do_tile = tl.load(do + first_row * D + row_elements, mask=sees[:, None], other=0.0)
        shift, row_delta = _row_terms(lse, delta, first_row, place, sees)
        if TRANSPOSED:
            p = tl.math.exp2(tl.dot(k_tile, tl.trans(q_tile)) * SCALE - shift[None, :])
            p = tl.where(_visible(key[:, None], end[None, :], WINDOW), p, 0.0)
            dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc)
            ds = p * (tl.dot(v_tile, tl.trans(do_tile)) - row_delta[None, :])
            dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc)
        else:
            p = tl.math.exp2(tl.dot(q_tile, tl.trans(k_tile)) * SCALE - shift[:, None])
            p = tl.where(_visible(key[None, :], end[:, None], WINDOW), p, 0.0)
            dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc)
            ds = p * (tl.dot(do_tile, tl.trans(v_tile)) - row_delta[:, None])
            dk_acc = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk_acc)
        first_row += tokens * N * G

    keys_of += part * (tl.num_programs(1) // N).to(tl.int64) * (S * N * D)
    inside = (key < S)[:, None]
    dk_acc *= SCALE / _LOG2_E
    tl.store(dk + keys_of + elements, dk_acc.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + keys_of + elements, dv_acc.to(dv.dtype.element_ty), mask=inside)
