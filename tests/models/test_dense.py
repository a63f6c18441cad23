"""Dense attention against one plain causal pass over the interleaved sequence, and NSA where it must equal it."""

import dataclasses

import jax
import numpy as np
from flax import nnx
from model_cases import TOKENS_PER_SECOND, build, logits, make_batch, outputs, small_config, words

from videonsa_jax.models import VideoNSA
from videonsa_jax.streams import Visual, split_streams

CLIP, IMAGE = Visual((3, 3, 2), seconds_per_grid=1.0), Visual((1, 2, 4))


def _rms_norm(x, scale, eps):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * scale


def _linear(x, parameters):
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def _plain_decoder(parameters, config, x, positions):
    """A causal decoder over one sequence [L, hidden] with M-RoPE ids [3, L], in float64 NumPy."""
    length, half = len(x), config.head_dim // 2
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    inverse = 1 / config.rope_theta ** (np.arange(half) / half)
    axis = np.repeat(np.arange(3), config.mrope_section)
    turn = np.exp(1j * positions[axis].T * inverse)

    def split_heads(y, count, rotated):
        y = y.reshape(length, count, config.head_dim).swapaxes(0, 1)
        if not rotated:
            return y
        turned = (y[..., :half] + 1j * y[..., half:]) * turn
        return np.concatenate([turned.real, turned.imag], axis=-1)

    stacked = parameters["decoder"]["layers"]
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(config.num_hidden_layers - 1)]
    for layer in [*layers, parameters["decoder"]["last_layer"]]:
        attention = layer["self_attn"]
        normed = _rms_norm(x, layer["input_layernorm"]["scale"], config.rms_norm_eps)
        query = split_heads(_linear(normed, attention["q_proj"]), heads, True)
        key = split_heads(_linear(normed, attention["k_proj"]), kv_heads, True)
        value = split_heads(_linear(normed, attention["v_proj"]), kv_heads, False)
        key, value = (np.repeat(y, heads // kv_heads, axis=0) for y in (key, value))
        scores = query @ key.swapaxes(1, 2) / np.sqrt(config.head_dim)
        weights = np.where(np.tri(length, dtype=bool), np.exp(scores), 0)
        attended = weights / weights.sum(-1, keepdims=True) @ value
        x = x + _linear(attended.swapaxes(0, 1).reshape(length, -1), attention["o_proj"])
        normed = _rms_norm(x, layer["post_attention_layernorm"]["scale"], config.rms_norm_eps)
        gate = _linear(normed, layer["mlp"]["gate_proj"])
        x = x + _linear(
            gate / (1 + np.exp(-gate)) * _linear(normed, layer["mlp"]["up_proj"]), layer["mlp"]["down_proj"]
        )
    return _rms_norm(x, parameters["norm"]["scale"], config.rms_norm_eps)


def test_dense_equals_one_interleaved_sequence():
    """Logits of the text and hidden states of the visual tokens, of a conversation with a clip and an image."""
    config = small_config()
    model = build(config)
    parts = [words(3, 1), CLIP, words(4, 2), IMAGE, words(3, 3)]
    batch = make_batch([[parts]], visual=29, text=12)
    parameters = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(model)))

    split = split_streams(parts, tokens_per_second=TOKENS_PER_SECOND)
    visual = np.asarray(model.embed_visual(batch), np.float64)[0, : len(split.visible_text)]
    text = parameters["embed_tokens"]["embedding"][split.text_tokens]
    # A token's place in the sequence: those of its own stream before it, and those of the other.
    visual_place = np.arange(len(visual)) + split.visible_text
    text_place = np.arange(len(text)) + split.visible_visual
    sequence = np.zeros((len(visual) + len(text), config.text.hidden_size))
    positions = np.zeros((3, len(sequence)))
    sequence[visual_place], sequence[text_place] = visual, text
    positions[:, visual_place], positions[:, text_place] = split.visual_positions, split.text_positions
    hidden = _plain_decoder(parameters, config.text, sequence, positions)

    out = outputs(model, batch, "dense", return_visual=True)
    # Logits are of order 1; float32 through three layers.
    expected = _linear(hidden[text_place], parameters["lm_head"])
    np.testing.assert_allclose(out.logits[0, 0, : len(text)], expected, atol=1e-5)
    np.testing.assert_allclose(out.visual_hidden[0, : len(visual)], hidden[visual_place], atol=1e-5)


def _with_gates(model: VideoNSA, weight: float, bias: float) -> VideoNSA:
    """The same model, its gates' last map replaced: every gate is sigmoid(bias / temperature)."""
    graphdef, state = nnx.split(model)
    for layer in (state["decoder"]["layers"], state["decoder"]["last_layer"]):
        gate = layer["self_attn"]["g_proj_2"]
        gate["kernel"][...] = weight * gate["kernel"][...]
        gate["bias"][...] = 0 * gate["bias"][...] + bias
    return nnx.merge(graphdef, state)


def test_nsa_that_sees_everything_equals_dense():
    """Every block selected, or a window over all keys, is dense attention among visual tokens; gates open it."""
    batch = make_batch([[[CLIP, words(2, 1), IMAGE, words(3, 2)]], [[IMAGE, words(4, 3)]]])
    batch.visible_text[:] = 0  # NSA's visual tokens see no text; let dense ones see none either
    everything = {"block_count": 7, "window_size": 26}
    dense = logits(build(small_config(**everything)), batch, "dense")
    for branches, bias in (
        (("selected",), 100.0),
        (("window",), 100.0),
        (("selected", "window"), 0.0),  # two halves of the same
    ):
        model = _with_gates(build(small_config(branches=branches, **everything)), 0.0, bias)
        # Logits are of order 1; blockwise and prefix sums differ in order.
        np.testing.assert_allclose(logits(model, batch), dense, atol=1e-5)
    half_open = _with_gates(build(small_config(branches=("selected",), **everything)), 0.0, 0.0)
    assert np.abs(logits(half_open, batch) - dense).max() > 1e-3


def test_dense_without_gates_has_the_same_arithmetic():
    """A model with nsa=None and the same weights gives what dense attention gives on the gated one."""
    gated = build(small_config())
    config = dataclasses.replace(small_config(), nsa=None)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: VideoNSA(config, nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(nnx.state(gated)))
    shared = nnx.from_flat_state([(path, flat[path]) for path, _ in nnx.to_flat_state(state)])
    batch = make_batch([[[words(2, 1), CLIP, words(3, 2)]]])
    np.testing.assert_array_equal(logits(nnx.merge(graphdef, shared), batch), logits(gated, batch, "dense"))
