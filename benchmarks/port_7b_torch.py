"""The transformers half of port_7b.py; run by it, with a Python that has torch and transformers (3.11 or newer).

python port_7b_torch.py make FOLDER     # FOLDER/model: random weights of FOLDER/config.json
python port_7b_torch.py run FOLDER      # FOLDER/torch.json and FOLDER/torch.npz
"""

import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from host_memory import HostMemory
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def synchronize():
    """Waits for the device."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def device_peak():
    """Bytes, or None on a CPU."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None


@torch.no_grad()
def make(folder):
    """Weights that keep activations of order 1: fan-in scaled, smaller where they write to the residual stream."""
    config = Qwen2_5_VLConfig(**json.loads((folder / "config.json").read_text()))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.normal_(0, 0.02, generator=generator)
            if "norm" in name or "ln_q" in name:
                parameter.add_(1)
            continue
        scale = 1 / math.sqrt(parameter[0].numel())
        if "embed_tokens" in name:
            scale = 1.0
        elif "o_proj" in name or "down_proj" in name or name.endswith("attn.proj.weight"):
            scale /= math.sqrt(2 * config.text_config.num_hidden_layers)
        parameter.normal_(0, scale, generator=generator)
    model.save_pretrained(folder / "model", max_shard_size="4GB")


def inputs_of(folder, name):
    """What the model takes, on the device, and which tokens are text."""
    data = np.load(folder / f"{name}.npz")
    patches = torch.from_numpy(data["patches"]).to(DEVICE)
    each = patches.shape[1] // 3
    mean, std = (
        torch.tensor(values, device=DEVICE).repeat_interleave(each)
        for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    inputs = {
        "input_ids": torch.from_numpy(data["input_ids"])[None].to(DEVICE),
        "pixel_values_videos": (patches.float() / 255 - mean) / std,
        "video_grid_thw": torch.from_numpy(data["grid"])[None].to(DEVICE),
        "second_per_grid_ts": torch.ones(1),
        "mm_token_type_ids": torch.from_numpy(data["types"])[None].to(DEVICE),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs, torch.from_numpy(data["types"] == 0).to(DEVICE)


def cast(inputs, dtype):
    """Pixels in the model's dtype."""
    return inputs | {"pixel_values_videos": inputs["pixel_values_videos"].to(dtype)}


def timed(function, samples):
    """Seconds of each call after a first one, whose time comes first."""
    seconds = []
    for _ in range(samples + 1):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "samples": seconds[1:]}


@torch.no_grad()
def run(folder):
    """Every measurement, then the logits."""
    settings = json.loads((folder / "settings.json").read_text())
    torch.backends.cuda.matmul.allow_tf32 = False
    result = {
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "attention": "sdpa",
    }
    on_load = {"device_map": DEVICE} if importlib.util.find_spec("accelerate") else {}
    with HostMemory() as host:
        start = time.perf_counter()
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "model", dtype=torch.bfloat16, attn_implementation="sdpa", **on_load
        )
        model.to(DEVICE).eval()
        synchronize()
        result["load"] = {"seconds": time.perf_counter() - start, "through": on_load.get("device_map", "host")}
    result["load"] |= {"host_peak_bytes": host.peak - host.before, "device_peak_bytes": device_peak()}

    result["prefill"], result["vision"] = {}, {}
    for tokens in settings["visual_tokens"]:
        inputs, _ = inputs_of(folder, f"visual_{tokens}")
        inputs = cast(inputs, torch.bfloat16)
        tower = model.model.visual
        result["vision"][str(tokens)] = timed(
            lambda inputs=inputs, tower=tower: tower(inputs["pixel_values_videos"], inputs["video_grid_thw"]),
            settings["samples"],
        )
        result["prefill"][str(tokens)] = timed(
            lambda inputs=inputs: model(**inputs, use_cache=True, logits_to_keep=1), settings["samples"]
        )
    result["prefill_device_peak_bytes"] = device_peak()
    inputs, _ = inputs_of(folder, f"visual_{settings['visual_tokens'][0]}")
    inputs, new = cast(inputs, torch.bfloat16), settings["new_tokens"]

    def generate(count):
        model.generate(**inputs, do_sample=False, min_new_tokens=count, max_new_tokens=count, pad_token_id=0)

    result["generate"] = {str(count): timed(lambda c=count: generate(c), settings["samples"]) for count in (1, new + 1)}

    inputs, is_text = inputs_of(folder, "compared")
    rope = {k: v for k, v in inputs.items() if k not in ("pixel_values_videos", "attention_mask")}
    arrays = {"position_ids": model.model.get_rope_index(**rope)[0][:, 0].cpu().numpy()}
    # 5.x keeps what the last conversation's ids added up to.
    model.model.rope_deltas = None
    arrays["bfloat16"] = model(**cast(inputs, torch.bfloat16)).logits[0][is_text].float().cpu().numpy()
    if settings["float32"]:
        del model
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        # Loaded anew: a model cast back from bfloat16 has its rotary frequencies rounded.
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="sdpa", **on_load
        )
        model.to(DEVICE).eval()
        arrays["float32"] = model(**inputs).logits[0][is_text].cpu().numpy()
    np.savez(folder / "torch.npz", **arrays)
    (folder / "torch.json").write_text(json.dumps(result))


if __name__ == "__main__":
    {"make": make, "run": run}[sys.argv[1]](Path(sys.argv[2]))
