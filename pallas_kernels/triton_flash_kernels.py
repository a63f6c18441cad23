"""Interval attention in Triton: the kernels of the forward pass, of dq, and of dk and dv.

A tile is as many tokens as fit ROWS rows with all heads of one KV head: 9 tokens of 7 heads are 63 of 64 rows. They
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
def _first_row(batch, token, head, T: tl.constexpr, N: tl.constexpr, G: tl.constexpr):
    """Place of a token's first query head among all [B, T, N, G]: past 32 bits for long batches."""
    return ((batch.to(tl.int64) * T + token) * N + head) * G


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
def _visible(index, end, WINDOW: tl.constexpr):
    """Whether queries see the keys at `index` from one on; `end` is theirs, counted from that key too."""
    if WINDOW == 0:
        return index < end
    # One comparison for both ends: before the start the difference is a large unsigned number.
    return (index + (WINDOW - end)).to(tl.uint32, bitcast=True) < tl.full([1, 1], WINDOW, tl.uint32)


@triton.jit
@no_type_check
def _steps_of_tile(about, part, KEYS: tl.constexpr, PARTS: tl.constexpr):
    """Where a tile's first step begins, one past its last key, its steps [begin, stop) and those that need no mask."""
    low = tl.load(about) // KEYS * KEYS
    high = tl.load(about + 1)
    steps = tl.cdiv(tl.maximum(high - low, 0), KEYS)
    whole_from = tl.cdiv(tl.maximum(tl.load(about + 2) - low, 0), KEYS)
    whole_to = (tl.load(about + 3) - low) // KEYS
    return low, high, steps * part // PARTS, steps * (part + 1) // PARTS, whole_from, whole_to


@triton.jit
@no_type_check
def _load_keys(pointers, there, BOUNDED: tl.constexpr):
    """A step's keys or values; BOUNDED: those that are not there may hold NaN, or lie past the array."""
    if BOUNDED:
        return tl.load(pointers, mask=there, other=0.0)
    return tl.load(pointers)


