"""The named experiments behind `--config`: one function each, registered by its name."""

from experiments.configs import clips, videonsa_7b
from experiments.configs.registry import REQUIRED, get, missing_fields, names, summary

__all__ = ["REQUIRED", "clips", "get", "missing_fields", "names", "summary", "videonsa_7b"]
