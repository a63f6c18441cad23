"""Native Sparse Attention on Hopper: the operations of `nsa` under one gradient rule.

Called one by one, each branch would save its own inputs and start its gradient from a cotangent of its own. Here the
three share the cotangent do of the gated sum. With a branch's gate g, probabilities p and output o,

    dv = (g p)^T do        ds = (g p) (do v^T - sum_d do o)        d logit = (sum_d do o) g (1 - g)

so a kernel that is given the log-sum-exp less log g, and the row products sum_d do o as its delta, needs no scaled copy
of do and knows nothing of gates.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, Int32

from pallas_kernels import gpu, gpu_flash, gpu_flash_config, gpu_flash_plan
from pallas_kernels.block_selection import mosaic_gpu as block_selection
from pallas_kernels.block_selection.choice import replaced_choice
from pallas_kernels.block_words import indices_of
from pallas_kernels.common import EMPTY_LSE, Scalar, query_indices, zero_where
from pallas_kernels.compressed_attention import mosaic_gpu as compressed_attention
from pallas_kernels.selected_attention import gpu_config as selected_config
from pallas_kernels.selected_attention import gpu_lists as selected_lists
from pallas_kernels.selected_attention import mosaic_gpu as selected_attention
from pallas_kernels.window_attention import mosaic_gpu as window_attention

BRANCHES = ("compressed", "selected", "window")

SAVED = (
    "nsa_query",
    "nsa_key",
    "nsa_value",
    "nsa_gate_logits",
    "nsa_choice",
    *(f"nsa_{branch}_{result}" for branch in BRANCHES for result in ("output", "lse")),
)
"""Names of what the gradient keeps. Block means, gates and the lists of each block's queries are computed again."""

save_attention = jax.checkpoint_policies.save_only_these_names(*SAVED)
"""Policy for `jax.checkpoint`: the gradient runs no forward kernel of the attention again."""


@dataclasses.dataclass(frozen=True)
class Branch:
    """How one branch attends.

    Attributes:
      prepare: (settings, q, k, choice, length, q_offset) -> what the forward and the backward kernels read beside q, k
        and v. The choice is what `Operations.choose` returned, or block indices. Keys past the length are finite,
        queries past it need not be.
      forward: (settings, q, k, v, prepared) -> output in q's dtype, log-sum-exp in float32.
      backward: (settings, q, k, v, do, lse, delta, prepared) -> dq, dk, dv, for probabilities exp(logits - lse) and
        ds = p (do v^T - delta). What do holds past a row's length does not matter.
      summed: (settings, q, k, v, prepared, gate, gates of others, others' outputs) -> the gated sum in q's dtype; None:
        only `forward` is there.
    """

    prepare: Callable[..., tuple[Any, Any]]
    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
    summed: Callable[..., jax.Array] | None = None


@dataclasses.dataclass(frozen=True)
class Operations:
    """The kernels of the branches, and the choice of blocks.

    Attributes:
      compressed: on block means.
      selected: on the chosen blocks.
      window: on the last keys.
      choose: (settings, q, k_blocks, lse, length, q_offset) -> block indices, see `block_selection.api`, or `Words`.
    """

    compressed: Branch
    selected: Branch
    window: Branch
    choose: Callable[..., Any]


