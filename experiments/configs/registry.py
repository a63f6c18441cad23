"""`--config=name`: functions that return an `Experiment`, found by their names."""

import dataclasses
import difflib
from collections.abc import Callable

from videonsa_jax.training.config import Experiment

type Config = Callable[[], Experiment]

REQUIRED = "?"  # value of a text field that has no sensible default: `--set` must give it

_CONFIGS: dict[str, Config] = {}


def register(config: Config) -> Config:
    """Decorator: makes a function's experiment known under the function's name; the name must be new."""
    name = config.__name__
    if name in _CONFIGS:
        raise ValueError(f"config {name!r} is registered twice: in {_CONFIGS[name].__module__} and {config.__module__}")
    _CONFIGS[name] = config
    return config


def names() -> list[str]:
    """All registered names, in order of registration."""
    return list(_CONFIGS)


def summary(name: str) -> str:
    """First line of a config's docstring."""
    return (_CONFIGS[name].__doc__ or "").strip().splitlines()[0]


def get(name: str) -> Experiment:
    """The experiment of that name; raises a ValueError naming the nearest ones."""
    if name not in _CONFIGS:
        near = difflib.get_close_matches(name, _CONFIGS) or names()
        raise ValueError(f"unknown config {name!r}; did you mean {', '.join(near)}? --config=help lists all")
    return dataclasses.replace(_CONFIGS[name](), name=name)


def missing_fields(config: object, prefix: str = "") -> list[str]:
    """Dotted paths of the fields that still have to be given."""
    missing = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            missing += missing_fields(value, f"{prefix}{field.name}.")
        elif value == REQUIRED:
            missing.append(prefix + field.name)
    return missing
