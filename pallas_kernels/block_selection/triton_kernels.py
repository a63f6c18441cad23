"""Block selection in Triton: importances of a tile of queries, and the n best blocks of each query by counting."""

from typing import no_type_check

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_EMPTY_LSE = tl.constexpr(-1e30)
_HIDDEN = tl.constexpr(1e30)
_OCTAVE = tl.constexpr(1 << 23)  # a factor of two, in a float's bits


@triton.jit
@no_type_check
def importance(
    q,
    k_blocks,
    lse,
    current,
    start,
    scores,
    T: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    SCALE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums exp(logit - lse) over the heads of each group, for TOKENS queries and COLUMNS blocks.

    Grid (column tiles, token tiles, B x N). The block means stay, the heads pass by. Tiles past the queries' last
    candidate are not written.
    """
    batch = tl.program_id(2) // N
    head = tl.program_id(2) % N
    token = tl.load(start) + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    own = tl.load(current + batch * T + token, mask=token < T, other=-1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # A query's own block is forced: its score is not asked for.
    if tl.program_id(0) * COLUMNS < tl.max(own):
        channel = tl.arange(0, D)[None, :]
        block = k_blocks + ((batch * M + column) * N + head)[:, None] * D + channel
        k_tile = tl.load(block, mask=(column < M)[:, None], other=0.0)
        present = own >= 0
        row = (batch.to(tl.int64) * T + token) * (N * G) + head * G
        total = tl.zeros([TOKENS, COLUMNS], tl.float32)
        for member in tl.range(0, G):
            q_tile = tl.load(q + (row + member)[:, None] * D + channel, mask=present[:, None], other=0.0)
            row_lse = tl.load(lse + row + member, mask=present, other=_EMPTY_LSE)
            shift = tl.where(row_lse <= _EMPTY_LSE, _HIDDEN, row_lse * _LOG2_E)
            s = tl.dot(q_tile, tl.trans(k_tile))
            total += tl.math.exp2(s * SCALE - shift[:, None])
        queries = tl.num_programs(1) * TOKENS
        place = tl.program_id(2).to(tl.int64) * queries + tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        tl.store(scores + place[:, None] * WIDTH + column[None, :], total, mask=(column < WIDTH)[None, :])


@triton.jit
@no_type_check
def _bits_between(word, low, high):
    """The bits of each word's blocks [low, high)."""
    one = tl.full([1, 1], 1, tl.int64)
    below_high = (one << tl.minimum(tl.maximum(high - word * 32, 0), 32)) - 1
    below_low = (one << tl.minimum(tl.maximum(low - word * 32, 0), 32)) - 1
    return (below_high & (below_low ^ -1)).to(tl.int32)


@triton.jit
@no_type_check
def _forced_bits(word, own, INIT: tl.constexpr, LOCAL: tl.constexpr):
    """The bits of the blocks that a query takes whatever their importance."""
    end = own[:, None] + 1
    local = _bits_between(word, end - LOCAL, end)
    return local | _bits_between(word, 0, tl.minimum(end, INIT))


@triton.jit
@no_type_check
def _guess(low, high, at_low, at_high, step, places, mean):
    """Where to look next: the log of the count is taken to fall in a straight line with the log of the importance.

    The first look is at the mean, every fourth and all after the twelfth bisect, so that no scores make it long.
    """
    log_low = tl.log2(tl.maximum(at_low.to(tl.float32), 1.0))
    log_high = tl.log2(tl.maximum(at_high.to(tl.float32), 0.5))
    share = (log_low - tl.log2(places.to(tl.float32) + 0.3)) / (log_low - log_high)
    share = tl.minimum(tl.maximum(share, 1 / 64), 63 / 64)
    between = low + ((high - low).to(tl.float32) * share).to(tl.int32)
    down = tl.maximum(high - 4 * step * _OCTAVE, high >> 1)
    guess = tl.where(low > 0, between, down)
    bisect = (step % 4 == 3) | (step > 12)
    guess = tl.where(bisect, low + ((high - low) >> 1), guess)
    return tl.where(step == 0, mean, guess)


@triton.jit
@no_type_check
def _any(x):
    return tl.max(x.to(tl.int32), axis=0) > 0


@triton.jit
@no_type_check
def _taken(score, free, places, candidates, COLUMNS: tl.constexpr):
    """The free blocks of most importance, the lower index first among equals.

    Importances are not negative, so that their bits order as integers. A row's threshold is narrowed until exactly
    `places` of its `candidates` reach it; blocks that equal the threshold are then bisected by their index.
    """
    keys = tl.where(free, score.to(tl.int32, bitcast=True), 0)
    mean = tl.sum(tl.where(free, score, 0.0), axis=1) / tl.maximum(candidates, 1).to(tl.float32)
    mean = mean.to(tl.int32, bitcast=True)
    top = tl.max(keys, axis=1)
    none = places <= 0
    # `places` candidates or more reach `low`, fewer reach `high`.
    low = tl.where(none, top + 1, 0)
    high = top + 2
    at_low = tl.where(none, 0, candidates)
    at_high = candidates * 0
    step = 0
    # Triton 3.6 compiles no loop whose condition is carried and not used in its body.
    while _any((at_low > places) & (high - low > 1)):
        guess = _guess(low, high, at_low, at_high, step, places, mean)
        middle = tl.minimum(tl.maximum(guess, low + 1), high - 1)
        active = (at_low > places) & (high - low > 1)
        at_middle = tl.sum((keys >= middle[:, None]).to(tl.int32), axis=1)
        to_low = active & (at_middle >= places)
        to_high = active & (at_middle < places)
        low = tl.where(to_low, middle, low)
        high = tl.where(to_high, middle, high)
        at_low = tl.where(to_low, at_middle, at_low)
        at_high = tl.where(to_high, at_middle, at_high)
        step += 1

    tied = at_low > places
    missing = places - at_high
    index = tl.arange(0, COLUMNS)[None, :]
    alike = free & (keys == low[:, None])
    under = candidates * 0
    reach = under + COLUMNS
    while _any(tied & (reach - under > 1)):
        middle = (under + reach) >> 1
        enough = tl.sum((alike & (index < middle[:, None])).to(tl.int32), axis=1) >= missing
        under = tl.where(enough, under, middle)
        reach = tl.where(enough, middle, reach)
    reach = tl.where(tied, reach, COLUMNS)
    return free & ((keys > low[:, None]) | (alike & (index < reach[:, None])))


@triton.jit
@no_type_check
def _choose_rows(
    scores,
    words,
    own,
    row,
    place,
    inside,
    W: tl.constexpr,
    WIDTH: tl.constexpr,
    PLACES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Chooses from the first COLUMNS scores of each row, which hold all its free candidates."""
    index = tl.arange(0, COLUMNS)[None, :]
    free = (index >= INIT) & (index <= own[:, None] - LOCAL)
    score = tl.load(scores + row[:, None] * WIDTH + index, mask=free, other=0.0)
    forced = tl.minimum(own + 1, INIT + LOCAL)
    taken = _taken(score, free, PLACES - forced, own + 1 - forced, COLUMNS)
    bits = tl.where(taken, (tl.zeros([1, COLUMNS], tl.int32) + 1) << (index % 32), 0)
    chosen = tl.sum(tl.reshape(bits, [ROWS, COLUMNS // 32, 32]), axis=2)
    word = tl.arange(0, COLUMNS // 32)[None, :]
    chosen = chosen | _forced_bits(word, own, INIT, LOCAL)
    tl.store(words + place[:, None] + word, chosen, mask=inside[:, None] & (word < W))


@triton.jit
@no_type_check
def choose(
    scores,
    current,
    start,
    words,
    T: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PLACES: tl.constexpr,
    INIT: tl.constexpr,
    LOCAL: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VARIANTS: tl.constexpr,
    ALL_WORDS: tl.constexpr,
):
    """A bit per chosen block of ROWS queries; grid (tiles, B x N), a program of one warp.

    A row is as long as its past: the kernel holds a variant for COLUMNS scores, for half of them and so on.
    """
    batch = tl.program_id(1) // N
    head = tl.program_id(1) % N
    query = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.load(start) + query
    inside = query < CHUNK
    own = tl.load(current + batch * T + token, mask=inside & (token < T), other=-1)
    row = tl.program_id(1).to(tl.int64) * CHUNK + query
    place = ((batch.to(tl.int64) * CHUNK + query) * N + head) * W
    needed = tl.max(own, axis=0)

    word = tl.arange(0, ALL_WORDS)[None, :]
    written = 0
    for halvings in tl.static_range(VARIANTS - 1, -1, -1):
        if (needed <= COLUMNS >> halvings) & (written == 0) & (needed > 0):
            _choose_rows(
                scores, words, own, row, place, inside, W, WIDTH, PLACES, INIT, LOCAL, ROWS, COLUMNS >> halvings
            )  # fmt: skip
            written = (COLUMNS >> halvings) // 32
    tl.store(
        words + place[:, None] + word,
        _forced_bits(word, own, INIT, LOCAL),
        mask=inside[:, None] & (word >= written) & (word < W),
    )
