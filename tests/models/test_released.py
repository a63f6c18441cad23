"""The dialect `released` against arrays recorded from the published code (tests/golden/README.md)."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import TOKENS_PER_SECOND, build, jit, logits, make_batch, small_config, words

from videonsa_jax.configs import NSAConfig
from videonsa_jax.models import released, rope
from videonsa_jax.models.attention import visibility
from videonsa_jax.streams import Visual, split_streams

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))

import recipe  # noqa: E402

COPIES = {"ms": "training", "lm": "evaluation"}
G = recipe.HEADS // recipe.KV_HEADS
# (seed, length, block_count, window_size) of every recorded case.
CASES = [
    (0, 257, 4, 96),
    (0, 257, 16, 256),
    (1, 257, 4, 96),
    (0, 640, 4, 256),
    (0, 640, 5, 96),
    (1, 640, 4, 96),
    (0, 1024, 4, 96),
    (0, 1024, 16, 256),
    (0, 1024, 32, 256),
    (1, 1024, 4, 256),
]
LONG_CASES = [(0, 4480, 32, 256), (0, 4480, 64, 256), (0, 4480, 10, 96)]  # more blocks than one chunk of the network


@functools.cache
def recorded(name):
    with np.load(GOLDEN / f"released_{name}.npz") as file:
        return dict(file)


def config(block_count, window_size, copy):
    return NSAConfig(block_count=block_count, window_size=window_size, dialect="released", released_copy=COPIES[copy])


def by_kv_head(heads):
    """[heads, T, D] -> [T, N, G, D], or [T, N, D] of as many heads as KV heads."""
    by_token = heads.swapaxes(0, 1)
    return by_token if len(heads) == recipe.KV_HEADS else by_token.reshape(len(by_token), recipe.KV_HEADS, G, -1)


def gate_logits(drawn):
    hidden = jax.nn.gelu(drawn["hidden"] @ drawn["first"].T + drawn["first_bias"], approximate=False)
    logits = hidden @ drawn["second"].T + drawn["second_bias"]
    return logits.reshape(len(logits), recipe.KV_HEADS, G, 3)


@functools.partial(jax.jit, static_argnames="nsa")
def attention(drawn, is_visual, nsa):
    """[T, 28, D], the sequence embedded in a longer padded row beside another row."""
    rows = [by_kv_head(drawn[name]) for name in ("query", "key", "value")] + [gate_logits(drawn), is_visual]
    padded = [jnp.pad(x, [(0, 70)] + [(0, 0)] * (x.ndim - 1), constant_values=3) for x in rows]
    beside = 1 if len(is_visual) < 1000 else 0  # long sequences go alone, to save time
    batch = [jnp.stack([x] + beside * [jnp.roll(x, 1, axis=0)]) for x in padded]
    lengths = jnp.array([len(is_visual)] + beside * [100])
    out = released.released_attention(*batch, lengths, nsa)
    return out[0, : len(is_visual)].reshape(len(is_visual), recipe.HEADS, -1), out[0, len(is_visual) :]


@functools.partial(jax.jit, static_argnames="nsa")
def blocks(drawn, is_visual, nsa):
    query, key = (by_kv_head(drawn[name]) for name in ("query", "key"))
    return released.selected_blocks(query, key, is_visual, jnp.int32(len(is_visual)), nsa)


def compare_values(case, copy):
    seed, length, block_count, window_size = case
    arrays, prefix = recorded("f32"), f"s{seed}_T{length}"
    output, padding = attention(
        recipe.inputs(seed, length), arrays[f"{prefix}/is_vision"], config(block_count, window_size, copy)
    )
    rows, heads = arrays[f"{prefix}/rows"][:, None], arrays[f"{prefix}/heads28"]
    # Float32 on both sides, sums in another order; values are of order 1.
    expected = arrays[f"{prefix}/bc{block_count}_w{window_size}/mixed_{copy}"]
    np.testing.assert_allclose(np.asarray(output)[rows, heads], expected, atol=1e-4)
    assert not padding.any()


def compare_blocks(case, copy):
    seed, length, block_count, window_size = case
    arrays, prefix = recorded("f32"), f"s{seed}_T{length}"
    nsa = config(block_count, window_size, copy)
    found = np.asarray(blocks(recipe.inputs(seed, length), arrays[f"{prefix}/is_vision"], nsa))
    rows = arrays.get(f"{prefix}/bi_rows", np.arange(length))
    expected = arrays[f"{prefix}/bc{block_count}_w{window_size}/block_indices_{copy}"]
    np.testing.assert_array_equal(found[rows], expected)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("case", [CASES[0], CASES[4]])
def test_values_are_the_recorded_ones(case, copy):
    compare_values(case, copy)


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("case", CASES[:5])
def test_selected_blocks_are_the_recorded_ones(case, copy):
    compare_blocks(case, copy)


@pytest.mark.slow
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("case", [*CASES[1:4], *CASES[5:], *LONG_CASES])
def test_values_of_the_other_cases_are_the_recorded_ones(case, copy):
    compare_values(case, copy)


@pytest.mark.slow
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("case", [*CASES[5:], *LONG_CASES])
def test_selected_blocks_of_longer_sequences_are_the_recorded_ones(case, copy):
    compare_blocks(case, copy)


def test_gradients_are_the_recorded_ones():
    seed, length, prefix = 0, 257, "s0_T257/bc4_w96"
    arrays, is_visual = recorded("grad"), recorded("f32")["s0_T257/is_vision"]
    cotangent = recipe.cotangent(seed, length)

    def loss(drawn):
        return jnp.sum(attention(drawn, is_visual, config(4, 96, "ms"))[0] * cotangent)

    gradients = jax.device_get(jax.grad(loss)(recipe.inputs(seed, length)))
    rows, heads = arrays[f"{prefix}/rows"], arrays[f"{prefix}/heads28"]
    found = {
        "dq": gradients["query"].swapaxes(0, 1)[rows[:, None], heads],
        "dk": gradients["key"].swapaxes(0, 1)[rows],
        "dv": gradients["value"].swapaxes(0, 1)[rows],
        "dhid": gradients["hidden"],
        "dW1": gradients["first"],
        "db1": gradients["first_bias"],
        "dW2": gradients["second"],
        "db2": gradients["second_bias"],
    }
    for name, gradient in found.items():
        expected = arrays[f"{prefix}/mixed_{name}"]
        # Relative to each array's largest value: the weights' gradients are sums over all tokens, up to 300.
        np.testing.assert_allclose(gradient, expected, atol=1e-3 * max(1.0, np.abs(expected).max()), err_msg=name)
    for name, key in (("dq", "query"), ("dk", "key"), ("dv", "value")):
        np.testing.assert_allclose(np.linalg.norm(gradients[key]), arrays[f"{prefix}/mixed_{name}_norm"], rtol=1e-4)


@pytest.mark.parametrize("length", recipe.LAYOUTS)
def test_ids_and_visual_tokens_are_the_recorded_ones(length):
    """The published ids are those of `int_seconds`, and its visual tokens those whose ids differ."""
    parts, ids = recipe.LAYOUTS[length], np.zeros((3, length), int)
    row = split_streams(
        [
            [0] * part if isinstance(part, int) else Visual(part[:3], part[3]) if len(part) == 4 else Visual((1, *part))
            for part in parts
        ],
        tokens_per_second=recipe.TOKENS_PER_SECOND,
        mrope="int_seconds",
    )
    ids[:, np.arange(len(row.visible_text)) + row.visible_text] = row.visual_positions
    ids[:, np.arange(len(row.visible_visual)) + row.visible_visual] = row.text_positions
    arrays = recorded("f32")
    np.testing.assert_array_equal(ids, arrays[f"s0_T{length}/position_ids"])
    np.testing.assert_array_equal((ids != ids[0]).any(0), arrays[f"s0_T{length}/is_vision"])


def test_the_evaluation_copy_drops_the_dense_part_of_visual_only_sequences():
    """The training copy adds a uniform average of the values so far to every visual token; the other does not here."""
    drawn = {name: x[:, :70] if x.ndim == 3 else x for name, x in recipe.inputs(1, 257).items()}
    drawn["hidden"] = drawn["hidden"][:70]
    everything = np.ones(70, bool)
    evaluation, training = (attention(drawn, everything, config(4, 96, copy))[0] for copy in ("lm", "ms"))
    values = by_kv_head(drawn["value"])
    means = np.cumsum(values, axis=0) / np.arange(1, 71)[:, None, None]
    # All of a sequence's first two blocks are selected, whatever they score: the copies differ by the means alone.
    expected = np.repeat(means, G, axis=1)
    np.testing.assert_allclose(training - evaluation, expected, atol=1e-5)


def test_streams_are_merged_in_sequence_order():
    visible_text = jnp.array([[2, 2, 3, 9], [0, 0, 0, 0]])
    visible_visual = jnp.array([[[0, 0, 2, 3, 3]], [[3, 3, 9, 9, 9]]])
    places = released.sequence_places(visible_text, visible_visual, jnp.array([3, 3]), jnp.array([[5], [2]]))
    visual = jnp.array([[10, 11, 12, -1], [20, 21, 22, -1]], jnp.float32)
    text = jnp.array([[[1, 2, 3, 4, 5]], [[6, 7, -2, -2, -2]]], jnp.float32)
    merged = released.merge_streams((visual, text), places)
    np.testing.assert_array_equal(merged[0, :8], [1, 2, 10, 11, 3, 12, 4, 5])
    np.testing.assert_array_equal(merged[1, :5], [20, 21, 22, 6, 7])
    for before, after in zip((visual, text), released.split_streams(merged, places), strict=True):
        np.testing.assert_array_equal(before, after)


def test_what_the_published_kernel_refuses_is_refused():
    with pytest.raises(
        ValueError, match=r"block_size must be a power of two of at least 128 \(block_count is 65\), got 64"
    ):
        NSAConfig(dialect="released", block_count=65)
    with pytest.raises(ValueError, match="no init_blocks, local_blocks or branches to choose"):
        dataclasses.replace(NSAConfig(dialect="released"), init_blocks=1)


def _published_layer(parameters, config, nsa, x, positions):
    """One layer's attention over a sequence [L, hidden], from its parameters and `released_attention` alone."""
    tables = rope.mrope_tables(jnp.asarray(positions), config.mrope_section, config.rope_theta)

    def project(name):
        weights = parameters[name]
        return x @ weights["kernel"] + weights["bias"]

    def heads(name, *shape):
        return project(name).reshape(len(x), *shape, config.head_dim)

    def turn(y):
        return rope.rotate(y, tuple(table.reshape(len(x), *(1,) * (y.ndim - 2), -1) for table in tables))

    N, group = config.num_key_value_heads, config.group_size
    hidden = jax.nn.gelu(project("g_proj_1"), approximate=False)
    gates = hidden @ parameters["g_proj_2"]["kernel"] + parameters["g_proj_2"]["bias"]
    out = released.released_attention(
        turn(heads("q_proj", N, group))[None],
        turn(heads("k_proj", N))[None],
        heads("v_proj", N)[None],
        gates.reshape(1, len(x), N, group, 3),
        jnp.asarray((positions != positions[0]).any(0))[None],
        jnp.array([len(x)]),
        nsa,
    )
    return out[0].reshape(len(x), -1) @ parameters["o_proj"]["kernel"]


