from typing import Any

import pytest

from experiments.overrides import apply_overrides
from videonsa_jax.training.config import Experiment


def value(experiment: Experiment, path: str) -> Any:
    for name in path.split("."):
        experiment = getattr(experiment, name)
    return experiment


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=7", 7),
        ("train.steps=100", 100),
        ("optimizer.learning_rate=1e-6", 1e-6),
        ("optimizer.weight_decay=1", 1.0),
        ("train.tensorboard=true", True),
        ("train.tensorboard=No", False),
        ("train.remat=attention_outputs", "attention_outputs"),
        ("train.attention=dense", "dense"),
        ("model.mrope=int_seconds", "int_seconds"),
        ("data.source=a=b.json", "a=b.json"),
        ("pretrained=", ""),
        ("data.clips.seconds=4,8,12", (4, 8, 12)),
        ("data.buckets=(128,)", (128,)),
        ("data.buckets=", ()),
        ("model.text.mrope_section=[8, 4, 4]", (8, 4, 4)),
        ("model.nsa.branches=window,selected", ("window", "selected")),
        ("model.nsa.block_size=32", 32),
        ("model.nsa=none", None),
        (
            "mesh.rules=(lm_head|embed){1,2}/,replicated; up_proj/kernel$,-1; .*,fsdp",
            (("(lm_head|embed){1,2}/", "replicated"), ("up_proj/kernel$", -1), (".*", "fsdp")),
        ),
    ],
)
def test_values_are_read_as_their_fields_type(override: str, expected: Any) -> None:
    result = value(apply_overrides(Experiment(), [override]), override.partition("=")[0])
    assert result == expected
    assert type(result) is type(expected)


def test_fields_that_depend_on_each_other_change_together() -> None:
    sizes = ["model.vision.out_hidden_size=64", "model.text.hidden_size=64", "seed=1", "seed=2"]
    experiment = apply_overrides(Experiment(), sizes)
    assert experiment.model.text.hidden_size == experiment.model.vision.out_hidden_size == 64
    assert experiment.seed == 2
    with pytest.raises(ValueError, match=r"out_hidden_size 64 must equal text\.hidden_size 128"):
        apply_overrides(Experiment(), sizes[:1])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", r"--set 'train\.steps': expected path=value"),
        ("train.step=3", r"there is no field 'train\.step'; did you mean train\.steps"),
        ("learning_rate=3", r"there is no field 'learning_rate'; did you mean .*learning_rate"),
        ("qqq=3", r"no field 'qqq'; the groups are model, model\.vision, .*train"),
        ("train.steps=1e3", r"'1e3' is not what train\.steps expects: an integer"),
        ("train.steps=many", r"'many' is not what train\.steps expects: an integer"),
        ("optimizer.learning_rate=fast", r"'fast' is not what optimizer\.learning_rate expects: a number"),
        ("train.tensorboard=maybe", r"'maybe' is not what train\.tensorboard expects: true or false"),
        ("train.remat=true", r"'true' is not what train\.remat expects: one of none, full, minimal, attention_outputs"),
        ("train.attention=sparse", r"'sparse' is not what train\.attention expects: one of nsa, dense"),
        ("data.buckets=1,b", r"expects: any number of comma-separated values, each an integer"),
        ("model.text.mrope_section=1,2", r"expects: 3 comma-separated values, each an integer"),
        (
            "mesh.rules=.*,twice",
            r"expects: any number of semicolon-separated values, each text, then an integer or one of fsdp, replicated",
        ),
        ("mesh.rules=(,fsdp", r"mesh\.rules has the pattern '\(', expected a regular expression: "),
        ("model.text=3", r"model\.text is a group, set one of its fields: model\.text\.vocab_size, "),
        ("model.nsa=dense", r"model\.nsa is a group, set one of its fields: model\.nsa\.block_size, "),
        ("train.steps=0", r"train\.steps is 0, expected at least 1"),
        ("optimizer.learning_rate=-1", r"optimizer\.learning_rate is -1\.0, expected more than 0"),
        ("model.nsa.block_count=0", r"block_count is 0, expected at least 1"),
    ],
)
def test_what_does_not_fit_is_said_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        apply_overrides(Experiment(), [override])
    assert "\n" not in str(error.value)
