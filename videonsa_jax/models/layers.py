"""What the vision tower and the decoder share: initialisers, linear maps, RMSNorm, the gated MLP, stacks of layers."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from videonsa_jax.models.placement import Rows, split_product
from videonsa_jax.models.remat import checkpointed, weight_product

UNROLLED_LAYERS = 4
"""Stacks of at most so many layers are compiled layer by layer: a loop would copy each layer's activations and weights
into and out of stacked arrays."""

ALIGNED_FEATURES = 8
"""Where rows of activations are no multiple of 16 bytes, matrix units read them through copies: the vision tower's MLP
is 3,420 wide inside. Its weights are padded instead, each time they are used."""


def fan_in_init(scale: float = 1.0) -> nnx.Initializer:
    """Truncated normal of standard deviation scale / sqrt(fan in)."""
    return nnx.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")


def residual_scale(num_layers: int) -> float:
    """Factor on the weights that write to the residual stream, 1 / sqrt(2 x layers).

    Two maps a layer add to the stream (GPT-2, section 2.3); with this its variance does not grow with depth.
    """
    return (2 * num_layers) ** -0.5


def _dot_general(
    x: Float[Array, "*L features"],
    kernel: Float[Array, "in out"],
    dimensions: jax.lax.DotDimensionNumbers,
    *,
    rows: Rows,
    fill: tuple[int, int] = (0, 0),
    **options: Any,
) -> Float[Array, "..."]:
    """`lax.dot_general` as `nnx.Linear` calls it; `fill` says how many inputs and outputs of weights 0 are added."""

    def padded(kernel: Array) -> Array:
        return jnp.pad(kernel, [(0, more) for more in fill]) if any(fill) else kernel

    def rows_flattened(x: Array, kernel: Array) -> Array:
        flat = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), padded(kernel), (((1,), (0,)), ((), ())), **options)
        return flat.reshape(*x.shape[:-1], flat.shape[-1])

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, padded(kernel), dimensions, **options)

    def product(x: Array, kernel: Array) -> Array:
        # The kernel's gradient sums over all leading axes. Where there are several, XLA's CPU backend first copies both
        # operands; elsewhere flattening gains nothing.
        return jax.lax.platform_dependent(x, kernel, cpu=rows_flattened, default=plain)

    return weight_product(split_product(product, x, kernel, rows))


# Made once: two models are alike to JAX only if their functions are the same.
_PRODUCTS = {rows: functools.partial(_dot_general, rows=rows) for rows in ("tokens", "frames")}


def linear(
    in_features: int,
    out_features: int,
    *,
    use_bias: bool,
    rngs: nnx.Rngs,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    kernel_init: nnx.Initializer | None = None,
    rows: Rows = "tokens",
) -> nnx.Linear:
    """A linear map `[..., in] -> [..., out]`, computed in `dtype`; kernel `[in, out]`, fan-in scaled unless told.

    `rows` says what the leading axes of its inputs are, and so where they lie on a mesh (`placement.split_product`).
    """
    return nnx.Linear(
        in_features,
        out_features,
        use_bias=use_bias,
        kernel_init=fan_in_init() if kernel_init is None else kernel_init,
        dtype=dtype,
        param_dtype=param_dtype,
        dot_general=_PRODUCTS[rows],
        rngs=rngs,
    )


def _padded(
    layer: nnx.Linear, x: Float[Array, "*L in"], *, inputs: int = 0, outputs: int = 0
) -> Float[Array, "*L out"]:
    """`layer(x)` with that many more inputs or outputs, all of whose weights are 0."""
    if inputs == outputs == 0:
        return layer(x)
    x, kernel = x.astype(layer.dtype), layer.kernel[...].astype(layer.dtype)
    y = layer.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), fill=(inputs, outputs))
    return y if layer.bias is None else y + jnp.pad(layer.bias[...].astype(layer.dtype), (0, outputs))


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a learned scale; statistics in float32 whatever the input."""

    def __init__(self, features: int, eps: float, *, param_dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "*L features"]) -> Float[Array, "*L features"]:
        """Normalises the last axis; returns x's dtype."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        normed = x32 * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(silu(gate(x)) * up(x)); without biases in the decoder, with biases in the vision tower."""

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        *,
        use_bias: bool,
        num_layers: int,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        rows: Rows = "tokens",
    ):
        options = {"use_bias": use_bias, "rngs": rngs, "dtype": dtype, "param_dtype": param_dtype, "rows": rows}
        self.gate_proj = linear(hidden, intermediate, **options)
        self.up_proj = linear(hidden, intermediate, **options)
        self.down_proj = linear(intermediate, hidden, kernel_init=fan_in_init(residual_scale(num_layers)), **options)

    def __call__(self, x: Float[Array, "*L hidden"]) -> Float[Array, "*L hidden"]:
        """Applies the MLP to each token."""
        fill = -self.down_proj.in_features % ALIGNED_FEATURES
        inside = nnx.silu(_padded(self.gate_proj, x, outputs=fill)) * _padded(self.up_proj, x, outputs=fill)
        return _padded(self.down_proj, inside, inputs=fill)


def stack[Layer: nnx.Module](make_layer: Callable[[nnx.Rngs], Layer], count: int, rngs: nnx.Rngs) -> Layer:
    """One module whose every parameter has a leading axis of `count` layers, each initialised on its own."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(layer_rngs: nnx.Rngs) -> Layer:
        return make_layer(layer_rngs)

    return make(rngs)


def scan_stack[Layer: nnx.Module, Carry, Xs](
    apply: Callable[[Layer, Carry, Xs], Carry], layers: Layer, carry: Carry, xs: Xs = None, *, remat: str
) -> Carry:
    """Runs a stack of layers in order, compiling one layer only.

    Args:
      apply: (layer, carry, x) -> carry.
      layers: what `stack` returned.
      carry: input of the first layer.
      xs: a pytree with a leading layer axis, given to the layers slice by slice.
      remat: what the backward pass keeps of a layer; see `remat.checkpointed`.

    Returns:
      The last layer's output.
    """
    graphdef, state = nnx.split(layers)

    def body(carry, inputs):
        parameters, x = inputs
        return apply(nnx.merge(graphdef, parameters), carry, x), None

    unrolled = jax.tree.leaves(state)[0].shape[0] <= UNROLLED_LAYERS
    # A loop already keeps XLA from merging the recomputation with the forward pass.
    body = checkpointed(body, remat, prevent_cse=unrolled)
    return jax.lax.scan(body, carry, (state, xs), unroll=unrolled)[0]
