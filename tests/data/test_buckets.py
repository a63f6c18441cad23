import itertools
import math

import numpy as np

from videonsa_jax.data.buckets import choose_buckets


def padding(grids, buckets, places):
    return sum(buckets[place].visual_tokens + buckets[place].frames * buckets[place].patches // 4 for place in places)


def test_chosen_buckets_pad_least():
    grids = [(2, 2, 2), (2, 2, 3), (4, 4, 4), (4, 4, 5), (8, 4, 4), (16, 4, 4), (1, 6, 8), (3, 5, 5)] * 2 + [(2, 2, 2)]
    buckets, places = choose_buckets(grids, (), multiple=16, merged_patches=4)
    assert len(buckets) <= 4
    candidates = sorted({math.ceil(math.prod(grid) / 16) * 16 for grid in grids})
    best = min(
        padding(grids, *choose_buckets(grids, (*lengths, candidates[-1]), multiple=16, merged_patches=4))
        for count in range(4)
        for lengths in itertools.combinations(candidates[:-1], count)
    )
    assert padding(grids, buckets, places) <= best


def test_every_grid_fits_its_bucket():
    grids = [(time, height, 3) for time in range(1, 40) for height in range(1, 7)]
    buckets, places = choose_buckets(grids, (), multiple=16, merged_patches=4)
    assert len(buckets) == 4
    for grid, place in zip(grids, places, strict=True):
        bucket = buckets[place]
        assert math.prod(grid) <= bucket.visual_tokens
        assert bucket.visual_tokens % 16 == 0
        assert grid[0] <= bucket.frames
        assert 4 * grid[1] * grid[2] <= bucket.patches


def test_one_bucket_has_not_the_longest_video_and_the_largest_frame():
    """Wide and square frames: by length alone, a bucket has the frames of the ones and the patches of the others."""
    grids = [(time, *size) for time in range(175, 276) for size in ((6, 10), (6, 9), (8, 8), (5, 10))]
    held = sum(2 * math.prod(grid) for grid in grids)
    shares = [padding(grids, *choose_buckets(grids, (), multiple=64, merged_patches=4, most=n)) for n in (1, 4, 8)]
    assert shares == sorted(shares, reverse=True)
    lengths = [12_000, 13_760, 15_680, 17_600]
    assert shares[1] < padding(grids, *choose_buckets(grids, lengths, multiple=64, merged_patches=4))
    assert 1 - held / shares[1] < 0.14
    assert 1 - held / shares[2] < 0.1


def test_buckets_do_not_depend_on_the_order_of_videos():
    rng = np.random.default_rng(0)
    grids = [tuple(rng.integers(1, 30, 3).tolist()) for _ in range(500)]
    buckets, places = choose_buckets(grids, (), multiple=16, merged_patches=4, most=6)
    order = rng.permutation(len(grids))
    again, moved = choose_buckets([grids[k] for k in order], (), multiple=16, merged_patches=4, most=6)
    assert again == buckets == sorted(buckets, key=lambda b: (b.visual_tokens, b.frames, b.patches))
    assert moved == [places[k] for k in order]
