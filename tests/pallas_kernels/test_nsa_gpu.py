"""The whole NSA on Hopper: its gradient rule over float32 doubles of the kernels, and over the kernels, interpreted."""

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, assert_close

from pallas_kernels import gpu, nsa_attention, nsa_gpu
from pallas_kernels import gpu_flash_config as flash
from pallas_kernels.block_selection import reference as block_selection
from pallas_kernels.common import query_indices, resolve_lengths, zero_where
from pallas_kernels.compressed_attention import reference as compressed_attention
from pallas_kernels.selected_attention import reference as selected_attention
from pallas_kernels.specs import SPECS, Spec
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


def attend(case, q, k, v, gate_logits, *, operations=DOUBLES, **options):
    length = resolve_lengths(case.array_lengths, case.B, case.S)
    past = query_indices(case.T, case.q_offset) >= length[:, None]
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
        choice=case.choice,
        operations=operations,
        **{"block_indices": None, "choose_anyway": False} | options,
    )


def run(case, arrays, do, **options):
    """Output and gradients of q, k, v and the gate logits."""

    @jax.jit
    def both(arrays, do):
        o, pull = jax.vjp(functools.partial(attend, case, **options), *arrays)
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


def test_a_checkpoint_policy_keeps_the_kernels_results():
    """Under the policy no forward kernel runs again for the gradient; without it every one does."""
    case = Case(B=1, T=33, S=33, N=1, G=2)
    arrays, do = inputs(case)
    calls = []

    def counted(name):
        branch = getattr(DOUBLES, name)

        def count(x):
            calls.append(name)
            return x

        def forward(*arguments):
            o, lse = branch.forward(*arguments)
            return jax.pure_callback(count, jax.ShapeDtypeStruct(o.shape, o.dtype), o), lse

        return dataclasses.replace(branch, forward=forward)

    operations = dataclasses.replace(DOUBLES, **{name: counted(name) for name in nsa_gpu.BRANCHES})

    def gradients(policy):
        def loss(*arrays):
            layer = jax.checkpoint(lambda *x: jnp.sin(attend(case, *x, operations=operations)), policy=policy)
            return jnp.sum(layer(*arrays) * do)

        calls.clear()
        both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        return jax.block_until_ready(both(*arrays))[1]

    kept = gradients(nsa_gpu.save_attention)
    assert sorted(calls) == sorted(nsa_gpu.BRANCHES)
    again = gradients(None)
    assert sorted(calls) == sorted(2 * nsa_gpu.BRANCHES)
    for x, y in zip(kept, again, strict=True):
        assert_close(x, y, 1e-6, "gradient")