@triton.jit
@no_type_check
def forward(
    q,
    k,
    v,
    ends,
    bounds,
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
    BOUNDED: tl.constexpr,
):
    """A tile's output and log-sum-exp over a part of its keys; grid (tiles x PARTS, B x N), the last tiles first.

    `bounds` [B, tiles, 4]: the keys that some row of a tile sees, from the first number up to the second, and those
    that all of them see, from the third up to the fourth.
    """
    tiles = tl.num_programs(0) // PARTS
    tile = tiles - 1 - tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    about = bounds + (batch * tiles + tile) * 4
    low, high, begin, stop, whole_from, whole_to = _steps_of_tile(about, part, KEYS, PARTS)
    token, place, present = _rows_of_tile(ROWS, N, G)
    token += tile * (ROWS // G)
    present = present & (token < T)
    first_row = _first_row(batch, tile * (ROWS // G), head, T, N, G)
    elements = place[:, None] * D + tl.arange(0, D)[None, :]

    end = tl.load(ends + batch * T + token, mask=present, other=0)
    # The query of a row without keys may be NaN.
    q_tile = tl.load(q + first_row * D + elements, mask=(end > 0)[:, None], other=0.0)

    index = tl.arange(0, KEYS)
    key_elements = index[:, None] * (N * D) + tl.arange(0, D)[None, :]
    key = low + begin * KEYS
    keys_of = ((batch.to(tl.int64) * S + key) * N + head) * D
    acc = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], _EMPTY_LSE, tl.float32)
    # Sums stay apart within a thread's columns: they cross threads at the end only.
    total = tl.zeros([ROWS, 8], tl.float32)
    for step in tl.range(begin, stop):
        there = (index < high - key)[:, None]
        k_tile = _load_keys(k + keys_of + key_elements, there, BOUNDED)
        s = tl.dot(q_tile, tl.trans(k_tile))
        if (step < whole_from) | (step >= whole_to):
            s = tl.where(_visible(index[None, :], end[:, None] - key, WINDOW), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * SCALE)
        p = tl.math.exp2(s * SCALE - new_top[:, None])
        rescale = tl.math.exp2(top - new_top)
        total = total * rescale[:, None] + tl.sum(tl.reshape(p, [ROWS, KEYS // 8, 8]), axis=1)
        acc = acc * rescale[:, None]
        v_tile = _load_keys(v + keys_of + key_elements, there, BOUNDED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
        top = new_top
        key += KEYS
        keys_of += KEYS * N * D

    total = tl.sum(total, axis=1)
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    first_row += part * (tl.num_programs(1) // N).to(tl.int64) * (T * N * G)
    tl.store(lse + first_row + place, tl.where(empty, _EMPTY_LSE, top * _LN_2 + tl.log(divisor)), mask=present)
    output = acc / divisor[:, None]
    tl.store(o + first_row * D + elements, output.to(o.dtype.element_ty), mask=present[:, None])


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
    bounds,
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
    BOUNDED: tl.constexpr,
):
    """A tile's gradient of q over a part of its keys; grid and `bounds` as of `forward`."""
    tiles = tl.num_programs(0) // PARTS
    tile = tiles - 1 - tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    about = bounds + (batch * tiles + tile) * 4
    low, high, begin, stop, whole_from, whole_to = _steps_of_tile(about, part, KEYS, PARTS)
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

    index = tl.arange(0, KEYS)
    key_elements = index[:, None] * (N * D) + tl.arange(0, D)[None, :]
    key = low + begin * KEYS
    keys_of = ((batch.to(tl.int64) * S + key) * N + head) * D
    acc = tl.zeros([ROWS, D], tl.float32)
    for step in tl.range(begin, stop):
        there = (index < high - key)[:, None]
        k_tile = _load_keys(k + keys_of + key_elements, there, BOUNDED)
        v_tile = _load_keys(v + keys_of + key_elements, there, BOUNDED)
        p = tl.math.exp2(tl.dot(q_tile, tl.trans(k_tile)) * SCALE - shift[:, None])
        if (step < whole_from) | (step >= whole_to):
            p = tl.where(_visible(index[None, :], end[:, None] - key, WINDOW), p, 0.0)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile)) - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc)
        key += KEYS
        keys_of += KEYS * N * D
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
    query_lengths,
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
):
    """The gradients of KEYS keys from a part of the queries; grid (PARTS x key tiles, B x N).

    Programs that run at once walk over the same queries. `tiles` [B, key tiles, 2] says which tiles of queries see the
    keys: from the first number up to the second. P and dS pass through shared memory, transposed: with S^T = K Q^T they
    would stay in registers, but so would a term of every row, and registers spill.
    """
    key_tiles = tl.num_programs(0) // PARTS
    key_tile = tl.program_id(0) % key_tiles
    part = tl.program_id(0) // key_tiles
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    index = tl.arange(0, KEYS)
    origin = key_tile * KEYS
    keys_of = ((batch.to(tl.int64) * S + origin) * N + head) * D
    elements = index[:, None] * (N * D) + tl.arange(0, D)[None, :]
    valid = index < tl.load(key_lengths + batch) - origin
    k_tile = tl.load(k + keys_of + elements, mask=valid[:, None], other=0.0)
    v_tile = tl.load(v + keys_of + elements, mask=valid[:, None], other=0.0)

    tokens: tl.constexpr = ROWS // G
    query_tiles: tl.constexpr = (T + tokens - 1) // tokens
    about = tiles + (batch * key_tiles + key_tile) * 2
    begin = tl.maximum(tl.load(about), query_tiles * part // PARTS)
    stop = tl.minimum(tl.load(about + 1), query_tiles * (part + 1) // PARTS)

    token, place, present = _rows_of_tile(ROWS, N, G)
    row_elements = place[:, None] * D + tl.arange(0, D)[None, :]
    first_row = _first_row(batch, begin * tokens, head, T, N, G)
    ends += batch * T
    queries = tl.load(query_lengths + batch)
    dk_acc = tl.zeros([KEYS, D], tl.float32)
    dv_acc = tl.zeros([KEYS, D], tl.float32)
    for tile in tl.range(begin, stop):
        there = present & (token < queries - tile * tokens)
        end = tl.load(ends + tile * tokens + token, mask=there, other=0)
        q_tile = tl.load(q + first_row * D + row_elements, mask=there[:, None], other=0.0)
        do_tile = tl.load(do + first_row * D + row_elements, mask=there[:, None], other=0.0)
        shift, row_delta = _row_terms(lse, delta, first_row, place, there)
        p = tl.math.exp2(tl.dot(q_tile, tl.trans(k_tile)) * SCALE - shift[:, None])
        p = tl.where(_visible(index[None, :], end[:, None] - origin, WINDOW), p, 0.0)
        dv_acc = tl.dot(tl.trans(p.to(do_tile.dtype)), do_tile, dv_acc)
        ds = p * (tl.dot(do_tile, tl.trans(v_tile)) - row_delta[:, None])
        dk_acc = tl.dot(tl.trans(ds.to(q_tile.dtype)), q_tile, dk_acc)
        first_row += tokens * N * G

    keys_of += part * (tl.num_programs(1) // N).to(tl.int64) * (S * N * D)
    inside = (index < S - origin)[:, None]
    dk_acc *= SCALE / _LOG2_E
    tl.store(dk + keys_of + elements, dk_acc.to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + keys_of + elements, dv_acc.to(dv.dtype.element_ty), mask=inside)
