"""The transformers half of prefill_128k.py; run by it, with a Python that has torch and transformers.

python prefill_128k_torch.py FOLDER TOKENS SAMPLES     # FOLDER/config.json in, FOLDER/times.json out
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel


@torch.no_grad()
def main(folder, tokens, samples):
    """Prefills the language model with drawn embeddings, keys and values kept."""
    config = Qwen2_5_VLConfig(**json.loads((folder / "config.json").read_text())).text_config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen2_5_VLTextModel._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).eval()
        embeddings = torch.randn(1, tokens, config.hidden_size)
        positions = torch.arange(tokens).expand(3, 1, -1)
    seconds = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        out = model(inputs_embeds=embeddings, position_ids=positions, use_cache=True)
        finite = bool(torch.isfinite(out.last_hidden_state[0, -1].float()).all())  # waits for the device
        seconds.append(time.perf_counter() - start)
        del out
    result = {
        "seconds": statistics.median(seconds[1:]),
        "samples": seconds[1:],
        "finite": finite,
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": "sdpa",
    }
    (folder / "times.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
