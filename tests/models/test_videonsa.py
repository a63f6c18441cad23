"""The whole model: last layer, scan, rematerialisation, dtypes, parameters, devices, errors."""

import dataclasses
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from model_cases import (
    build,
    jit,
    logits,
    loss_and_gradients,
    make_batch,
    outputs,
    small_config,
    words,
)

from videonsa_jax import configs
from videonsa_jax.models import VideoNSA
from videonsa_jax.models.attention import Attention, AttentionOptions, visibility
from videonsa_jax.models.decoder import Decoder
from videonsa_jax.streams import Visual

CLIP = Visual((3, 3, 2), seconds_per_grid=1.0)


@pytest.fixture(scope="module")
def model():
    return build(small_config())


@pytest.fixture(scope="module")
def batch():
    batch = make_batch([[[words(4, 1), CLIP, words(n, n)] for n in (3, 5)]])
    return jax.tree.map(jnp.asarray, batch)


@pytest.fixture(scope="module")
def result(model, batch):
    return loss_and_gradients(model, batch)


def _parameters(config: configs.ModelConfig) -> nnx.State:
    return nnx.state(nnx.eval_shape(lambda: VideoNSA(config, nnx.Rngs(0))))


def _count(state: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def test_last_layer_skip_is_exact(model, batch, result):
    with_visual = outputs(model, batch, return_visual=True)
    np.testing.assert_array_equal(with_visual.logits, logits(model, batch))
    assert with_visual.visual_hidden.shape == (1, 18, 32)
    assert outputs(model, batch).visual_hidden is None


def test_gradients_of_what_no_loss_reads_are_exactly_zero(result):
    """Of the last layer's gates; every other parameter has one, the text stream using all but the gates."""
    gradients = nnx.to_flat_state(nnx.state(result[1]))
    silent = {path for path, leaf in gradients if not np.any(leaf[...])}
    gate = ("decoder", "last_layer", "self_attn")
    assert silent == {(*gate, name, leaf) for name in ("g_proj_1", "g_proj_2") for leaf in ("kernel", "bias")}


def test_visual_half_of_the_last_layer_sends_no_gradient(model, batch):
    """With the text's own use of the last layer stopped, only its keys and values get a gradient."""

    def visual_part(model, batch):
        places = visibility(batch, model.config.text)
        zeros = jnp.zeros((1, 2, batch.text_tokens.shape[2], 32))
        hidden = (model.embed_visual(batch), zeros)
        visual, _ = model.decoder(hidden, places, AttentionOptions("nsa"))
        return jnp.sum(visual)

    gradients = jit(jax.grad(visual_part))(model, batch).decoder.last_layer
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradients))


def test_scan_equals_a_loop_over_layers(model, batch):
    def looped(model, batch):
        places = visibility(batch, model.config.text)
        hidden = (model.embed_visual(batch), model.embed_tokens(batch.text_tokens))
        graphdef, state = nnx.split(model.decoder.layers)
        layers = [nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(2)]
        for layer in (*layers, model.decoder.last_layer):
            hidden = layer(hidden, places, AttentionOptions("nsa"))
        return model.logits(model.norm(hidden[1])), model.norm(hidden[0])

    expected_logits, expected_visual = jit(looped)(model, batch)
    out = outputs(model, batch, return_visual=True)
    # The same operations, fused differently.
    np.testing.assert_allclose(out.logits, expected_logits, atol=1e-5)
    np.testing.assert_allclose(out.visual_hidden, expected_visual, atol=1e-5)


def test_bfloat16_is_finite_and_near(model, batch):
    """bf16 has 8 bits: three layers of it stay within a tenth of logits of order 1."""
    low = build(small_config(), dtype=jnp.bfloat16)
    out = outputs(low, batch, return_visual=True)
    assert out.logits.dtype == jnp.float32
    assert out.visual_hidden.dtype == jnp.bfloat16
    assert jax.tree.leaves(nnx.state(low))[0].dtype == jnp.float32
    # A near-tie of blocks may fall the other way; every block is selected here but for the last tokens'.
    assert np.abs(np.asarray(out.logits) - logits(model, batch)).mean() < 0.1
    assert np.isfinite(out.logits).all()


def test_param_dtype():
    state = nnx.state(nnx.eval_shape(lambda: VideoNSA(small_config(), nnx.Rngs(0), param_dtype=jnp.bfloat16)))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}


def test_parameters_of_the_published_sizes():
    """Qwen2.5-VL-7B's 8 292 166 656 parameters, and 13.15 M of gates in each of 28 layers; 3B ties its embeddings."""
    config = configs.qwen2_5_vl_7b()
    assert _count(_parameters(dataclasses.replace(config, nsa=None))) == 8_292_166_656
    gates = 3584 * 3584 + 3584 + 3584 * 84 + 84
    assert _count(_parameters(config)) == 8_292_166_656 + 28 * gates
    assert 28 * gates == 368_193_840
    assert _count(_parameters(dataclasses.replace(configs.qwen2_5_vl_3b(), nsa=None))) == 3_754_622_976


