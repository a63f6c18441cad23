"""The inputs of the recorded arrays: token layouts and draws. NumPy only."""

import numpy as np

HEADS, KV_HEADS, HEAD_DIM, GATE_HIDDEN, BLOCK = 28, 4, 128, 64, 64
TOKENS_PER_SECOND = 2.0

# A number is so many text tokens; (t, h, w, seconds) a video and (h, w) an image, in merged tokens.
LAYOUTS: dict[int, list[int | tuple]] = {
    257: [30, (3, 8, 8, 1.0), 35],
    640: [37, (4, 6, 10, 1.0), 21, (5, 6, 9, 0.5), 72],
    1024: [50, (10, 12), 9, (12, 8, 8, 1.0), 77],
    4480: [45, (64, 8, 8, 1.0), 339],
}


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 (ties to even), kept as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def inputs(seed: int, length: int) -> dict[str, np.ndarray]:
    """q [28, T, 128], k and v [4, T, 128] after M-RoPE; the gate MLP's input [T, 64], its weights as torch has them."""
    rng = np.random.Generator(np.random.PCG64(seed * 100_003 + length))

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    blocks = -(-length // BLOCK)
    block_keys, query = draw(KV_HEADS, blocks, HEAD_DIM), draw(HEADS, length, HEAD_DIM)
    key, value = draw(KV_HEADS, length, HEAD_DIM), draw(KV_HEADS, length, HEAD_DIM)
    hidden, first, first_bias = draw(length, GATE_HIDDEN), draw(GATE_HIDDEN, GATE_HIDDEN), draw(GATE_HIDDEN)
    second, second_bias = draw(3 * HEADS, GATE_HIDDEN), draw(3 * HEADS)
    of_head = np.linspace(0.6, 1.6, HEADS).astype(np.float32)[:, None, None]
    return {
        "query": _bfloat16(query * of_head),
        "key": _bfloat16(key + np.float32(0.7) * block_keys[:, np.arange(length) // BLOCK]),
        "value": _bfloat16(value),
        "hidden": _bfloat16(hidden),
        "first": _bfloat16(first / np.float32(8)),
        "first_bias": _bfloat16(np.float32(0.1) * first_bias),
        "second": _bfloat16(second / np.float32(16)),
        "second_bias": _bfloat16(np.float32(0.1) * second_bias),
    }


def cotangent(seed: int, length: int) -> np.ndarray:
    """Rm [T, 28, 128]."""
    rng = np.random.Generator(np.random.PCG64(seed * 100_003 + length + 7))
    return _bfloat16(rng.standard_normal((length, HEADS, HEAD_DIM), dtype=np.float32))
