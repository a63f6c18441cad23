"""Drawn settings of the attention operations, their arrays, and the implementations under test."""

import contextlib
import dataclasses
from unittest import mock

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pallas_kernels import chunked
from pallas_kernels.selected_attention import xla as selected_xla
from pallas_kernels.window_attention import xla as window_xla

# Compiling dominates: few examples, always the same.
DRAWN = settings(
    derandomize=True,
    deadline=None,
    max_examples=5,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

# xla_loops forces what long inputs take: loops over chunks, fetched blocks, bands of keys.
FORMS = ("reference", "xla", "xla_loops")


@contextlib.contextmanager
def form(name):
    """Yields the implementation to ask for."""
    if name != "xla_loops":
        yield name
        return
    with (
        mock.patch.object(chunked, "TILE_ELEMENTS", 2**14),
        mock.patch.object(selected_xla, "DENSE_SHARE", 0),
        mock.patch.object(window_xla, "_SMALLEST_CHUNK", 8),
    ):
        yield "xla"


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one call; letters as in docs/attention.md."""

    B: int = 2
    T: int = 50
    S: int = 50
    N: int = 2
    G: int = 7
    D: int = 8
    s: int = 16
    n: int = 2
    w: int = 20
    init: int = 0
    local: int = 1
    q_offset: int = 0
    lengths: tuple[int, ...] | None = None
    branches: tuple[str, ...] = ("compressed", "selected", "window")
    seed: int = 0

    @property
    def blocks(self):
        return self.S // self.s

    @property
    def oracle_lengths(self):
        return (self.S,) * self.B if self.lengths is None else self.lengths

    @property
    def array_lengths(self):
        return None if self.lengths is None else np.asarray(self.lengths, np.int32)

    @property
    def past(self):
        """Queries at or past their row's length, [B, T]."""
        return (self.q_offset + np.arange(self.T))[None] >= np.asarray(self.oracle_lengths)[:, None]

    @property
    def choice(self):
        return {"block_count": self.n, "init_blocks": self.init, "local_blocks": self.local}

    def draw(self, *shape):
        """Normal float32 values that depend on the seed and the shape alone."""
        return np.random.default_rng([self.seed, *shape]).standard_normal(shape).astype(np.float32)

    def queries(self):
        return self.poison(self.draw(self.B, self.T, self.N, self.G, self.D), self.q_offset)

    def keys(self):
        """Keys and values of the valid tokens, NaN past them."""
        k, v = np.moveaxis(self.draw(2, self.B, self.S, self.N, self.D), 0, 0)
        return self.poison(k, 0), self.poison(v, 0)

    def poison(self, x, offset):
        index = offset + np.arange(x.shape[1])
        x[index[None] >= np.asarray(self.oracle_lengths)[:, None]] = np.nan
        return x

    def cotangents(self):
        """Cotangents of an output and of its log-sum-exp; those of padding are NaN, which must not matter."""
        do = self.draw(self.B, self.T, self.N, self.G, self.D)[::-1].copy()
        return self.poison(do, self.q_offset), self.poison(self.draw(self.B, self.T, self.N, self.G), self.q_offset)


# Corners that a draw may miss, all with the published group of 7.
CORNERS = {
    "ragged": Case(T=77, S=77, n=3, lengths=(77, 41)),
    "first block incomplete": Case(T=11, S=11, n=4, w=64, lengths=(11, 5)),
    "later queries": Case(T=23, S=120, s=32, n=2, init=1, q_offset=90, lengths=(113, 97)),
    "more places than blocks": Case(T=40, S=40, n=9, init=1, local=2, w=100),
    "empty row": Case(T=35, S=35, lengths=(0, 35)),
    "no query": Case(T=0, S=40, q_offset=40),
    "no token": Case(T=0, S=0),
    "queries without keys": Case(T=3, S=0, lengths=(0, 0)),
    "one place": Case(B=1, T=70, S=70, N=1, n=1, w=1, lengths=(66,)),
}


@st.composite
def cases(draw):
    s = draw(st.sampled_from((16, 32, 64)))
    B = draw(st.integers(1, 2))
    T = draw(st.integers(1, 70))
    S = T + draw(st.integers(0, 100))
    n = draw(st.integers(1, 5))
    local = draw(st.integers(0, min(n, 2)))
    branches = draw(st.lists(st.sampled_from(Case.branches), min_size=1, unique=True))
    return Case(
        B=B,
        T=T,
        S=S,
        N=draw(st.integers(1, 2)),
        G=draw(st.integers(1, 8)),
        D=draw(st.sampled_from((8, 16))),
        s=s,
        n=n,
        w=draw(st.integers(1, 100)),
        init=draw(st.integers(0, n - max(local, 1))),
        local=local,
        q_offset=draw(st.integers(0, S - T)),
        lengths=draw(st.none() | st.tuples(*[st.integers(0, S)] * B)),
        branches=tuple(branches),
        seed=draw(st.integers(0, 99)),
    )


def assert_close(actual, expected, tolerance, what):
    """Asserts equality within `tolerance` of the largest expected entry (of 1 for what is smaller)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, what
    assert np.isfinite(actual).all(), f"{what} is not finite"
    if expected.size:
        error = np.abs(actual - expected).max()
        assert error <= tolerance * max(np.abs(expected).max(), 1), f"{what} is off by {error}"
