"""A very small model and a pipeline of random batches, so that the trainer is tested without videos."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from videonsa_jax.configs import ModelConfig, NSAConfig, TextConfig, VisionConfig
from videonsa_jax.data.config import DataConfig
from videonsa_jax.data.examples import EvalBatch
from videonsa_jax.data.pipeline import DataIterator, Failures
from videonsa_jax.streams import Batch, TrainBatch
from videonsa_jax.training.config import Experiment, OptimizerConfig, TrainConfig
from videonsa_jax.training.step import TrainState

VOCAB, FRAMES, SIDE, TEXT = 32, 4, 4, 6
VISUAL = FRAMES * SIDE * SIDE // 4
CONTEXTS, QUESTIONS, HELDOUT_BATCHES = 4, 2, 3
FAMILIES = ("colour", "count")


def tiny_model() -> ModelConfig:
    return ModelConfig(
        vision=VisionConfig(
            depth=1,
            hidden_size=16,
            intermediate_size=16,
            num_heads=1,
            out_hidden_size=32,
            fullatt_block_indexes=(0,),
        ),
        text=TextConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            rope_theta=10_000.0,
            mrope_section=(4, 2, 2),
            tie_word_embeddings=True,
        ),
        nsa=NSAConfig(block_size=4, block_count=2, window_size=4),
    )


def tiny_experiment(**train: Any) -> Experiment:
    return Experiment(
        name="fake",
        model=tiny_model(),
        data=DataConfig(contexts_per_batch=CONTEXTS, questions_per_context=QUESTIONS),
        # Adam divides by the gradient's size: a small epsilon would blow the rounding of near-zero gradients up.
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.1, eps=1e-2),
        train=TrainConfig(**({"steps": 6, "log_every": 1, "save_every": 2} | train)),
    )


def toy_init_state(
    model: ModelConfig, train: TrainConfig, seed: int, optimizer: optax.GradientTransformation
) -> TrainState:
    """Stands in for `init_state`: a model that compiles in no time."""
    embedding, visual = jax.random.normal(jax.random.key(seed), (2, VOCAB, 8))
    params = {"embedding": embedding, "visual": {"kernel": visual[:1], "bias": visual[1]}}
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def toy_make_forward(model: ModelConfig, train: TrainConfig, mesh: jax.sharding.Mesh) -> Any:
    """Stands in for `make_forward`."""

    def forward(params: dict, batch: Batch, positions: Any = None) -> jax.Array:
        brightness = jnp.mean(batch.patches / 255.0, axis=(1, 2, 3))[:, None, None, None]
        visual = jnp.tanh(brightness * params["visual"]["kernel"] + params["visual"]["bias"])
        hidden = params["embedding"][batch.text_tokens] + visual
        if positions is not None:
            hidden = jnp.take_along_axis(hidden, positions[:, :, None, None], axis=2)[:, :, 0]
        return hidden @ params["embedding"].T

    return forward


def toy_make_losses(model: ModelConfig, train: TrainConfig, mesh: jax.sharding.Mesh) -> Any:
    """Stands in for `make_losses`."""
    forward = toy_make_forward(model, train, mesh)

    def losses(params: dict, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        logits = forward(params, batch.inputs)
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        return entropy, jnp.argmax(logits, axis=-1) == batch.targets

    return losses


def random_batch(seed: int, contexts: int = CONTEXTS) -> TrainBatch:
    """A batch that depends on its seed alone; two to four answer tokens a row, the last context shorter."""
    random = np.random.default_rng(seed)
    rows = (contexts, QUESTIONS)
    lengths = np.full(contexts, VISUAL, np.int32)
    lengths[-1] = VISUAL - 5
    steps = np.arange(VISUAL, dtype=np.int32)
    tokens = random.integers(0, VOCAB, (*rows, TEXT + 1)).astype(np.int32)
    answers = random.integers(2, 5, rows)
    batch = Batch(
        patches=random.integers(0, 256, (contexts, FRAMES, SIDE * SIDE, 1176)).astype(np.uint8),
        frame_grids=np.full((contexts, FRAMES, 2), SIDE, np.int32),
        visual_source=np.tile(steps, (contexts, 1)),
        visual_positions=np.tile(steps, (3, contexts, 1)),
        visual_lengths=lengths,
        visible_text=np.zeros((contexts, VISUAL), np.int32),
        text_tokens=tokens[..., :-1],
        text_positions=np.tile(VISUAL + np.arange(TEXT, dtype=np.int32), (3, *rows, 1)),
        text_lengths=np.full(rows, TEXT, np.int32),
        visible_visual=np.broadcast_to(lengths[:, None, None], (*rows, TEXT)).copy(),
    )
    return TrainBatch(
        inputs=batch,
        targets=tokens[..., 1:],
        loss_weights=(np.arange(TEXT) >= TEXT - answers[..., None]).astype(np.float32),
        sample_ids=(100 * seed + np.arange(contexts * QUESTIONS).reshape(rows)).astype(np.int32),
    )


def random_eval_batch(index: int) -> EvalBatch:
    """Two options a question; the last row of the last batch only fills up."""
    train = random_batch(1000 + index)
    rows = train.sample_ids.shape
    answers = np.zeros(rows, np.int32)
    sample_ids = (index * CONTEXTS * QUESTIONS + np.arange(CONTEXTS * QUESTIONS).reshape(rows)).astype(np.int32)
    if index == HELDOUT_BATCHES - 1:
        answers[-1, -1] = sample_ids[-1, -1] = -1
    options = np.tile(np.array([3, 7, -1], np.int32), (*rows, 1))
    return EvalBatch(
        inputs=train.inputs,
        option_tokens=options,
        answer_option=answers,
        answer_position=np.full(rows, TEXT - 2, np.int32),
        sample_ids=sample_ids,
    )


@dataclasses.dataclass
class FakeRecord:
    family: str
    options: tuple[str, ...] = ("a", "b")
    id: str = ""


class FakeIterator(DataIterator):
    def __init__(self, make_batch: Any, count: int | None):
        self.make_batch, self.count, self.position = make_batch, count, 0
        self.failures, self.loading_seconds = Failures(), 0.0
        self.failed_rows = np.zeros(CONTEXTS, bool)

    def __next__(self) -> Any:
        if self.position == self.count:
            raise StopIteration
        self.position += 1
        return self.make_batch(self.position - 1)

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position, "skips": []}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def close(self) -> None:
        pass


class FakePipeline:
    """What `build_pipeline` returns, as far as the trainer looks at it."""

    vocab_size = VOCAB
    shapes = ("the only one",)
    dropped: ClassVar[dict[str, int]] = {}

    def __init__(self, split: str, make_train_batch: Any = random_batch, contexts: int = CONTEXTS):
        self.split, self.make_train_batch, self.contexts = split, make_train_batch, contexts
        self.steps_per_epoch = HELDOUT_BATCHES if split == "heldout" else 10
        # As many as there are sample ids in the batches.
        self.records = [FakeRecord(FAMILIES[index % 2], id=f"question {index}") for index in range(10_000)]

    def iterator(self) -> FakeIterator:
        if self.split == "heldout":
            return FakeIterator(random_eval_batch, HELDOUT_BATCHES)
        return FakeIterator(self.make_train_batch, None)

    def empty_batch(self, shape: str) -> TrainBatch:
        return random_batch(0, self.contexts)
