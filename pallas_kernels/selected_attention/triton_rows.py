"""What the Triton kernels of selected attention share: where rows lie, one step of the softmax and of its gradient.

Every function is inlined into a kernel. Type checkers are kept away from all of them, for Triton compiles their source.
"""

from typing import no_type_check

import triton
import triton.language as tl

from pallas_kernels import gpu
from pallas_kernels.common import EMPTY_LSE

ROWS = tl.constexpr(8)
BLOCK = tl.constexpr(64)
HIDDEN = tl.constexpr(gpu.HIDDEN)
EMPTY = tl.constexpr(EMPTY_LSE)
LOG2_E = tl.constexpr(gpu.LOG2_E)
LN_2 = tl.constexpr(1 / gpu.LOG2_E)


@triton.jit
@no_type_check
def first_row(row, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Where row = b x N + n begins among the rows of [B, T, N, G], in 64 bits."""
    b, n = (row // HEADS).to(tl.int64), row % HEADS
    return (b * QUERIES * HEADS + n) * GROUP


@triton.jit
@no_type_check
def row_offsets(token, group_row, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Where the rows (token, group_row) lie from `first_row` on."""
    return token * (HEADS * GROUP) + group_row


@triton.jit
@no_type_check
def gathered_rows(row, token, group_row, QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """`first_row` and `row_offsets` together, in 64 bits: with 32 the loop that gathers spilled more."""
    b, n = (row // HEADS).to(tl.int64), row % HEADS
    return ((b * QUERIES + token) * HEADS + n) * GROUP + group_row


@triton.jit
@no_type_check
def first_key(row, KEYS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr):
    """Where the first key of row = b x N + n lies in [B, S, N, D], in 64 bits."""
    b, n = (row // HEADS).to(tl.int64), row % HEADS
    return (b * KEYS * HEADS + n) * SIZE


@triton.jit
@no_type_check
def key_offsets(HEADS: tl.constexpr, SIZE: tl.constexpr):
    """[64, D]: where the keys of a block lie from its first one on."""
    return tl.arange(0, BLOCK)[:, None] * (HEADS * SIZE) + tl.arange(0, SIZE)[None, :]


@triton.jit
@no_type_check
def soften(s, seen, top, scale):
    """Probabilities of a block's logits under the running maximum, which rises, and the factor for what came before.

    A row that does not see the block has its exponents shifted by HIDDEN: a shift per row, no mask per element.
    """
    new_top = tl.maximum(top, tl.where(seen, tl.max(s, axis=1) * scale, EMPTY))
    shift = tl.where(seen, new_top, HIDDEN)
    p = tl.exp2(s * scale - shift[:, None])
    return p, new_top, tl.exp2(top - new_top)


@triton.jit
@no_type_check
def shift_of(lse):
    """What the exponents of a row subtract: its log-sum-exp to the base of 2, HIDDEN where it sees no key."""
    return tl.where(lse == EMPTY, HIDDEN, lse * LOG2_E)


@triton.jit
@no_type_check
def store_attention(o, lse, places, inside, acc, top, total, SIZE: tl.constexpr):
    """Writes acc / total and the natural log-sum-exp of each row; 0 and EMPTY of rows without keys."""
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    pointers = o + places[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(pointers, (acc / divisor[:, None]).to(o.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + places, tl.where(empty, EMPTY, top * LN_2 + tl.log(divisor)), mask=inside)


@triton.jit
@no_type_check
def store_key_gradients(
    dk,
    dv,
    dk_parts,
    dv_parts,
    dk_sum,
    dv_sum,
    base,
    slot,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Writes a block's sums: to their place where its list is whole (slot -1), else in float32 to a part's slot."""
    if slot < 0:
        offsets = base + key_offsets(HEADS, SIZE)
        tl.store(dk + offsets, dk_sum.to(dk.dtype.element_ty))
        tl.store(dv + offsets, dv_sum.to(dv.dtype.element_ty))
    else:
        offsets = slot.to(tl.int64) * (BLOCK * SIZE) + key_offsets(1, SIZE)
        tl.store(dk_parts + offsets, dk_sum)
        tl.store(dv_parts + offsets, dv_sum)