def test_tiny_has_about_a_million_parameters():
    assert 900_000 < _count(_parameters(configs.tiny())) < 1_100_000


def test_forced_blocks_must_fit_the_block_count():
    """As the kernels have it: the current block takes a place even where local_blocks is 0."""
    with pytest.raises(ValueError, match=r"NSAConfig: init_blocks 2 and local_blocks 0 .* add up to 3, expected at "):
        configs.NSAConfig(block_count=2, init_blocks=2, local_blocks=0)
    with pytest.raises(ValueError, match=r"NSAConfig: .* add up to 4, expected at most block_count 3"):
        configs.NSAConfig(block_count=3, init_blocks=2, local_blocks=2)
    with pytest.raises(ValueError, match=r"NSAConfig: init_blocks is -1 and local_blocks 1, expected neither below 0"):
        configs.NSAConfig(init_blocks=-1)
    configs.NSAConfig(block_count=2, init_blocks=1, local_blocks=0)


def test_initial_weights():
    """Gates as `gate_init` says, biases 0, other kernels of variance 1 / fan in, less where they write the stream."""
    config = configs.tiny()

    def weights(build_module):
        return jax.tree.map(np.asarray, nnx.to_pure_dict(jax.jit(lambda: nnx.state(build_module(nnx.Rngs(0))))()))

    types = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    attention = weights(lambda rngs: Decoder(config.text, config.nsa, rngs=rngs, **types))["layers"]["self_attn"]
    # Estimates from 128 x 128 or more draws a layer lie within 5 percent.
    np.testing.assert_allclose(attention["q_proj"]["kernel"].std(), 128**-0.5, rtol=0.05)
    np.testing.assert_allclose(attention["o_proj"]["kernel"].std(), (128 * 6) ** -0.5, rtol=0.05)
    np.testing.assert_allclose(attention["g_proj_1"]["kernel"].std(), 0.02, rtol=0.05)
    np.testing.assert_allclose(attention["g_proj_2"]["kernel"].std(), 0.02, rtol=0.05)
    assert not np.array_equal(attention["q_proj"]["kernel"][0], attention["q_proj"]["kernel"][1])
    assert not any(np.any(attention[name]["bias"]) for name in ("q_proj", "k_proj", "v_proj", "g_proj_1", "g_proj_2"))

    nsa = dataclasses.replace(config.nsa, gate_init="zero")
    zero = weights(lambda rngs: Attention(config.text, nsa, rngs=rngs, **types))
    assert not np.any(zero["g_proj_2"]["kernel"])
    assert np.any(zero["g_proj_1"]["kernel"])


def test_errors(model, batch):
    with pytest.raises(ValueError, match=r'attention is "nsa", but config.nsa is None'):
        build(dataclasses.replace(small_config(), nsa=None))(batch, attention="nsa")
    with pytest.raises(ValueError, match="dense attention supports Q = 1 text row a context only, got Q = 2 rows"):
        model(batch, attention="dense")
    with pytest.raises(ValueError, match="attention is 'sparse', expected"):
        model(batch, attention="sparse")


def test_eight_devices_give_what_one_gives():
    """Contexts over `data`, visual tokens over `context`, KV heads over `tensor`; loss and gradients."""
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        import jax
        jax.config.update("jax_num_cpu_devices", 8)
        import numpy as np
        from functools import partial
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from model_cases import assert_close, build, jit, make_batch, small_config, words
        from videonsa_jax.streams import BATCH_AXIS_SECOND, Batch, Visual

        contexts = [[[words(4, b), Visual((3, 3, 2), 1.0), words(n, n)] for n in (3, 5)] for b in range(2)]
        batch, model = make_batch(contexts, visual=20), build(small_config())

        @partial(jit, static_argnames="mesh")
        def step(model, batch, mesh):
            def loss(model):
                return (model(batch, mesh=mesh).logits ** 2).mean()
            return jax.value_and_grad(loss)(model)

        expected = step(model, batch, None)
        mesh = jax.make_mesh((2, 1, 2, 2), ("data", "fsdp", "context", "tensor"), axis_types=(AxisType.Auto,) * 4)
        rows = PartitionSpec(("data", "fsdp"))
        sharded = Batch(**{
            name: jax.device_put(value, NamedSharding(
                mesh, PartitionSpec(None, *rows) if name in BATCH_AXIS_SECOND else rows))
            for name, value in vars(batch).items()
        })
        assert_close(step(model, sharded, mesh), expected, 2e-5)  # float32 sums over shards
        print("same")
    """
    here = Path(__file__).parent
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), str(here)],
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "same", ran.stderr
