"""The tiny models and conversations that are compared with transformers. NumPy only: both environments import this."""

import zlib

import numpy as np

IMAGE, VIDEO, VISION_START, VISION_END = 296, 297, 298, 299
VOCABULARY = 300
PATCH_DIM, MERGE = 96, 2
TOKENS_PER_SECOND = 2
NEW_TOKENS = 16
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def _model(heads: int, kv_heads: int, *, tied: bool, depth: int, full: list[int]) -> dict:
    """A flat config.json: head size 16, patches of 4 x 4 pixels, windows of 3 x 3 tokens."""
    hidden = 16 * heads
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
        "tie_word_embeddings": tied,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "bos_token_id": None,
        "eos_token_id": None,
        "vision_config": {
            "depth": depth,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "out_hidden_size": hidden,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "window_size": 24,
            "fullatt_block_indexes": full,
            "hidden_act": "silu",
            "in_channels": 3,
            "tokens_per_second": TOKENS_PER_SECOND,
        },
    }


# One windowed vision block, one full one, and both kinds; G = 7, 2 and 4.
MODELS = {
    "windowed_gqa7": _model(7, 1, tied=False, depth=1, full=[]),
    "full_gqa2_tied": _model(4, 2, tied=True, depth=1, full=[0]),
    "mixed_gqa4": _model(4, 1, tied=False, depth=3, full=[1]),
}

# A number is so many text tokens; (t, h, w, seconds) a video and (h, w) an image, in merged tokens. Windows of 3 tokens
# are cut short by every size here but 3 x 6. The second video of `videos` outlasts its text ids in time.
CASES: dict[str, list[int | tuple]] = {
    "text": [11],
    "image": [4, (3, 5), 6],
    "videos": [3, (3, 4, 2, 0.75), 2, (2, 1), 4, (4, 3, 6, 2.5), 5],
}


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights of a key in the hub's layout, the same in every release; exact in bfloat16. None is 0 or 1."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    drawn = rng.standard_normal(shape).astype(np.float32)
    if key == "model.embed_tokens.weight":
        drawn *= np.float32(shape[1] ** -0.5)  # tied logits of order 1
    elif len(shape) > 1:
        drawn *= np.float32(1.2 / np.sqrt(np.prod(shape[1:])))
    else:
        drawn *= np.float32(0.1)
        if "norm" in key or key.endswith("ln_q.weight"):
            drawn += np.float32(1)
    return round_to_bfloat16(drawn)


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, kept as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)


def grids(case: str) -> list[tuple[tuple[int, int, int], float]]:
    """((t, h, w) in merged tokens, seconds per grid) of each image (0 seconds) and video, in order."""
    return [
        ((part[0], part[1], part[2]), part[3]) if len(part) == 4 else ((1, *part), 0.0)
        for part in CASES[case]
        if isinstance(part, tuple)
    ]


def text_runs(case: str) -> list[list[int] | None]:
    """Token ids of each run of text, and None where an image or video stands; vision start and end tokens included."""
    rng = np.random.default_rng(zlib.crc32(case.encode()))
    parts = CASES[case]
    runs: list[list[int] | None] = []
    for place, part in enumerate(parts):
        if isinstance(part, tuple):
            runs.append(None)
            continue
        run = rng.integers(0, 290, part).tolist()
        if place:
            run[0] = VISION_END
        if place + 1 < len(parts):
            run[-1] = VISION_START
        runs.append(run)
    return runs


def pixels(case: str) -> list[np.ndarray]:
    """uint8 patches `[t * 4 h w, PATCH_DIM]` of each image and video, in Qwen's order."""
    rng = np.random.default_rng(zlib.crc32(f"pixels of {case}".encode()))
    return [rng.integers(0, 256, (t * h * w * MERGE**2, PATCH_DIM), dtype=np.uint8) for (t, h, w), _ in grids(case)]


def normalised(patches: np.ndarray) -> np.ndarray:
    """What the image processor makes of uint8 patches, which are channel-major."""
    each = PATCH_DIM // 3
    return (patches.astype(np.float32) / np.float32(255) - np.repeat(PIXEL_MEAN, each)) / np.repeat(PIXEL_STD, each)
