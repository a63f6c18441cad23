"""The formula against XLA's own count of the same products, and against masks that are written out."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from pallas_kernels import prefix_attention
from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig, qwen2_5_vl_7b
from videonsa_jax.models import VideoNSA
from videonsa_jax.streams import Batch
from videonsa_jax.training.flops import forward_flops, nsa_pairs, peak_flops_per_second, train_flops, trained_parts
from videonsa_jax.training.frozen import join_params, split_params

GRID, FRAMES, TEXT = (4, 4), 2, 8
VISUAL = FRAMES * 4


def wide_model() -> ModelConfig:
    """So wide for its sequences that nothing but products with weights counts."""
    return ModelConfig(
        vision=VisionConfig(
            depth=2,
            hidden_size=256,
            intermediate_size=320,
            num_heads=4,
            out_hidden_size=384,
            fullatt_block_indexes=(1,),
        ),
        text=TextConfig(
            vocab_size=512,
            hidden_size=384,
            intermediate_size=640,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            mrope_section=(16, 8, 8),
        ),
        nsa=NSAConfig(block_size=4, block_count=2, window_size=4),
    )


def batch_of(visual: int, text: int, frames: int, grid: tuple[int, int]) -> Batch:
    """Two contexts of two rows, without padding; three text tokens precede the video."""
    before = np.minimum(np.arange(text), 3)
    return Batch(
        patches=np.zeros((2, frames, grid[0] * grid[1], 1176), np.uint8),
        frame_grids=np.tile(np.array(grid, np.int32), (2, frames, 1)),
        visual_source=np.tile(np.arange(visual, dtype=np.int32), (2, 1)),
        visual_positions=np.zeros((3, 2, visual), np.int32),
        visual_lengths=np.full(2, visual, np.int32),
        visible_text=np.full((2, visual), 3, np.int32),
        text_tokens=np.zeros((2, 2, text), np.int32),
        text_positions=np.zeros((3, 2, 2, text), np.int32),
        text_lengths=np.full((2, 2), text, np.int32),
        visible_visual=np.broadcast_to(np.where(before < 3, 0, visual).astype(np.int32), (2, 2, text)).copy(),
    )


def xla_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """XLA's count, of the program before it is optimised: the machine's own kernels hide what they compute."""
    return jax.jit(function).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("attention", "frozen"),
    [("nsa", ()), ("dense", ("vision", "merger")), ("nsa", ("llm",)), ("nsa", ("blocks", "llm"))],
)
def test_a_step_costs_what_xla_counts(attention: str, frozen: tuple[str, ...]) -> None:
    model, batch = wide_model(), batch_of(VISUAL, TEXT, FRAMES, GRID)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoNSA(model, nnx.Rngs(0))), nnx.Param)
    params = nnx.to_pure_dict(state)
    trained, fixed = split_params(params, frozen)

    def loss(trained: Any, fixed: Any) -> jax.Array:
        network = nnx.merge(graphdef, join_params(fixed, trained))
        hidden, _ = network.text_hidden(batch, attention, "reference", rows_share_prefix=True)
        return network.logits(hidden).sum()

    counted = xla_flops(jax.value_and_grad(loss), trained, fixed)
    expected = train_flops(model, batch, attention, trained_parts(params, frozen))
    # 1.5 %: XLA also counts norms, rotary embeddings, activations and softmax, and attention where it is masked.
    assert 0.985 < expected / counted < 1


def test_a_pair_of_attention_costs_what_xla_counts() -> None:
    queries, keys, heads, head_dim = 32, 48, 3, 128
    q = jax.ShapeDtypeStruct((1, 1, queries, 1, heads, head_dim), np.float32)
    k = jax.ShapeDtypeStruct((1, keys, 1, head_dim), np.float32)
    visible, lengths = np.full((1, 1, queries), keys, np.int32), np.full(1, keys, np.int32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return prefix_attention(q, k, v, visible, lengths, implementation="reference")[0].sum()

    counted = xla_flops(jax.value_and_grad(loss, argnums=(0, 1, 2)), q, k, k)
    # 4 %: XLA also counts the softmax, about ten operations a pair beside 12 x 128.
    assert 0.96 < 12 * heads * head_dim * queries * keys / counted < 1

    # As many pairs more in each layer of a model cost as much: text queries that see more of the video.
    model = wide_model()
    batches = [batch_of(VISUAL, text, FRAMES, GRID) for text in (7, 7)]
    batches[0].visible_visual[0, 1, 3] -= 5
    fewer, more = (train_flops(model, batch, "nsa") for batch in batches)
    assert more - fewer == 12 * 6 * 64 * 2 * 5


@pytest.mark.parametrize("length", [0, 3, 4, 37])
def test_pairs_are_those_that_the_definition_makes_visible(length: int) -> None:
    nsa = NSAConfig(block_size=4, block_count=3, window_size=6)
    query, key = np.arange(length)[:, None], np.arange(length)
    past_blocks = np.arange(length // 4) * 4 + 3 <= query
    # Which blocks are chosen changes nothing in their number: here the first ones, and the current one.
    chosen = (key // 4 < 2) | (key // 4 == query // 4)
    expected = {
        "compressed": past_blocks.sum(),
        "selected": (chosen & (key <= query)).sum(),
        "window": ((key <= query) & (key > query - 6)).sum(),
    }
    assert nsa_pairs(nsa, np.array([length])) == expected
    assert nsa_pairs(nsa, np.array([length, length])) == {branch: 2 * pairs for branch, pairs in expected.items()}
    assert nsa_pairs(dataclasses.replace(nsa, branches=("window",)), np.array([length])) == {
        "window": expected["window"]
    }


def test_patches_attend_in_their_frame_or_window() -> None:
    model = wide_model()
    rows, columns = (axis.ravel() for axis in np.indices((12, 20)))
    window = (rows // 8) * 100 + columns // 8
    pairs = (240**2, (window[:, None] == window).sum())  # one full layer, one windowed
    batch = batch_of(60, TEXT, 1, (12, 20))
    assert forward_flops(model, batch, "nsa")["blocks"].attention == 2 * 4 * 256 * sum(pairs)


def test_padding_costs_nothing() -> None:
    model, padded = wide_model(), batch_of(VISUAL, TEXT, FRAMES, GRID)
    padded.frame_grids[:, 1] = 0
    padded.visual_lengths[:] = 4
    padded.visible_visual[...] = np.minimum(padded.visible_visual, 4)
    padded.text_lengths[:] = 5
    bare = batch_of(4, 5, 1, GRID)
    for attention in ("nsa", "dense"):
        assert train_flops(model, padded, attention) == train_flops(model, bare, attention)


def test_the_published_model_costs_six_flops_a_parameter_and_token() -> None:
    model = dataclasses.replace(qwen2_5_vl_7b(), nsa=None)
    visual, text = 8 * 60, 4096
    batch = batch_of(visual, text, 8, (12, 20))
    flops = forward_flops(model, batch, "dense")
    # Qwen2.5-7B has 6.53 G parameters without its embeddings (its model card), and lm_head 0.54 G. Of the last of 28
    # layers, visual tokens need keys and values only.
    per_text, per_visual = 6.53e9 + 0.54e9, 6.53e9 * 27 / 28
    assert flops["llm"].weights == pytest.approx(2 * (per_text * 4 * text + per_visual * 2 * visual), rel=0.002)
    # The tower's 32 blocks have 19.7 M parameters each.
    assert flops["blocks"].weights == pytest.approx(2 * 32 * 19.7e6 * 2 * 8 * 240, rel=0.002)


def test_what_is_not_counted_is_none() -> None:
    model = wide_model()
    released = dataclasses.replace(model, nsa=dataclasses.replace(model.nsa, dialect="released"))
    assert train_flops(released, batch_of(VISUAL, TEXT, FRAMES, GRID), "nsa") is None
    assert train_flops(released, batch_of(VISUAL, TEXT, FRAMES, GRID), "dense") > 0
    assert peak_flops_per_second(["NVIDIA H200"] * 2) == 2 * 989.4e12
    assert peak_flops_per_second(["NVIDIA H200", "cpu"]) is None
