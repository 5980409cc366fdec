"""Packing: every pair that fits in exactly one row, nothing over the edge, little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxformer.data.packing import Packing, pack, random_order, source_capacity


def corpus(pairs: int, seed: int = 0) -> np.ndarray:
    """Sentence lengths as in real parallel text: skewed, and correlated between the sides."""
    generator = np.random.default_rng(seed)
    target = np.exp(generator.normal(3.0, 0.6, pairs))
    source = 0.77 * target * np.exp(generator.normal(0.0, 0.25, pairs))
    return np.maximum(np.stack([source, target], axis=1).round(), 1).astype(np.int32)


def rows_of(packing: Packing) -> list[np.ndarray]:
    return np.split(packing.order, packing.starts[1:-1])


@given(
    pairs=st.integers(0, 200),
    seed=st.integers(0, 10**6),
    source=st.integers(1, 60),
    target=st.integers(1, 14),
    max_tokens=st.integers(0, 13),
    key=st.integers(0, 2**128 - 1),
)
def test_rows_hold_each_fitting_pair_once_and_no_more_than_their_capacity(
    pairs, seed, source, target, max_tokens, key
):
    # Many nearly empty and many nearly row-long targets: what is left over is often an odd gap.
    generator = np.random.default_rng(seed)
    ends = np.where(generator.random(pairs) < 0.5, 0, max(target - 3, 0))
    sides = [generator.integers(0, 25, pairs), ends + generator.integers(0, 4, pairs)]
    lengths_N2 = np.stack(sides, axis=1).astype(np.int32)
    packing = pack(lengths_N2, (source, target), key=key, max_tokens=max_tokens)
    fitting = [
        i
        for i, (s, t) in enumerate(lengths_N2.tolist())
        if s + 1 <= source and t + 1 <= target and (not max_tokens or max(s, t) <= max_tokens)
    ]
    assert sorted(packing.order.tolist()) == fitting
    assert packing.excluded.tolist() == sorted(set(range(pairs)) - set(fitting))
    filled = [(lengths_N2[row] + 1).sum(axis=0) for row in rows_of(packing) if fitting]
    assert len(filled) == packing.rows
    assert all(1 <= s <= source and 1 <= t <= target for s, t in filled)
    assert packing.filled == tuple(np.sum(filled, axis=0).tolist() if filled else (0, 0))


def test_the_same_key_gives_the_same_rows_and_another_key_others():
    lengths_N2 = corpus(2000)
    one, same, other = (pack(lengths_N2, (104, 128), key=key) for key in (1, 1, 2))
    np.testing.assert_array_equal(one.order, same.order)
    np.testing.assert_array_equal(one.starts, same.starts)
    assert not np.array_equal(one.order, other.order)


@pytest.mark.parametrize("target_length", [128, 256, 2048])
def test_little_padding_on_both_sides(target_length):
    lengths_N2 = corpus(30_000)
    packing = pack(lengths_N2, (source_capacity(lengths_N2, target_length), target_length))
    assert max(packing.padding) < 0.03
    assert len(packing.excluded) < 0.005 * len(lengths_N2)


def test_a_source_side_wider_than_needed_leaves_the_target_side_full():
    assert pack(corpus(30_000), (160, 128)).padding[1] < 0.012


def test_padding_is_the_share_of_empty_positions():
    packing = pack(np.array([[3, 5], [1, 7]]), (8, 16))  # 4 + 2 of 8 positions, 6 + 8 of 16
    assert packing.rows == 1
    assert packing.padding == (0.25, 0.125)


def test_rows_mix_short_and_long_pairs_from_everywhere():
    lengths_N2 = np.sort(corpus(30_000), axis=0)  # as if one book came after the other
    rows = rows_of(pack(lengths_N2, (104, 128)))
    # Were rows filled from neighbours, their spread would be near 0; fully at random, about 0.5.
    spread = np.mean([np.ptp(row) for row in rows]) / len(lengths_N2)
    assert spread > 0.4


@pytest.mark.parametrize(
    ("lengths", "target_length", "max_tokens", "expected"),
    [
        ([[9, 19]] * 10, 128, 0, 64),  # 10 : 20, just half
        ([[9, 19]] * 10, 96, 0, 48),
        ([[10, 19]] * 10, 128, 0, 72),  # 70.4: 72 leaves 2 % empty there, 64 leaves 9 % here
        ([[10, 19]] * 10, 120, 0, 64),  # 66: 64 is nearer than 72
        ([[9, 19]] * 10 + [[299, 150]] * 10, 128, 0, 64),  # the long ones do not fit anyway
        ([[9, 19]] * 10 + [[99, 19]] * 10, 128, 50, 64),  # nor those past max_tokens
        ([[9, 19]] * 98 + [[89, 19]] * 2, 128, 0, 96),  # 74.2 by ratio would lose one in 50
        ([[9, 19]] * 1999 + [[89, 19]], 128, 0, 64),  # one in 2000 may be lost
        ([[200, 200]], 30, 0, 32),  # nothing fits: as long as the target
    ],
)
def test_source_capacity_fills_both_sides_together(lengths, target_length, max_tokens, expected):
    assert source_capacity(np.array(lengths), target_length, max_tokens) == expected


def test_the_random_order_stays_what_it_is():
    # Runs resume on another machine and another NumPy: a change here must change batches.VERSION.
    assert random_order(8, key=7).tolist() == [4, 1, 6, 3, 2, 7, 5, 0]
