"""Bad arguments get one sentence with the argument, what was seen and what was expected."""

import re

import jax.numpy as jnp
import jaxtyping
import pytest

from pallas_kernels import (
    block_selection,
    compressed_attention,
    nsa_attention,
    prefix_attention,
    selected_attention,
    window_attention,
)

Q, K, LSE = jnp.zeros((2, 8, 3, 4, 16)), jnp.zeros((2, 8, 3, 16)), jnp.zeros((2, 8, 3, 4))
GATES, BLOCKS = jnp.zeros((2, 8, 3, 4, 3)), jnp.zeros((2, 8, 3, 2), jnp.int32)
ROWS = jnp.zeros((2, 1, 8), jnp.int32)


@pytest.fixture(autouse=True)
def unchecked_annotations():
    """Users run without the annotation checks that the tests switch on, which would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


CALLS = {
    "nsa": lambda q=Q, k=K, v=K, gates=GATES, **options: nsa_attention(q, k, v, gates, **options),
    "compressed": lambda q=Q, k=K, v=K, **options: compressed_attention(q, k, v, **{"block_size": 4} | options),
    "selection": lambda q=Q, k=K, lse=LSE, **options: block_selection(
        q, k, lse, **{"block_size": 4, "block_count": 2} | options
    ),
    "selected": lambda q=Q, k=K, v=K, blocks=BLOCKS, **options: selected_attention(
        q, k, v, blocks, **{"block_size": 4} | options
    ),
    "window": lambda q=Q, k=K, v=K, **options: window_attention(q, k, v, **{"window_size": 4} | options),
    "prefix": lambda q=Q[:, None], k=K, v=K, visible=ROWS, lengths=None: prefix_attention(q, k, v, visible, lengths),
}
EVERY_BUT_PREFIX = ("nsa", "compressed", "selection", "selected", "window")


@pytest.mark.parametrize("name", EVERY_BUT_PREFIX)
def test_flat_heads(name):
    with pytest.raises(ValueError, match=re.escape("q has shape (2, 8, 12, 16), expected [B, T, N, G, D]")):
        CALLS[name](q=jnp.zeros((2, 8, 12, 16)))


@pytest.mark.parametrize("name", EVERY_BUT_PREFIX)
@pytest.mark.parametrize("shape", [(2, 8, 3, 8), (2, 8, 12, 16), (1, 8, 3, 16), (2, 8, 16)], ids=str)
def test_keys_of_another_layout(name, shape):
    with pytest.raises(ValueError, match=re.escape(f"has shape {shape}, expected [2, ")):
        CALLS[name](k=jnp.zeros(shape))


@pytest.mark.parametrize("name", CALLS)
def test_integer_queries(name):
    q = jnp.zeros((2, 1, 8, 3, 4, 16) if name == "prefix" else Q.shape, jnp.int32)
    with pytest.raises(TypeError, match=r"q has dtype int32, expected a floating type"):
        CALLS[name](q=q)


@pytest.mark.parametrize("name", CALLS)
def test_keys_of_another_dtype(name):
    with pytest.raises(TypeError, match=r"has dtype bfloat16, expected q's float32"):
        CALLS[name](k=K.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["nsa", "compressed", "selected", "window", "prefix"])
def test_values_of_another_length(name):
    with pytest.raises(ValueError, match=re.escape("has shape (2, 9, 3, 16), expected k")):
        CALLS[name](v=jnp.zeros((2, 9, 3, 16)))


@pytest.mark.parametrize("name", EVERY_BUT_PREFIX)
def test_lengths(name):
    with pytest.raises(ValueError, match=re.escape("lengths has shape (3,), expected [B] = (2,)")):
        CALLS[name](lengths=jnp.zeros(3, jnp.int32))
    with pytest.raises(TypeError, match="lengths has dtype float32, expected int32"):
        CALLS[name](lengths=jnp.zeros(2))


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("nsa", "block_size", 0),
        ("nsa", "window_size", 0),
        ("nsa", "block_count", 0),
        ("compressed", "block_size", 0),
        ("selection", "block_size", -1),
        ("selection", "block_count", 0),
        ("selected", "block_size", 0),
        ("window", "window_size", 0),
    ],
)
def test_sizes_below_one(name, argument, value):
    with pytest.raises(ValueError, match=f"{argument} is {value}, expected at least 1"):
        CALLS[name](**{argument: value})


@pytest.mark.parametrize("name", ["nsa", "selection"])
def test_forced_blocks_beyond_the_places(name):
    with pytest.raises(ValueError, match=r"init_blocks 2 and local_blocks 1 .* add up to 3, expected at most block_co"):
        CALLS[name](block_count=2, init_blocks=2)
    # The current block takes a place even where local_blocks is 0.
    with pytest.raises(ValueError, match=r"add up to 3, expected at most block_count 2"):
        CALLS[name](block_count=2, init_blocks=2, local_blocks=0)
    with pytest.raises(ValueError, match=r"init_blocks is 0 and local_blocks -1, expected neither below 0"):
        CALLS[name](local_blocks=-1)


def test_gates():
    with pytest.raises(ValueError, match=re.escape("gate_logits has shape (2, 8, 3, 4, 2), expected [B, T, N, G, 3]")):
        CALLS["nsa"](gates=GATES[..., :2])
    with pytest.raises(ValueError, match="gate_temperature is 0, expected above 0"):
        CALLS["nsa"](gate_temperature=0)


def test_branches():
    with pytest.raises(ValueError, match=r"branches is \('sliding',\), expected distinct names out of"):
        CALLS["nsa"](branches=("sliding",))
    with pytest.raises(ValueError, match="expected distinct names"):
        CALLS["nsa"](branches=("window", "window"))


def test_chosen_blocks():
    with pytest.raises(ValueError, match=re.escape("block_indices has shape (2, 8, 2), expected [B, T, N, n]")):
        CALLS["selected"](blocks=BLOCKS[:, :, 0])
    with pytest.raises(TypeError, match="block_indices has dtype float32, expected int32"):
        CALLS["selected"](blocks=BLOCKS.astype(jnp.float32))


def test_log_sum_exps():
    with pytest.raises(ValueError, match=re.escape("lse has shape (2, 8, 3), expected [B, T, N, G] = (2, 8, 3, 4)")):
        CALLS["selection"](lse=LSE[..., 0])


def test_prefixes():
    with pytest.raises(ValueError, match=re.escape("q has shape (2, 8, 3, 4, 16), expected [B, Q, Lt, N, G, D]")):
        CALLS["prefix"](q=Q)
    with pytest.raises(
        ValueError, match=re.escape("k has shape (2, 8, 3, 8), expected [B, S, N, D] or [B, Q, S, N, D]")
    ):
        CALLS["prefix"](k=K[..., :8])
    with pytest.raises(ValueError, match=re.escape("visible has shape (2, 8), expected [B, Q, Lt] = (2, 1, 8)")):
        CALLS["prefix"](visible=ROWS[:, 0])
    with pytest.raises(ValueError, match=re.escape("k_lengths has shape (1, 2), expected [B, Q] = (2, 1)")):
        CALLS["prefix"](lengths=jnp.zeros((1, 2), jnp.int32))
