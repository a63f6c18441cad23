"""Everything a training run is told, as frozen dataclasses; `experiments/configs` holds the named ones."""

import re
from dataclasses import dataclass, field
from typing import Literal

from videonsa_jax.configs import ModelConfig, tiny
from videonsa_jax.data.config import DataConfig
from videonsa_jax.models.remat import REMATS, Remat


def _require(condition: bool, group: str, name: str, value: int | float, expected: str) -> None:
    if not condition:
        raise ValueError(f"{group}.{name} is {value}, expected {expected}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (the paper's optimiser, App. B), with a plateau between if wished.

    Attributes:
      name: "adamw", or "muon" for the matrices of the hidden layers and AdamW for the rest; from random weights Muon
        needs several times fewer steps (README).
      learning_rate: peak.
      warmup_ratio: share of all steps spent warming up from warmup_start x peak.
      decay_ratio: share of all steps, the last ones, over which the rate falls; before, it stays at the peak.
      final_ratio: share of the peak left at the last step.
      weight_decay: applied to matrices only, not to norms and biases; with "muon", to what Muon updates only.
      max_grad_norm: global norm that gradients are clipped to.
      moment_dtype: of the first and second moments; in bfloat16 they are rounded stochastically.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-6
    warmup_ratio: float = 0.1
    warmup_start: float = 1e-5
    decay_ratio: float = 1.0
    final_ratio: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    moment_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "max_grad_norm"):
            _require(getattr(self, name) > 0, "optimizer", name, getattr(self, name), "more than 0")
        for name in ("warmup_ratio", "warmup_start", "decay_ratio", "final_ratio", "beta1", "beta2"):
            _require(0 <= getattr(self, name) <= 1, "optimizer", name, getattr(self, name), "0 to 1")
        _require(self.weight_decay >= 0, "optimizer", "weight_decay", self.weight_decay, "at least 0")


# Pattern of an array's path, and what of the array is split.
type ShardingRule = tuple[str, int | Literal["fsdp", "replicated"]]

SHARDING_RULES: tuple[ShardingRule, ...] = (
    (r"(^|/)(step|count|bias|scale)$", "replicated"),
    # Columns, then rows: one sum over `tensor` for each pair. Heads lie KV head by KV head, so a part has whole groups.
    (r"(^|/)decoder/.*(q_proj|k_proj|v_proj|g_proj_2|gate_proj|up_proj)/kernel$", -1),
    (r"(^|/)decoder/.*(o_proj|down_proj)/kernel$", -2),
    # The vocabulary.
    (r"(^|/)lm_head/kernel$", -1),
    (r"(^|/)embed_tokens/embedding$", -2),
    (r".*", "fsdp"),
)


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, and what of the training state they split.

    Attributes:
      data, fsdp, context, tensor: devices; -1 = what is left over. Their product must equal the number of devices.
      rules: the first one whose pattern is found in an array's path decides. A number is the axis split over `tensor`;
        there, and where a rule says "fsdp", another axis is split over `fsdp` and `context`. On the command line,
        "pattern,split" separated by semicolons, such as `mesh.rules=embed_tokens,replicated; .*,fsdp`.
    """

    data: int = -1
    fsdp: int = 1
    context: int = 1
    tensor: int = 1
    rules: tuple[ShardingRule, ...] = SHARDING_RULES

    def __post_init__(self) -> None:
        for pattern, _ in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"mesh.rules has the pattern {pattern!r}, expected a regular expression: {error}"
                ) from None


@dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
      steps: optimiser steps.
      accumulation: batches per optimiser step.
      attention: what visual queries use; "dense" runs the same weights densely, gates unused.
      kernel: implementation of the attention operations ("auto" = the best for the device).
      dtype: of activations; losses and the optimiser's arithmetic are float32.
      param_dtype: of the parameters and their gradients; in bfloat16, the optimiser's state has float32 masters, which
        are what it updates and what is exported.
      remat: what the backward pass keeps of each layer: "none" (everything), "full" (nothing: all is computed again),
        "minimal" (products with weights), "attention_outputs" (what attention returns and its gradient reads) or
        "minimal_and_attention_outputs" (both).
      vision_remat: likewise of the vision tower's layers; "same": as `remat`.
      frozen: parameters that stay as they are: "vision", "merger", "llm" or regular expressions for their paths
        (training/frozen.py), comma-separated on the command line.
      sparse_cores: ask the SparseCores of a TPU v5p or v6e for gathers and reduce-scatters, beside its products;
        compiled, never run so far (docs/training.md).
      offload_optimizer: keep the optimiser's state in host memory but while it is used; needs devices with pinned host
        memory.
      loss_chunk: positions of each text row whose logits exist at a time (training/cross_entropy.py); 0 = all.
      log_every: steps between metric lines.
      eval_every: steps between held-out evaluations; 0 = only at the end.
      eval_contexts: held-out contexts per evaluation on the way; 0 = all. The last evaluation asks all.
      save_every: steps between checkpoints; 0 = only at the end and on SIGTERM.
      keep: latest checkpoints kept.
      keep_every: steps between checkpoints that are kept for good, a multiple of `save_every`; 0 = none.
      spike_sigmas: how far above the running median a step's loss must lie, in robust standard deviations, to be
        written to spikes.jsonl with its samples (training/spikes.py); 0 = never.
      export: dtype of the model that is written as a Hugging Face folder, `export`, when the run is done; empty = none.
      tensorboard: write TensorBoard files beside the JSONL (needs the `eval` extra).
    """

    steps: int = 1000
    accumulation: int = 1
    attention: Literal["nsa", "dense"] = "nsa"
    kernel: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    vision_remat: Remat | Literal["same"] = "same"
    frozen: tuple[str, ...] = ()
    offload_optimizer: bool = False
    sparse_cores: bool = False
    loss_chunk: int = 256
    log_every: int = 10
    eval_every: int = 0
    eval_contexts: int = 0
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    spike_sigmas: float = 6.0
    export: Literal["", "float32", "bfloat16"] = ""
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "accumulation", "log_every", "keep"):
            _require(getattr(self, name) >= 1, "train", name, getattr(self, name), "at least 1")
        if isinstance(self.remat, bool):
            raise ValueError(
                f"train.remat is {self.remat}, expected one of {', '.join(REMATS)}: "
                f'it was a switch once, and {self.remat} is now "{"full" if self.remat else "none"}"'
            )
        for name in ("eval_every", "eval_contexts", "save_every", "keep_every", "spike_sigmas", "loss_chunk"):
            _require(getattr(self, name) >= 0, "train", name, getattr(self, name), "at least 0")
        if self.keep_every:
            is_multiple = self.save_every > 0 and self.keep_every % self.save_every == 0
            _require(
                is_multiple, "train", "keep_every", self.keep_every, f"a multiple of save_every ({self.save_every})"
            )


@dataclass(frozen=True)
class Experiment:
    """One named run: model, data, optimiser, mesh, loop.

    Attributes:
      pretrained: folder of a Hugging Face checkpoint to start from; empty = random weights.
      seed: of the weights, the order of samples, and nothing else.
    """

    name: str = ""
    seed: int = 0
    pretrained: str = ""
    model: ModelConfig = field(default_factory=tiny)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