def test_replaced_choices_are_made_all_the_same():
    case = Case(B=1, T=33, S=33, N=1, G=2)
    arrays, do = inputs(case)
    given = jnp.zeros((1, 33, 1, 2), jnp.int32).at[..., 1].set(-1)
    chosen = []

    def choose_and_tell(*arguments):
        chosen.append(choose(*arguments))
        return chosen[-1]

    operations = dataclasses.replace(DOUBLES, choose=choose_and_tell)
    options = {"operations": operations, "block_indices": given}
    apart, together = (run(case, arrays, do, **options, choose_anyway=anyway) for anyway in (False, True))
    assert len(chosen) == 1
    for x, y in zip(apart, together, strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_composition_is_what_a_hopper_gpu_runs(monkeypatch):
    """`nsa_attention` hands over to it, and to the operations where it does not cover a call."""
    case = Case(B=1, T=64, S=64, N=1, G=2, D=64, s=64)
    q, k, v, gate_logits = (jnp.asarray(x, jnp.bfloat16) for x in inputs(case)[0])
    seen = []

    def attention(q, *arrays, **options):
        seen.append(options)
        return q + 1

    monkeypatch.setattr(nsa_gpu, "attention", attention)
    monkeypatch.setattr(gpu, "on_hopper", lambda kernel: kernel)
    call = functools.partial(nsa_attention, q, k, v, gate_logits, block_size=64, implementation="mosaic_gpu")
    np.testing.assert_array_equal(call(), q + 1)
    assert not seen[0]["ragged"]
    call(lengths=jnp.array([50]))
    assert seen[1]["ragged"]
    monkeypatch.undo()
    with pytest.raises(NotImplementedError, match="needs a Hopper GPU"):
        call()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lengths", "own"), [(None, False), ((130,), False), ((130,), True)], ids=["whole", "ragged", "own choice"]
)
def test_the_kernels_together(lengths, own, monkeypatch):
    """bfloat16 and its kernels, interpreted, within the relative norms that the kernels are held to on a GPU."""
    few = functools.partial(lambda heuristic, *x: dataclasses.replace(heuristic(*x), programs=1), flash.heuristic)
    monkeypatch.setattr(flash, "heuristic", few)
    # With as many places as blocks every candidate is chosen.
    case = Case(B=1, T=140, S=140, N=1, G=2, D=64, s=64, n=3 if own else 2, w=50, lengths=lengths)
    (*tensors, gate_logits), do = inputs(case)
    arrays, do = (*(jnp.asarray(x, jnp.bfloat16) for x in tensors), gate_logits), jnp.asarray(do, jnp.bfloat16)
    # A near-tie must not decide a comparison of values: the kernels' choice is made, and replaced.
    current = jnp.arange(140) // 64
    chosen = jnp.stack([jnp.where(current > 0, 0, -1), current], axis=-1).astype(jnp.int32)[None, :, None]
    options = {"operations": nsa_gpu.HOPPER, "interpret": plgpu.InterpretGPUParams()}
    if not own:
        options |= {"block_indices": chosen, "choose_anyway": True}
    actual = run(case, arrays, do, **options)
    # Without a gradient the selected kernel sums as it writes: one rounding less.
    alone = jax.jit(lambda *x: attend(case, *x, **options))(*arrays)
    assert jnp.linalg.norm((alone - actual[0]).astype(jnp.float32)) <= 6e-3 * jnp.linalg.norm(alone.astype(jnp.float32))
    for name, x, y in zip(NAMES, actual, expected(case, arrays, do, None if own else chosen), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        assert np.isfinite(x).all(), name
        assert np.linalg.norm(x - y) <= 2e-2 * np.linalg.norm(y), name


@pytest.mark.parametrize("spec", [SPECS[1], pytest.param(SPECS[4], marks=pytest.mark.slow)], ids=lambda spec: spec.name)
def test_forward_and_backward_lower_for_a_gpu(spec):
    """Every kernel of the whole passes Mosaic's own checks at full width; ragged lengths make other kernels."""
    length = jax.ShapeDtypeStruct((spec.batch,), jnp.int32)

    def both(q, k, v, logits, do, length):
        ragged = "ragged" in spec.name
        options = {"block_size": spec.block_size, "window_size": spec.window_size, "q_offset": 0, "length": length}
        options |= {"branches": nsa_gpu.BRANCHES, "block_indices": None, "choose_anyway": False, "ragged": ragged}
        choice = {"block_count": spec.block_count, "init_blocks": 0, "local_blocks": 1}
        o, pull = jax.vjp(lambda *x: nsa_gpu.attention(*x, **options, choice=choice), q, k, v, logits)
        return o, pull(do)

    q, k, v, logits = spec.shapes
    jax.jit(both).trace(q, k, v, logits, q, length).lower(lowering_platforms=("cuda",))


def test_kernels_lower_inside_shard_map():
    """As `nsa_attention_sharded` calls them: tokens over one axis, KV heads over the other, keys gathered."""
    mesh = jax.make_mesh((1, 1), ("context", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tokens = jax.sharding.PartitionSpec(None, "context", "tensor")
    options = {"block_size": 64, "window_size": 256, "branches": nsa_gpu.BRANCHES, "ragged": True}
    options |= {"block_indices": None, "choose_anyway": False}
    options |= {"choice": {"block_count": 8, "init_blocks": 0, "local_blocks": 1}}

    def local(q, k, v, logits):
        q_offset = jax.lax.axis_index("context") * q.shape[1]
        k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
        length = jnp.full((1,), k.shape[1], jnp.int32)
        return nsa_gpu.attention(q, k, v, logits, q_offset=q_offset, length=length, **options)

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(tokens,) * 4, out_specs=tokens, check_vma=False)

    def both(q, k, v, logits, do):
        o, pull = jax.vjp(sharded, q, k, v, logits)
        return o, pull(do)

    q, k, v, logits = Spec("short", queries=1024, keys=1024).shapes
    text = jax.jit(both).trace(q, k, v, logits, q).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") >= 11