class Words(NamedTuple):
    """A choice as bits.

    Attributes:
      words: [B, T, N, W] int32; see `pallas_kernels.block_words`. Only of blocks that the query sees.
    """

    words: Int32[jax.Array, "B T N W"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is static in a call.

    Attributes:
      block_size: as in `nsa.nsa_attention`; so are the next ones.
      window_size: see there.
      block_count: see there.
      init_blocks: see there.
      local_blocks: see there.
      branches: see there.
      ragged: whether some row may have keys, or queries, past its length.
      choose_anyway: see `nsa.nsa_attention`.
      complete_blocks: blocks that the keys fill.
      operations: the kernels.
      interpret: parameters of Pallas's GPU interpreter; None compiles.
    """

    block_size: int
    window_size: int
    block_count: int
    init_blocks: int
    local_blocks: int
    branches: tuple[str, ...]
    ragged: bool
    choose_anyway: bool
    complete_blocks: int
    operations: Operations
    interpret: Any

    @property
    def choice(self) -> dict[str, int]:
        """Static arguments of `block_selection`."""
        return {name: getattr(self, name) for name in ("block_size", "block_count", "init_blocks", "local_blocks")}

    @property
    def used(self) -> tuple[str, ...]:
        """The branches that count, in the order of the gates."""
        return tuple(branch for branch in BRANCHES if branch in self.branches)


def _prepare_compressed(
    settings: Settings, q: jax.Array, k: jax.Array, choice: Any, length: jax.Array, q_offset: jax.Array
) -> tuple[gpu_flash.Visible, gpu_flash.Visible]:
    lengths = length if settings.ragged else None
    visible = compressed_attention.visible_blocks(*q.shape[:2], k.shape[1], settings.block_size, q_offset, lengths)
    return (visible._replace(key_length=None),) * 2


def _prepare_window(
    settings: Settings, q: jax.Array, k: jax.Array, choice: Any, length: jax.Array, q_offset: jax.Array
) -> tuple[gpu_flash.Visible, gpu_flash.Visible]:
    visible = window_attention.visible_window(*q.shape[:2], k.shape[1], q_offset, length)
    query_length = visible.query_length if settings.ragged else None
    return (visible._replace(query_length=query_length, key_length=None),) * 2


def _flash_rule(
    settings: Settings, windowed: bool, q: jax.Array, k: jax.Array, visible: gpu_flash.Visible
) -> tuple[gpu_flash.Rule, gpu_flash_plan.Tiles]:
    batch, queries, heads, group, size = q.shape
    window = settings.window_size if windowed else None
    finite = visible.query_length is None
    config = gpu_flash_config.heuristic(queries, k.shape[1], batch * heads, group, size, window, finite)
    tiles = gpu_flash_plan.Tiles(batch, queries, heads, group, config.tokens)
    return gpu_flash.Rule("nsa", window, config, settings.interpret), tiles


def _flash_forward(
    windowed: bool, settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, visible: gpu_flash.Visible
) -> tuple[jax.Array, jax.Array]:
    rule, tiles = _flash_rule(settings, windowed, q, k, visible)
    o, lse = gpu_flash.attend(rule, q, k, v, visible)
    return o, tiles.unpack(lse)


def _flash_backward(
    windowed: bool,
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    visible: gpu_flash.Visible,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rule, tiles = _flash_rule(settings, windowed, q, k, visible)
    return gpu_flash.gradients(rule, q, k, v, visible, do, tiles.pack(lse, EMPTY_LSE), delta)


def _prepare_selected(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    choice: Words | jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[Any, Any]:
    selected_attention.check_covered(q, k, settings.block_size)
    config = _selected_config(q)
    return prepared_lists(settings, config.forward.tokens, config.dq.tokens, k, choice, length, q_offset)


def prepared_lists(
    settings: Settings,
    forward: int,
    dq: int,
    k: jax.Array,
    choice: Words | jax.Array,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[Any, Any]:
    """What a selected branch's `prepare` gives, for tiles of so many tokens in the forward kernel and in dq's."""
    place = (length, q_offset, k.shape[1], settings.block_size)
    if isinstance(choice, Words):
        build = functools.partial(selected_lists.tile_lists_from_words, choice.words, settings.block_count, *place)
    else:
        choice = selected_lists.visible_choice(choice, *place)
        build = functools.partial(selected_lists.tile_lists, choice, *place)
    lists = selected_lists.work_lists(forward, dq, build)
    choice, (of_forward, of_dq) = jax.tree.map(lambda x: checkpoint_name(x, "nsa_choice"), (choice, lists))
    return of_forward, (choice, q_offset, of_dq)


def chosen_blocks(settings: Settings, choice: Words | jax.Array) -> jax.Array:
    """The choice that `prepared_lists` kept, as block indices [B, N, T, n]."""
    return jnp.swapaxes(indices_of(choice.words, settings.block_count), 1, 2) if isinstance(choice, Words) else choice


def _selected_forward(
    settings: Settings, q: jax.Array, k: jax.Array, v: jax.Array, lists: selected_lists.TileLists
) -> tuple[jax.Array, jax.Array]:
    return selected_attention.forward(_selected_config(q).forward, settings.interpret, q, k, v, lists)


def _selected_summed(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lists: selected_lists.TileLists,
    gate: jax.Array,
    gates: list[jax.Array],
    others: list[jax.Array],
) -> jax.Array:
    gated = selected_attention.Gated((gate, *gates), tuple(others))
    return selected_attention.forward(_selected_config(q).forward, settings.interpret, q, k, v, lists, gated)[0]


def _selected_backward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    prepared: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    choice, q_offset, lists = prepared
    chosen, config = chosen_blocks(settings, choice), _selected_config(q)
    return selected_attention.backward_from(
        config, settings.interpret, q, k, v, do, lse, delta, chosen, q_offset, lists
    )


def _selected_config(q: jax.Array) -> selected_config.Config:
    return selected_config.heuristic(q.shape[1], q.shape[0] * q.shape[2], q.shape[4], q.shape[3])


def _choose(
    settings: Settings, q: jax.Array, k_blocks: jax.Array, lse: jax.Array, length: jax.Array, q_offset: jax.Array
) -> Words:
    return Words(
        block_selection.block_words(
            q,
            k_blocks,
            lse,
            **settings.choice,
            q_offset=q_offset,
            lengths=length if settings.ragged else None,
            interpret=settings.interpret,
        )
    )


HOPPER = Operations(
    compressed=Branch(
        _prepare_compressed,
        functools.partial(_flash_forward, False),
        functools.partial(_flash_backward, False),
    ),
    selected=Branch(_prepare_selected, _selected_forward, _selected_backward, _selected_summed),
    window=Branch(
        _prepare_window,
        functools.partial(_flash_forward, True),
        functools.partial(_flash_backward, True),
    ),
    choose=_choose,
)


def covers(q: Float[Array, "B T N G D"], k: Float[Array, "B S N D"], block_size: int, branches: Sequence[str]) -> bool:
    """Whether a call has anything to sum and a whole block."""
    return bool(branches) and 0 not in q.shape and k.shape[1] >= block_size


def attention(
    q: Float[Array, "B T N G D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    scaled_logits: Float32[Array, "B T N G 3"],
    *,
    block_size: int,
    window_size: int,
    q_offset: Scalar,
    length: Int[Array, "B"],
    ragged: bool,
    branches: Sequence[str],
    block_indices: Int[Array, "B T N n"] | None,
    choose_anyway: bool,
    choice: dict[str, Any],
    operations: Operations = HOPPER,
    interpret: Any = None,
) -> Float[Array, "B T N G D"]:
    """The gated sum of the branches; arguments as in `nsa.nsa_attention`.

    Args:
      q: see there, and `covers`.
      k: see there.
      v: see there.
      scaled_logits: gate logits divided by the temperature; finite.
      block_size: see there.
      window_size: see there.
      q_offset: see there.
      length: valid keys per row.
      ragged: whether some row may have keys, or queries, past its length.
      branches: see there.
      block_indices: see there.
      choose_anyway: see there.
      choice: further arguments of `block_selection`.
      operations: the kernels.
      interpret: parameters of Pallas's GPU interpreter; None compiles.

    Raises:
      NotImplementedError: what a kernel does not cover.
    """
    settings = Settings(
        block_size=block_size,
        window_size=window_size,
        branches=tuple(branches),
        ragged=ragged,
        choose_anyway=choose_anyway,
        complete_blocks=k.shape[1] // block_size,
        operations=operations,
        interpret=interpret,
        **choice,
    )
    # Zeros past the length reach no result, unlike NaN times a probability of 0.
    k, v = (selected_attention.whole_blocks(x, length if ragged else None) for x in (k, v))
    queries = q.shape[1]
    q, scaled_logits = (gpu.in_eights(x) for x in (q, scaled_logits))
    if block_indices is not None:
        block_indices = gpu.in_eights(block_indices, constant_values=-1)
    o = _attend(settings, q, k, v, scaled_logits, block_indices, length, jnp.asarray(q_offset, jnp.int32))
    return o[:, :queries]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scaled_logits: jax.Array,
    block_indices: jax.Array | None,
    length: jax.Array,
    q_offset: jax.Array,
) -> jax.Array:
    return _run(settings, q, k, v, scaled_logits, block_indices, length, q_offset, keep=False)[0]


def _attend_forward(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scaled_logits: jax.Array,
    block_indices: jax.Array | None,
    length: jax.Array,
    q_offset: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...]]:
    names = ("nsa_query", "nsa_key", "nsa_value", "nsa_gate_logits")
    q, k, v, scaled_logits = map(checkpoint_name, (q, k, v, scaled_logits), names)
    o, kept = _run(settings, q, k, v, scaled_logits, block_indices, length, q_offset, keep=True)
    return o, (q, k, v, scaled_logits, kept, length, q_offset)


def _run(
    settings: Settings,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    scaled_logits: jax.Array,
    block_indices: jax.Array | None,
    length: jax.Array,
    q_offset: jax.Array,
    *,
    keep: bool,
) -> tuple[jax.Array, dict[str, tuple[jax.Array, jax.Array, Any]]]:
    """The gated sum and, to `keep` for the gradient, each branch's output, log-sum-exp and what its kernels read.

    Where nothing is kept, the last branch that can sums as it writes its output.
    """
    results, prepared = {}, {}
    gates = jax.nn.sigmoid(scaled_logits)
    gate = {name: gates[..., BRANCHES.index(name)] for name in settings.used}
    summing = "selected" in settings.used and not keep and settings.operations.selected.summed

    def run(name: str, k: jax.Array, v: jax.Array) -> jax.Array:
        branch = getattr(settings.operations, name)
        work, prepared[name] = branch.prepare(settings, q, k, choice, length, q_offset)
        o, lse = branch.forward(settings, q, k, v, work)
        results[name] = checkpoint_name(o, f"nsa_{name}_output"), checkpoint_name(lse, f"nsa_{name}_lse")
        return results[name][1]

    choice = block_indices
    choose = "selected" in settings.used and (block_indices is None or settings.choose_anyway)
    if choose or "compressed" in settings.used:
        k_blocks, v_blocks = _block_means(settings, k, v)
        lse = run("compressed", k_blocks, v_blocks)
    if choose:
        choice = settings.operations.choose(settings, q, k_blocks, lse, length, q_offset)
        if block_indices is not None:
            own = choice.words if isinstance(choice, Words) else choice
            choice = replaced_choice(own, block_indices)
    if "window" in settings.used:
        run("window", k, v)
    if summing:
        selected = settings.operations.selected
        others = [name for name in settings.used if name != "selected"]
        work, _ = selected.prepare(settings, q, k, choice, length, q_offset)
        outputs = [results[name][0] for name in others]
        o = selected.summed(settings, q, k, v, work, gate["selected"], [gate[name] for name in others], outputs)
        return o, {}
    if "selected" in settings.used:
        run("selected", k, v)

    o = sum(gate[name][..., None] * results[name][0].astype(jnp.float32) for name in settings.used)
    return o.astype(q.dtype), {name: (*results[name], prepared[name]) for name in settings.used}


def _attend_backward(settings: Settings, saved: tuple[Any, ...], do: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, scaled_logits, kept, length, q_offset = saved
    past = query_indices(q.shape[1], q_offset) >= length[:, None]
    gates, log_gates = jax.nn.sigmoid(scaled_logits), jax.nn.log_sigmoid(scaled_logits)
    # Sums apart: stacked in one expression, XLA makes no single pass over do of them. Past the length do may be NaN.
    products = {
        name: zero_where(past, jnp.sum(do.astype(jnp.float32) * kept[name][0].astype(jnp.float32), axis=-1))
        for name in settings.used
    }
    none = jnp.zeros(q.shape[:-1], jnp.float32)
    dgates = jnp.stack([products.get(name, none) for name in BRANCHES], axis=-1)

    dqs, dks, dvs = [], [], []
    for name, delta in products.items():
        _, lse, prepared = kept[name]
        compressed = name == "compressed"
        keys, values = _block_means(settings, k, v) if compressed else (k, v)
        branch = getattr(settings.operations, name)
        lse = lse - log_gates[..., BRANCHES.index(name)]
        dq, dk, dv = branch.backward(settings, q, keys, values, do, lse, delta, prepared)
        if compressed:
            dk, dv = (_over_keys(settings, x, k.shape[1]) for x in (dk, dv))
        for parts, part in zip((dqs, dks, dvs), (dq, dk, dv), strict=True):
            parts.append(part)
    dlogits = dgates * gates * (1 - gates)
    return (*(_sum(parts, q.dtype) for parts in (dqs, dks, dvs)), dlogits, None, None, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _block_means(settings: Settings, *arrays: Float[jax.Array, "B S N D"]) -> tuple[Float[jax.Array, "B M N D"], ...]:
    """The means of the complete blocks of keys and values, and zeros up to a multiple of 8."""

    def mean(x: jax.Array) -> jax.Array:
        batch, keys, *rest = x.shape
        blocks = x.reshape(batch, keys // settings.block_size, settings.block_size, *rest)
        return gpu.in_eights(blocks[:, : settings.complete_blocks].mean(axis=2, dtype=jnp.float32).astype(x.dtype))

    return tuple(map(mean, arrays))


def _over_keys(settings: Settings, x: Float[jax.Array, "B M N D"], keys: int) -> Float32[jax.Array, "B S N D"]:
    """The gradient of the keys, or of the values, from that of their block means."""
    complete = x[:, : settings.complete_blocks].astype(jnp.float32) / settings.block_size
    spread = jnp.repeat(complete, settings.block_size, axis=1)
    return jnp.pad(spread, [(0, 0), (0, keys - spread.shape[1]), (0, 0), (0, 0)])


def _sum(parts: list[jax.Array], dtype: Any) -> jax.Array:
    return sum(x.astype(jnp.float32) for x in parts).astype(dtype)
