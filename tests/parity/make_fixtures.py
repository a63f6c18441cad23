"""Makes checkpoints and outputs of tiny Qwen2.5-VL models with transformers (`make parity`; Python 3.11, torch CPU).

    python make_fixtures.py FOLDER              # FOLDER/MODEL/ checkpoints and FOLDER/outputs.npz of this release
    python make_fixtures.py FOLDER --load DIR   # the same from the checkpoints DIR/MODEL, in their dtype

Runs under transformers 4.49.0 and 5.x. tests/parity/test_fixtures.py and live.py compare.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import parity_cases as cases
import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as source

IS_4 = transformers.__version__.startswith("4.")
NEWER_PREFIXES = {"model.visual.": "visual.", "model.language_model.": "model."}


def hub_key(key):
    for newer, hub in NEWER_PREFIXES.items():
        if key.startswith(newer):
            return hub + key[len(newer) :]
    return key


def make_model(config):
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**json.loads(json.dumps(config))))
    state = {key: torch.from_numpy(cases.weight(hub_key(key), tuple(v.shape))) for key, v in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        state["lm_head.weight"] = next(v for k, v in state.items() if hub_key(k) == "model.embed_tokens.weight")
    model.load_state_dict(state)
    return model


def model_inputs(case):
    ids, types, runs = [], [], cases.text_runs(case)
    grids, arrays = iter(cases.grids(case)), iter(cases.pixels(case))
    images, videos = [], []
    for run in runs:
        if run is None:
            (t, h, w), seconds = next(grids)
            patches, grid = torch.from_numpy(cases.normalised(next(arrays))), (t, h * cases.MERGE, w * cases.MERGE)
            is_video = seconds > 0
            ids += [cases.VIDEO if is_video else cases.IMAGE] * (t * h * w)
            types += [2 if is_video else 1] * (t * h * w)
            (videos if is_video else images).append((patches, grid, seconds))
        else:
            ids += run
            types += [0] * len(run)
    inputs = {"input_ids": torch.tensor([ids])}
    if images:
        inputs["pixel_values"] = torch.cat([x[0] for x in images])
        inputs["image_grid_thw"] = torch.tensor([x[1] for x in images])
    if videos:
        inputs["pixel_values_videos"] = torch.cat([x[0] for x in videos])
        inputs["video_grid_thw"] = torch.tensor([x[1] for x in videos])
        inputs["second_per_grid_ts"] = torch.tensor([x[2] for x in videos])
    rope = {
        k: inputs[k] for k in ("input_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts") if k in inputs
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if not IS_4:
        inputs["mm_token_type_ids"] = rope["mm_token_type_ids"] = torch.tensor([types], dtype=torch.int32)
    return inputs, rope, np.array(types) == 0


def tower(model):
    return model.visual if IS_4 else model.model.visual


def text_model(model):
    return model.model if IS_4 else model.model.language_model


def capture(module, store, name):
    def hook(_, args, kwargs, output):
        first = args[0] if args else kwargs["hidden_states"]
        store[f"{name}/in"] = first.detach().numpy()
        store[f"{name}/out"] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

    return module.register_forward_hook(hook, with_kwargs=True)


def rotated_half(cos, sin, rotate):
    """(cos, sin) of the distinct angles [L, D / 2]: what the release's own rotation makes of (1, ..., 1, 0, ..., 0)."""
    probe = torch.zeros(1, 1, cos.shape[-2], cos.shape[-1])
    probe[..., : cos.shape[-1] // 2] = 1
    return rotate(probe, cos, sin)[0, 0].numpy()


def text_tables(model, positions):
    cos, sin = text_model(model).rotary_emb(torch.zeros(1), positions)

    def rotate(probe, cos, sin):
        if IS_4:
            sections = model.config.rope_scaling["mrope_section"]
            return source.apply_multimodal_rotary_pos_emb(probe, probe, cos, sin, sections)[0]
        return source.apply_rotary_pos_emb(probe, probe, cos, sin)[0]

    return rotated_half(cos, sin, rotate)


def vision_tables(model, grid):
    """[patches, D / 2] angles' (cos, sin) in Qwen's order."""
    if IS_4:
        angles = tower(model).rot_pos_emb(grid)
        cos, sin = angles.cos(), angles.sin()
    else:
        positions = source.get_vision_position_ids(grid, cases.MERGE)
        cos, sin = tower(model).rotary_pos_emb(torch.zeros(1), positions)
        cos, sin = (x[:, : x.shape[-1] // 2] for x in (cos, sin))
    return torch.cat([cos, sin], -1).numpy()


@torch.no_grad()
def run_case(model, name, case, store):
    inputs, rope, is_text = model_inputs(case)
    prefix = f"{name}/{case}"
    if case == "text" and not IS_4:  # get_rope_index is for conversations with vision only
        positions = torch.arange(len(is_text)).view(1, 1, -1).expand(3, 1, -1)
    else:
        positions = (model if IS_4 else model.model).get_rope_index(**rope)[0]
    store[f"{prefix}/position_ids"] = positions[:, 0].numpy().astype(np.int16)
    captured, hooks = {}, []
    if case == "image":
        hooks = [
            capture(tower(model).patch_embed, captured, "patch_embed"),
            capture(tower(model).merger, captured, "merger"),
            capture(text_model(model).layers[0], captured, "layer_0"),
        ]
        store[f"{prefix}/vision_tables"] = vision_tables(model, inputs["image_grid_thw"])
    logits = model(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    store.update({f"{prefix}/{key}": value.reshape(value.shape[-2:]) for key, value in captured.items()})
    if case == "videos":
        store[f"{prefix}/text_tables"] = text_tables(model, positions)
        grid = inputs["video_grid_thw"]
        merged = tower(model)(inputs["pixel_values_videos"], grid)
        store[f"{prefix}/merged_videos"] = (merged if IS_4 else merged.pooler_output).numpy()
    store[f"{prefix}/logits"] = logits[torch.from_numpy(is_text)].numpy()
    made = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=cases.NEW_TOKENS,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    scores = torch.stack(made.scores)[:, 0].sort(-1, descending=True).values
    store[f"{prefix}/greedy"] = made.sequences[0, len(is_text) :].numpy().astype(np.int32)
    # Tokens are compared for equality, which a near tie would leave to rounding.
    margin = (scores[:, 0] - scores[:, 1]).min().item()
    assert margin > 1e-3, f"{prefix}: two greedy candidates lie {margin:.1e} apart"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    store = {}
    for name, config in cases.MODELS.items():
        if options.load:
            dtype = getattr(torch, json.loads((options.load / name / "config.json").read_text())["torch_dtype"])
            model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                options.load / name, torch_dtype=dtype, output_loading_info=True
            )
            amiss = [
                f"{kind} {key}" for kind, keys in info.items() for key in keys if "self_attn.g_proj_" not in str(key)
            ]
            assert not amiss, f"{options.load / name}: {amiss}"
            model.save_pretrained(options.folder / name)
            state, model = model.state_dict(), make_model(config)
            model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
        else:
            shutil.rmtree(options.folder / name, ignore_errors=True)
            make_model(config).to(torch.bfloat16).save_pretrained(options.folder / name)
            (options.folder / name / "generation_config.json").unlink(missing_ok=True)
            model = make_model(config)  # the one above has its rotary frequencies rounded
        model.eval()
        for case in cases.CASES:
            run_case(model, name, case, store)
    np.savez_compressed(options.folder / "outputs.npz", **store)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    (options.folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
