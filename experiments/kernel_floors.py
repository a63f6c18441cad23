"""The least time an H100 needs for an operation: matrix products, bytes of device memory, bytes of the L2 cache.

    floor = max(flops / 798 TFLOP/s, bytes / 3.0 TB/s, L2 bytes / 5.5 TB/s), for the whole NSA the sum of its parts

Rates are measured: an 8192^3 bfloat16 product, a device-to-device copy, repeated reads of what fits the cache.
With T queries, N KV heads of G query heads, D channels, M = T / s block means, pairs of (query, KV head, chosen block),
H = N G D channels, U = 2 T N G D the bytes of the queries and K = 2 T N D those of the keys:

    operation               flops                        bytes             L2 bytes
    dense                   2 NG D T^2                   2 U + 2 K
    compressed              2 NG D T M                   2 U
    window                  4 NG D T w                   2 U + 2 K
    block choice            NG D T M                     U
    selected, forward       4 D 64 s per 9 tokens and    2 U + 2 K         4 s D per 27 tokens and block of
                            block of their union                           their union
    selected, dq            3/2 of the forward's         3 U + 2 K         the forward's
    selected, dk and dv     8 D 8 s per pair             2 U + 4 K         32 D + 64 per pair
    layer, besides the      2 T H (2 H + 2 N D), with
    attention               gates H + 3 N G more
    text queries (256), decode (1): 4 NG D S per query, 2 K; block means: 2 K; gated sum, row products, sum of three dq:
    4 U each; a gradient: 5/2 of the flops (projections: 2 of them), and the bytes of reading q and do twice

The block choice's other part, counting to find the n-th largest, takes about half as long again on the ALUs and is not
in its floor.
"""

import dataclasses

from pallas_kernels.specs import Spec

FLOPS, BYTES, CACHE_BYTES = 798e12, 3.0e12, 5.5e12

TEXT_QUERIES = 256
"""Queries of the text case."""


@dataclasses.dataclass(frozen=True)
class Floor:
    """A bound from below.

    Attributes:
      ms: milliseconds.
      bound: what takes that long: "products", "memory", "cache", or "parts" where it is a sum.
    """

    ms: float
    bound: str


@dataclasses.dataclass(frozen=True)
class Unions:
    """How alike neighbouring queries choose.

    Attributes:
      of_9: blocks in the union of 9 neighbouring queries, over n: with G = 7 they fill 63 of the 64 rows of a product.
      of_27: likewise of 27, what three warpgroups share.
    """

    of_9: float
    of_27: float


def floor(operation: str, gradient: bool, spec: Spec, unions: Unions | None = None) -> Floor:
    """The floor of an operation, of its forward alone or with its gradient.

    Args:
      operation: a name of `experiments.bench_kernels`.
      gradient: whether the gradient's time is included.
      spec: the shape; T = S.
      unions: how alike the choice is; selected attention and the whole need it.

    Returns:
      The floor.

    Raises:
      ValueError: no such operation, or unions are missing.
    """
    t, heads = spec.queries, spec.kv_heads * spec.group_size
    rows = spec.batch * t * heads * spec.head_dim * 2  # U
    keys = rows // spec.group_size  # K
    means = spec.keys // spec.block_size
    product = 2 * spec.batch * heads * spec.head_dim * t  # of all queries with one key

    def of(flops: float, moved: float, cached: float = 0) -> Floor:
        times = {"products": flops / FLOPS, "memory": moved / BYTES, "cache": cached / CACHE_BYTES}
        bound = max(times, key=lambda name: times[name])
        return Floor(1e3 * times[bound], bound)

    def attention(seen: float, key_bytes: int) -> Floor:
        """`seen` keys per query; its gradient takes five products, and reads q and do in both of its passes."""
        forward = of(2 * product * seen, 2 * rows + 2 * key_bytes)
        return _sum(forward, of(5 * product * seen, 5 * rows + 4 * key_bytes)) if gradient else forward

    def elementwise() -> Floor:
        passes = of(0, 4 * rows)
        return _sum(passes, passes, passes) if gradient else passes

    def projections(width: int) -> Floor:
        hidden = heads * spec.head_dim
        return of((3 if gradient else 1) * 2 * spec.batch * t * hidden * width, 0)

    def selected() -> Floor:
        if unions is None:
            raise ValueError(f"floor of {operation}: unions is None, expected how alike the choice is")
        n = spec.block_count
        in_tiles = spec.batch * spec.kv_heads * t / 9 * unions.of_9 * n * 4 * spec.head_dim * 64 * spec.block_size
        read = spec.batch * spec.kv_heads * t / 27 * unions.of_27 * n * 4 * spec.block_size * spec.head_dim
        pairs = _pairs(spec)
        forward = of(in_tiles, 2 * rows + 2 * keys, read)
        dq = of(1.5 * in_tiles, 3 * rows + 2 * keys, read)
        dkdv = of(pairs * 64 * spec.block_size * spec.head_dim, 2 * rows + 4 * keys, pairs * (32 * spec.head_dim + 64))
        return _sum(forward, dq, dkdv) if gradient else forward

    match operation:
        case "dense_attention":
            return attention(t / 2, keys)
        case "compressed_attention":
            return attention(means / 2, 0)
        case "window_attention":
            return attention(min(spec.window_size, t / 2), keys)
        case "block_selection":
            return of(product * means / 2, rows)
        case "selected_attention":
            return selected()
        case "text_queries" | "decode":
            queries = TEXT_QUERIES if operation == "text_queries" else 1
            flops = 4 * spec.batch * heads * spec.head_dim * queries * spec.keys
            forward = of(flops, 2 * keys)
            return _sum(forward, of(2.5 * flops, 4 * keys)) if gradient else forward
        case "block_means":
            return of(0, 4 * keys if gradient else 2 * keys)
        case "gated_sum":
            return elementwise()
        case "dense_layer" | "nsa_layer":
            attention_of = operation.replace("layer", "attention")
            width = 2 * heads * spec.head_dim + 2 * spec.kv_heads * spec.head_dim
            width += heads * spec.head_dim + 3 * heads if operation == "nsa_layer" else 0
            return _sum(projections(width), floor(attention_of, gradient, spec, unions))
        case "nsa_attention":
            parts = ("block_means", "compressed_attention", "window_attention", "gated_sum")
            choice = floor("block_selection", False, spec)
            return _sum(selected(), choice, *(floor(part, gradient, spec) for part in parts))
    raise ValueError(f"operation is {operation!r}, expected one of experiments.bench_kernels")


def _pairs(spec: Spec) -> float:
    """(query, KV head, chosen block), where each query takes as many blocks as there are, up to n."""
    s, n = spec.block_size, spec.block_count
    taken = sum(min(t // s + 1, n) for t in range(0, spec.queries, s)) * s
    return spec.batch * spec.kv_heads * taken


def _sum(*parts: Floor) -> Floor:
    return Floor(sum(part.ms for part in parts), "parts")
