"""The whole NSA on Hopper: its gradient rule over float32 doubles of the kernels, and over the kernels, interpreted."""

import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_close

from pallas_kernels import nsa_attention, nsa_gpu
from pallas_kernels.block_selection import reference as block_selection
from pallas_kernels.common import query_indices, resolve_lengths, zero_where
from pallas_kernels.compressed_attention import reference as compressed_attention
from pallas_kernels.selected_attention import reference as selected_attention
from pallas_kernels.window_attention import reference as window_attention


def double(operation, *options):
    """A branch by automatic differentiation of its float32 reference."""

    def attend(settings, prepared, q, k, v):
        *extra, q_offset, lengths = prepared
        chosen = {name: getattr(settings, name) for name in options}
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return operation(q, k, v, *extra, **chosen, q_offset=q_offset, lengths=lengths)

    def prepare(settings, q, k, block_indices, length, q_offset):
        extra = (block_indices,) if operation is selected_attention.selected_attention else ()
        return ((*extra, q_offset, length),) * 2

    def forward(settings, q, k, v, prepared):
        o, lse = attend(settings, prepared, q, k, v)
        return o.astype(q.dtype), lse

    def backward(settings, q, k, v, do, lse, delta, prepared):
        """A gate g comes as -log g in lse and as its share of delta."""
        (o, own), pull = jax.vjp(functools.partial(attend, settings, prepared), q, k, v)
        gate = jnp.exp(own - lse)
        past = query_indices(q.shape[1], prepared[-2]) >= prepared[-1][:, None]
        do = zero_where(past, do.astype(jnp.float32))
        return pull((gate[..., None] * do, gate * ((do * o).sum(-1) - delta)))

    return nsa_gpu.Branch(prepare, forward, backward)


def choose(settings, q, k_blocks, lse, length, q_offset):
    return block_selection.block_selection(q, k_blocks, lse, **settings.choice, q_offset=q_offset, lengths=length)


DOUBLES = nsa_gpu.Operations(
    compressed=double(compressed_attention.compressed_attention, "block_size"),
    selected=double(selected_attention.selected_attention, "block_size"),
    window=double(window_attention.window_attention, "window_size"),
    choose=choose,
)


def run(case, arrays, do, *, operations=DOUBLES, interpret=None, block_indices=None):
    """Output and gradients of q, k, v and the gate logits."""
    length = resolve_lengths(case.array_lengths, case.B, case.S)
    past = query_indices(case.T, case.q_offset) >= length[:, None]

    def attend(q, k, v, gate_logits):
        return nsa_gpu.attention(
            q,
            k,
            v,
            zero_where(past, gate_logits).astype(jnp.float32) / 0.3,
            block_size=case.s,
            window_size=case.w,
            q_offset=jnp.int32(case.q_offset),
            length=length,
            ragged=case.lengths is not None,
            branches=case.branches,
            block_indices=block_indices,
            choose_anyway=False,
            choice=case.choice,
            operations=operations,
            interpret=interpret,
        )

    @jax.jit
    def both(arrays, do):
        o, pull = jax.vjp(attend, *arrays)
        return o, *pull(do)

    return both(arrays, do)


def expected(case, arrays, do, block_indices=None):
    """The same through the reference of every operation, in float32."""
    options = {"block_size": case.s, "window_size": case.w, "q_offset": case.q_offset, "branches": case.branches}
    options |= case.choice | {"lengths": case.array_lengths, "implementation": "reference"}

    @jax.jit
    def both(arrays, do):
        arrays = [x.astype(jnp.float32) for x in arrays]
        o, pull = jax.vjp(lambda *x: nsa_attention(*x, **options, block_indices=block_indices), *arrays)
        return o, *pull(do.astype(jnp.float32))

    return both(arrays, do)


def inputs(case):
    """q, k, v and gate logits with NaN in all padding, and a cotangent likewise."""
    gate_logits = case.poison(case.draw(case.B, case.T, case.N, case.G, 3), case.q_offset)
    return (case.queries(), *case.keys(), gate_logits), case.cotangents()[0]


NAMES = ("o", "dq", "dk", "dv", "dgate_logits")


@pytest.mark.parametrize(
    "case",
    [
        Case(T=77, S=77, n=3, lengths=(77, 41)),
        Case(T=23, S=120, s=32, n=2, init=1, q_offset=90, lengths=(113, 97), G=1),
        Case(T=40, S=40, n=9, init=1, local=2, w=100, branches=("window", "selected")),
        Case(T=40, S=45, branches=("compressed",)),
        Case(T=35, S=35, lengths=(0, 35)),
    ],
    ids=["ragged", "later queries", "two branches", "one branch", "empty row"],
)
def test_gradients_share_one_cotangent(case):
    """The rule of the module's text against automatic differentiation of the composition, all in float32."""
    arrays, do = inputs(case)
    for name, x, y in zip(NAMES, run(case, arrays, do), expected(case, arrays, do), strict=True):
        # As test_nsa_attention bounds values and gradients.
        assert_close(x, y, 1e-5 if name == "o" else 1e-4, name)


@pytest.mark.parametrize("lengths", [None, (150,)], ids=["whole", "ragged"])
def test_the_kernels_together(lengths):
    """bfloat16 and its kernels, interpreted, within the relative norms that the kernels are held to on a GPU."""
    case = Case(B=1, T=190, S=190, N=1, G=2, D=64, s=64, n=2, w=50, lengths=lengths)
    arrays, do = inputs(case)
    arrays, do = [jnp.asarray(x, jnp.bfloat16) for x in arrays[:3]] + [jnp.asarray(arrays[3])], do.astype(jnp.bfloat16)
    actual = run(case, arrays, do, operations=nsa_gpu.HOPPER, interpret=plgpu.InterpretGPUParams())
    own = expected(case, arrays, do)
    for name, x, y in zip(NAMES, actual, own, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all(), name
        assert np.linalg.norm(x - y) <= 2e-2 * np.linalg.norm(y), name
