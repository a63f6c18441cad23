"""What the backward pass keeps of a layer, and what it computes again: rematerialisation policies by name."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped

Remat = Literal["none", "full", "minimal", "attention_outputs", "minimal_and_attention_outputs"]
REMATS: tuple[str, ...] = get_args(Remat)

_WEIGHT_PRODUCT, _ATTENTION = "weight_product", "attention"
# Weights' products are told by name: as "dots with no batch axes" they would be found twice, in the two forms of
# `layers.linear` of which a device runs one.
_POLICIES = {
    "full": None,
    "minimal": jax.checkpoint_policies.save_only_these_names(_WEIGHT_PRODUCT),
    "attention_outputs": jax.checkpoint_policies.save_only_these_names(_ATTENTION),
    "minimal_and_attention_outputs": jax.checkpoint_policies.save_only_these_names(_WEIGHT_PRODUCT, _ATTENTION),
}


def checkpointed[Body: Callable[..., Any]](body: Body, remat: str, *, prevent_cse: bool) -> Body:
    """A layer whose backward pass keeps what a policy says, beside the layer's inputs.

    Args:
      body: the layer, a function of arrays.
      remat: "none" keeps everything; "full" nothing; "minimal" the products with weights; "attention_outputs" what
        attention returns and what its gradient reads; "minimal_and_attention_outputs" both, so that norms, gates and
        other elementwise work alone is done again.
      prevent_cse: as in `jax.checkpoint`: False inside of a loop.

    Raises:
      ValueError: there is no such policy.
    """
    if remat == "none":
        return body
    if remat not in _POLICIES:
        raise ValueError(f"remat is {remat!r}, expected one of {', '.join(REMATS)}")
    return jax.checkpoint(body, policy=_POLICIES[remat], prevent_cse=prevent_cse)


def weight_product(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Marks a product with weights, for "minimal"."""
    return checkpoint_name(x, _WEIGHT_PRODUCT)


def kept_attention[Result](attend: Callable[..., Result], arrays: tuple[Any, ...], rest: Any) -> Result:
    """`attend(arrays, rest)`, marked for "attention_outputs" with everything that its gradient reads.

    To mark the results would not do: the gradient reads values from inside (the log-sum-exp, the chosen blocks), and
    those are the results of the same kernels.

    Args:
      attend: any implementation of an attention. It must not close over traced values.
      arrays: what is differentiated.
      rest: tree of arrays that is not.
    """

    @jax.custom_vjp
    def run(arrays: tuple[Any, ...], rest: Any) -> Any:
        return attend(arrays, rest)

    def forward(arrays: tuple[Any, ...], rest: Any) -> tuple[Any, Any]:
        results, pullback = jax.vjp(lambda *arrays: attend(arrays, rest), *arrays)
        return _marked((results, pullback))

    def backward(pullback: Any, cotangents: Any) -> tuple[Any, None]:
        return pullback(cotangents), None

    run.defvjp(forward, backward)
    return run(arrays, rest)


def _marked(tree: Any) -> Any:
    # A value that stands at several places gets one mark: two would be kept as two values.
    marked: dict[int, Any] = {}

    def mark(leaf: Any) -> Any:
        if id(leaf) not in marked:
            marked[id(leaf)] = checkpoint_name(leaf, _ATTENTION)
        return marked[id(leaf)]

    return jax.tree.map(mark, tree)
