"""Small models and batches that the model tests share."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from videonsa_jax import configs
from videonsa_jax.models import Output, VideoNSA
from videonsa_jax.streams import Batch, Visual, split_streams

type Parts = Sequence[Sequence[int] | Visual]
TOKENS_PER_SECOND = 2.0


def small_config(**nsa: object) -> configs.ModelConfig:
    """Three decoder layers, G = 2, N = 2; blocks of 4 and windows of 4 patches, so that a dozen tokens are sparse."""
    return configs.ModelConfig(
        vision=configs.VisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=40,
            num_heads=2,
            out_hidden_size=32,
            patch_size=2,
            window_size=8,
            fullatt_block_indexes=(1,),
        ),
        text=configs.TextConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rope_theta=100.0,
            mrope_section=(4, 2, 2),
            tokens_per_second=TOKENS_PER_SECOND,
        ),
        nsa=configs.NSAConfig(**({"block_size": 4, "block_count": 3, "window_size": 6} | nsa)),
    )


def build(config: configs.ModelConfig, seed: int = 0, **options: object) -> VideoNSA:
    """A model none of whose parameters is 0 or 1, so that a bias or scale left out shows."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoNSA(config, nnx.Rngs(0), **options)))
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-2].key
        spread = leaf.shape[-2] ** -0.5 if name in ("kernel", "embedding") else 0.1
        return jnp.asarray((name == "scale") + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def words(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 61, count).tolist()


def make_batch(
    contexts: Sequence[Sequence[Parts]],
    *,
    pixel_seeds: Sequence[int] | None = None,
    frames: int = 0,
    patches: int = 0,
    visual: int = 0,
    text: int = 0,
    padding_seed: int = 0,
) -> Batch:
    """Lays out contexts (each a list of rows with the same visuals); padding is drawn from `padding_seed`.

    `frames`, `patches`, `visual` and `text` are the least padded sizes.
    """
    rng = np.random.default_rng(padding_seed)
    vision = small_config().vision
    rows = [[split_streams(row, tokens_per_second=TOKENS_PER_SECOND) for row in context] for context in contexts]
    grids = [[part.grid for part in context[0] if isinstance(part, Visual)] for context in contexts]
    B, Q = len(contexts), len(contexts[0])
    F = max([frames, *(sum(t for t, _, _ in grid) for grid in grids)])
    P = max([patches, *(4 * h * w for grid in grids for _, h, w in grid)])
    Lv = max([visual, *(row[0].visual_positions.shape[1] for row in rows)])
    Lt = max([text, *(len(row.text_tokens) for context in rows for row in context)])

    def noise(*shape: int, high: int) -> np.ndarray:
        return rng.integers(0, high, shape).astype(np.int32)

    batch = Batch(
        patches=rng.integers(0, 256, (B, F, P, vision.patch_dim), dtype=np.uint8),
        frame_grids=np.zeros((B, F, 2), np.int32),
        visual_source=np.zeros((B, Lv), np.int32),
        visual_positions=noise(3, B, Lv, high=9),
        visual_lengths=np.zeros(B, np.int32),
        visible_text=noise(B, Lv, high=5),
        text_tokens=noise(B, Q, Lt, high=61),
        text_positions=noise(3, B, Q, Lt, high=9),
        text_lengths=np.zeros((B, Q), np.int32),
        visible_visual=noise(B, Q, Lt, high=5),
    )
    for b, context in enumerate(rows):
        pixels = np.random.default_rng(b if pixel_seeds is None else pixel_seeds[b])
        frame = token = 0
        for t, h, w in grids[b]:
            for _ in range(t):
                batch.frame_grids[b, frame] = 2 * h, 2 * w
                batch.patches[b, frame, : 4 * h * w] = pixels.integers(0, 256, (4 * h * w, vision.patch_dim))
                batch.visual_source[b, token : token + h * w] = frame * (P // 4) + np.arange(h * w)
                frame, token = frame + 1, token + h * w
        batch.visual_lengths[b] = token
        batch.visual_positions[:, b, :token] = context[0].visual_positions
        batch.visible_text[b, :token] = context[0].visible_text
        for q, row in enumerate(context):
            length = len(row.text_tokens)
            batch.text_lengths[b, q] = length
            batch.text_tokens[b, q, :length] = row.text_tokens
            batch.text_positions[:, b, q, :length] = row.text_positions
            batch.visible_visual[b, q, :length] = row.visible_visual
    return batch


def replace(batch: Batch, **fields: np.ndarray) -> Batch:
    return dataclasses.replace(batch, **fields)


# These tests compile much and compute little.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@partial(jit, static_argnames=("attention", "return_visual"))
def outputs(model: VideoNSA, batch: Batch, attention: str | None = None, return_visual: bool = False) -> Output:
    return model(batch, attention=attention, return_visual=return_visual)


def logits(model: VideoNSA, batch: Batch, attention: str | None = None) -> np.ndarray:
    return np.asarray(outputs(model, batch, attention).logits)


def visual_hidden(model: VideoNSA, batch: Batch) -> np.ndarray:
    return np.asarray(outputs(model, batch, return_visual=True).visual_hidden)


def loss(model: VideoNSA, batch: Batch, attention: str | None = None, rows_share_prefix: bool = False) -> jax.Array:
    """Sum over valid text tokens of the cross-entropy of a target that depends on the token alone."""
    hidden, _ = model.text_hidden(batch, attention, rows_share_prefix=rows_share_prefix)
    log_probabilities = jax.nn.log_softmax(model.logits(hidden))
    targets = (7 * batch.text_tokens + 3) % 61
    of_target = jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1)[..., 0]
    valid = jnp.arange(targets.shape[-1]) < batch.text_lengths[..., None]
    return -jnp.sum(jnp.where(valid, of_target, 0.0))


@partial(jit, static_argnames=("attention", "rows_share_prefix"))
def loss_and_gradients(
    model: VideoNSA, batch: Batch, attention: str | None = None, rows_share_prefix: bool = False
) -> tuple[jax.Array, VideoNSA]:
    return jax.value_and_grad(loss)(model, batch, attention, rows_share_prefix)


def assert_close(actual: object, expected: object, tolerance: float) -> None:
    """Compares pytrees leaf by leaf, relative to the largest magnitude of the expected leaf."""
    actual_leaves, expected_leaves = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual_leaves) == len(expected_leaves)
    for x, y in zip(actual_leaves, expected_leaves, strict=True):
        scale = max(float(np.max(np.abs(y), initial=0.0)), 1e-3)
        np.testing.assert_allclose(np.asarray(x) / scale, np.asarray(y) / scale, atol=tolerance, rtol=0)
