"""Parameters that a run leaves as they are: without gradient, without optimiser state."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

# Patterns of parameters' paths that have names of their own.
PRESETS = {
    "vision": r"^visual/(?!merger/)",
    "merger": r"^visual/merger/",
    "llm": r"^(embed_tokens|decoder|norm|lm_head)/",
}

type Tree = Mapping[str, Any]


def split_params(params: Tree, frozen: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides a tree by the paths of its leaves.

    Args:
      params: nested dict of parameters, or of anything that there is one of for each.
      frozen: names of `PRESETS`, or regular expressions searched for in paths such as "decoder/norm/scale".

    Returns:
      The trees of what is trained and of what is not.

    Raises:
      ValueError: an entry is no regular expression or matches nothing, or together they leave nothing to train.
    """
    leaves = flatten_dict(params, sep="/")
    kept: set[str] = set()
    for entry in frozen:
        try:
            matches = {path for path in leaves if re.search(PRESETS.get(entry, entry), path)}
        except re.error as error:
            raise ValueError(f"train.frozen has {entry!r}, which is no regular expression: {error}") from None
        if not matches:
            raise ValueError(
                f"train.frozen has {entry!r}, which matches no parameter, expected one of {', '.join(PRESETS)} or a "
                f"regular expression for paths such as {next(iter(leaves))!r}"
            )
        kept |= matches
    if len(kept) == len(leaves):
        raise ValueError(f"train.frozen is {', '.join(frozen)}, which leaves no parameter to train")
    return (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path not in kept}, sep="/"),
        unflatten_dict({path: leaf for path, leaf in leaves.items() if path in kept}, sep="/"),
    )


def join_params(params: Tree, changed: Tree) -> dict[str, Any]:
    """`params` with the leaves of `changed`, which has some or all of its paths."""
    return unflatten_dict(flatten_dict(params, sep="/") | flatten_dict(changed, sep="/"), sep="/")


def params_like(params: Tree, part: Tree) -> dict[str, Any]:
    """Those of `params` whose paths `part` has."""
    leaves = flatten_dict(params, sep="/")
    return unflatten_dict({path: leaves[path] for path in flatten_dict(part, sep="/")}, sep="/")