@pytest.mark.parametrize("copy", ["evaluation", "training"])
def test_a_model_runs_it_in_sequence_order(copy):
    """A layer on two padded streams against the same on the plain sequence; a conversation of text alone is dense."""
    nsa = {"dialect": "released", "released_copy": copy, "block_size": 8, "block_count": 2}
    model = build(small_config(**nsa))
    parts = [words(3, 1), Visual((3, 3, 2), 1.0), words(4, 2), Visual((1, 2, 4)), words(3, 3)]
    batch = make_batch([[parts], [[words(5, 4)]]], visual=29, text=12)
    row = split_streams(parts, tokens_per_second=TOKENS_PER_SECOND)
    places = np.arange(26) + row.visible_text, np.arange(10) + row.visible_visual
    positions = np.zeros((3, 36), int)
    positions[:, places[0]], positions[:, places[1]] = row.visual_positions, row.text_positions
    hidden = np.random.default_rng(0).standard_normal((36, 32)).astype(np.float32)

    streams = jnp.full((2, 29, 32), 2.0).at[0, :26].set(hidden[places[0]])
    text = jnp.full((2, 1, 12, 32), 2.0).at[0, 0, :10].set(hidden[places[1]])
    shared = visibility(jax.tree.map(jnp.asarray, batch), model.config.text)
    layer = model.decoder.last_layer

    @jit
    def both(layer, visual, text):
        normed, visual_kv, text_kv = layer.project((visual, text), shared)
        return normed, layer.self_attn.attend_released(normed, visual_kv, text_kv, shared)

    normed, attended = both(layer, streams, text)
    sequence = np.zeros((36, 32), np.float32)
    sequence[places[0]], sequence[places[1]] = normed[0][0, :26], normed[1][0, 0, :10]
    parameters = nnx.to_pure_dict(nnx.state(layer.self_attn))
    expected = _published_layer(parameters, model.config.text, model.config.nsa, sequence, positions)
    # Float32, values of order 1, the same sums.
    np.testing.assert_allclose(attended[0][0, :26], expected[places[0]], atol=1e-5)
    np.testing.assert_allclose(attended[1][0, 0, :10], expected[places[1]], atol=1e-5)

    alone, dense = logits(model, batch)[1], logits(model, batch, "dense")[1]
    np.testing.assert_allclose(alone[0, :5], dense[0, :5], atol=1e-5)
    with pytest.raises(ValueError, match='dialect "released" supports Q = 1 text row a context only, got Q = 2'):
        model(make_batch([[[words(2, 1)], [words(3, 2)]]]))
