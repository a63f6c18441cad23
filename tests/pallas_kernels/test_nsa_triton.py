"""The whole NSA in Triton: the gradient rule of `nsa_gpu` over Triton's kernels, interpreted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_interpreter
from cases import Case

from pallas_kernels import nsa_attention, nsa_gpu, nsa_triton, triton_calls

pytest.importorskip("triton", reason="Triton comes with the extra 'gpu', for Linux on x86-64 alone")


@pytest.mark.parametrize("own", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_kernels_together(own):
    """float16 and its kernels beside the float32 reference; queries and keys past the length hold NaN."""
    # With as many places as blocks every candidate is chosen.
    case = Case(B=1, T=72, S=72, N=1, G=7, D=64, s=64, n=2 if own else 1, w=20, lengths=(70,))
    tensors = [case.queries(), *case.keys()]
    gate_logits = case.draw(1, 72, 1, 7, 3)
    do = case.draw(1, 72, 1, 7, 64)
    options = {"block_size": 64, "window_size": 20, "lengths": jnp.array([70], jnp.int32), "block_count": case.n}

    def both(implementation, q, k, v, logits, do, **more):
        attend = functools.partial(nsa_attention, **options, **more, implementation=implementation)
        o, back = jax.vjp(attend, q, k, v, logits)
        return o, *back(do)

    # A near-tie must not decide a comparison of values: the kernels' choice is made, and replaced.
    current = jnp.arange(72, dtype=jnp.int32)[None, :, None, None] // 64
    more = {} if own else {"block_indices": current}
    expected = both("reference", *map(np.nan_to_num, tensors), gate_logits, do, **more)
    halves = [jnp.asarray(x, jnp.float16) for x in (*tensors, do)]
    with triton_interpreter.interpreted():
        choose = {} if own else {"choose_anyway": True}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_calls, "on_nvidia", lambda kernel: kernel)
            seen = []
            attention = nsa_gpu.attention
            patch.setattr(nsa_gpu, "attention", lambda *a, **o: seen.append(o) or attention(*a, **o))
            actual = both("triton", *halves[:3], gate_logits, halves[3], **more, **choose)
            actual = jax.block_until_ready(actual)
    assert seen[0]["operations"] is nsa_triton.TRITON
    for name, x, y in zip(("o", "dq", "dk", "dv", "dlogits"), actual, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all(), name
        # float16 keeps 11 bits; o and its row products are rounded before they are subtracted from.
        assert np.linalg.norm(x - y) <= 2e-3 * np.linalg.norm(y), name
