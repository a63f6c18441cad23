"""Which shapes contexts are padded to: few, since each is compiled once, and with little padding."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# Groups that merging starts from, and lengths that are candidates; finer ones change the padding by less than 1 %.
_GROUPS, _CANDIDATES = 256, 64

type Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Bucket:
    """One shape that contexts are padded to.

    Attributes:
      visual_tokens: Lv.
      frames: F, temporal grid positions.
      patches: P, patches a frame.
    """

    visual_tokens: int
    frames: int
    patches: int


def choose_buckets(
    grids: Sequence[Grid], lengths: Sequence[int], *, multiple: int, merged_patches: int, most: int = 4
) -> tuple[list[Bucket], list[int]]:
    """Buckets for token grids, and the bucket of each grid (-1: longer than every given length).

    Args:
      grids: (time, height, width) in tokens.
      lengths: visual lengths of the buckets; empty = buckets chosen to pad little in the vision tower and in the visual
        stream together.
      multiple: chosen lengths are multiples of it.
      merged_patches: patches in a visual token.
      most: how many buckets are chosen at most.

    Returns:
      (buckets by rising visual length, the place of each grid's among them).
    """

    def rounded(length: int) -> int:
        return -(-length // multiple) * multiple

    def bucket(length: int, members: Sequence[Grid]) -> Bucket:
        return Bucket(length, max(g[0] for g in members), merged_patches * max(g[1] * g[2] for g in members))

    if not grids:
        return [], []
    counts = Counter(grids)
    if lengths:
        parted = _by_length(counts, sorted(lengths))
    else:
        by_length = _by_length(counts, _best_lengths(counts, rounded, most))
        by_shape = [(rounded(max(map(math.prod, group))), group) for group in _merged_groups(counts, most)]
        parted = min(by_length, by_shape, key=lambda parts: _cost(parts, counts))
    chosen = sorted(((bucket(length, group), group) for length, group in parted), key=lambda pair: _order(pair[0]))
    place = {grid: number for number, (_, group) in enumerate(chosen) for grid in group}
    return [shape for shape, _ in chosen], [place.get(grid, -1) for grid in grids]


def _order(bucket: Bucket) -> tuple[int, int, int]:
    return bucket.visual_tokens, bucket.frames, bucket.patches


def _cost(parts: Sequence[tuple[int, Sequence[Grid]]], counts: Mapping[Grid, int]) -> int:
    """Tokens of the visual stream and of the vision tower, padding included."""
    return sum(
        sum(counts[grid] for grid in group) * (length + max(g[0] for g in group) * max(g[1] * g[2] for g in group))
        for length, group in parts
    )


def _by_length(counts: Mapping[Grid, int], lengths: Sequence[int]) -> list[tuple[int, list[Grid]]]:
    """The grids that each of some rising lengths is the shortest one for; lengths that are for none left out."""
    groups: dict[int, list[Grid]] = {length: [] for length in lengths}
    for grid in counts:
        fitting = next((length for length in lengths if math.prod(grid) <= length), None)
        if fitting is not None:
            groups[fitting].append(grid)
    return [(length, group) for length, group in groups.items() if group]


def _best_lengths(counts: Mapping[Grid, int], rounded: Callable[[int], int], most: int) -> list[int]:
    """At most `most` lengths that leave the least padding, by dynamic programming over candidate lengths."""
    candidates = sorted({rounded(math.prod(grid)) for grid in counts})
    thinning = -(-len(candidates) // _CANDIDATES)
    candidates = candidates[::-1][::thinning][::-1]  # the longest stays
    groups: list[list[tuple[Grid, int]]] = [[] for _ in candidates]
    for grid, count in counts.items():
        groups[next(i for i, length in enumerate(candidates) if math.prod(grid) <= length)].append((grid, count))
    best: list[list[tuple[float, list[int]]]] = [[(0.0, [])] + [(math.inf, [])] * len(candidates)]
    for _ in range(most):
        row = list(best[-1])
        for end in range(1, len(candidates) + 1):
            number, frames, area = 0, 0, 0
            for start in range(end - 1, -1, -1):
                for (time, height, width), count in groups[start]:
                    number, frames, area = number + count, max(frames, time), max(area, height * width)
                cost, chosen = best[-1][start]
                cost += number * (candidates[end - 1] + frames * area)
                if cost < row[end][0]:
                    row[end] = cost, [*chosen, candidates[end - 1]]
        best.append(row)
    return best[-1][-1][1]


def _merged_groups(counts: Mapping[Grid, int], most: int) -> list[list[Grid]]:
    """At most `most` groups of grids: of all pairs of groups the one whose union costs least is merged, until so few.

    Grids of one length that differ in frames and patches share a bucket only where that is cheap: one bucket must have
    the frames of the longest video and the patches of the largest frame.
    """
    by_area: dict[int, list[Grid]] = {}
    for grid in sorted(counts):
        by_area.setdefault(grid[1] * grid[2], []).append(grid)
    groups: list[list[Grid]] = []
    for members in by_area.values():
        parts = min(len(members), max(1, round(_GROUPS * len(members) / len(counts))))
        groups += [[members[place] for place in part] for part in np.array_split(np.arange(len(members)), parts)]
    number = np.array([sum(counts[grid] for grid in group) for group in groups])
    sizes = np.array([[max(map(math.prod, g)), max(x[0] for x in g), g[0][1] * g[0][2]] for g in groups])  # [groups, 3]

    def cost(number: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        return (number * (sizes[..., 0] + sizes[..., 1] * sizes[..., 2])).astype(float)

    while len(groups) > most:
        together = cost(number[:, None] + number, np.maximum(sizes[:, None], sizes))
        alone = cost(number, sizes)
        added = together - alone[:, None] - alone
        np.fill_diagonal(added, np.inf)
        one, other = sorted(np.unravel_index(np.argmin(added), added.shape))
        groups[one] = groups[one] + groups.pop(other)
        number[one] += number[other]
        sizes[one] = np.maximum(sizes[one], sizes[other])
        number, sizes = np.delete(number, other), np.delete(sizes, other, axis=0)
    return groups
