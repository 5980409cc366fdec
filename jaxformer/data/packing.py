"""Several sentence pairs per row: two-dimensional bin packing that leaves a few percent of padding.

A row has S source and T target positions, and a pair must fit on both sides. Rows are filled in
random order, so that they mix long and short pairs from all over the data, and only the last pair
or two of a row are chosen: those that close the gap on both sides at once. Among tens of thousands
there nearly always are such. Pairs of equal lengths are interchangeable, so the search works on how
many pairs there are of each (source, target) length, never on single pairs.

Lengths are tokens of the text alone. In a row every sentence takes one position more: the source
and the targets end with EOS, the decoder inputs begin with BOS.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from array import array
from collections.abc import Iterator
from functools import cached_property

import numpy as np

HAND = 32  # drawn pairs that a row is filled from, or 1.5 times what a long row takes
RESERVE = 2.5  # average pairs for which space is kept until the gap is closed
SLACK = 3  # positions that a closed row may leave empty on a side
DRAW_CHUNK = 1 << 18  # pairs whose lengths are Python integers at the same time


@dataclasses.dataclass(frozen=True)
class Packing:
    """Which pairs share a row: row r holds `order[starts[r] : starts[r + 1]]`, left to right."""

    order: np.ndarray  # int64 [pairs that fit]: indices of pairs
    starts: np.ndarray  # int64 [rows + 1]
    excluded: np.ndarray  # int64: indices of the pairs that fit into no row
    capacity: tuple[int, int]  # source and target positions of a row
    filled: tuple[int, int]  # source and target positions taken, over all rows

    @property
    def rows(self) -> int:
        """The number of rows."""
        return len(self.starts) - 1

    @cached_property
    def padding(self) -> tuple[float, float]:
        """The share of source and of target positions that stay empty."""
        source, target = (
            1.0 - filled / max(self.rows * capacity, 1)
            for filled, capacity in zip(self.filled, self.capacity, strict=True)
        )
        return source, target


def random_order(count: int, key: int) -> np.ndarray:
    """int64 [count]: a permutation, a pure function of (count, key < 2**128) on every platform.

    Made from the raw Philox stream, because NumPy promises no more than that across its versions.
    """
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


def source_capacity(lengths_N2: np.ndarray, target_length: int, max_tokens: int = 0) -> int:
    """The source positions of a row for which both sides run full together.

    The multiple of 8 nearest to the data's ratio of source to target, but never so short that it
    alone would exclude more than one pair in 200.

    Args:
      lengths_N2: source and target tokens, without BOS and EOS.
      target_length: T, target positions of a row.
      max_tokens: longer sentences do not count; 0: no such limit.
    """
    positions_N2 = lengths_N2[_fits(lengths_N2, (2**62, target_length), max_tokens)] + np.int64(1)
    if not len(positions_N2):
        return max(8, math.ceil(target_length / 8) * 8)
    source, target = positions_N2.sum(axis=0).tolist()
    even = target_length * source / target
    near = [max(8, math.floor(even / 8) * 8), math.ceil(even / 8) * 8]
    best = min(near, key=lambda capacity: max(even / capacity, capacity / even))
    least = int(np.quantile(positions_N2[:, 0], 0.995, method="higher"))
    return max(best, math.ceil(least / 8) * 8)


def pack(
    lengths_N2: np.ndarray, capacity: tuple[int, int], *, key: int = 0, max_tokens: int = 0
) -> Packing:
    """Packs every pair that fits into exactly one row; a pure function of its arguments.

    Args:
      lengths_N2: source and target tokens of each pair, without BOS and EOS.
      capacity: (S, T), positions of a row.
      key: decides the random order, < 2**128.
      max_tokens: pairs with a longer sentence are excluded; 0: only the row limits.
    """
    fits = _fits(lengths_N2, capacity, max_tokens)
    ids = np.flatnonzero(fits)
    ids = ids[random_order(len(ids), key)]
    positions_N2 = lengths_N2[ids] + np.int64(1)
    # One integer stands for a pair of lengths: adding and subtracting it is adding and subtracting
    # both lengths. The stride is so wide that a target length below 0, at worst -T - SLACK, shows
    # up as one above T, which no pair has.
    stride = 2 * capacity[1] + SLACK + 1
    cells = positions_N2[:, 0] * stride + positions_N2[:, 1]
    placed, starts = _fill_rows(cells, stride, capacity)
    # Rows were made of lengths; now the i-th place for a length takes the i-th pair of that length.
    order = np.empty_like(ids)
    order[np.argsort(placed, kind="stable")] = ids[np.argsort(cells, kind="stable")]
    source, target = positions_N2.sum(axis=0).tolist()
    return Packing(order, starts, np.flatnonzero(~fits), capacity, (source, target))


def _fits(lengths_N2: np.ndarray, capacity: tuple[int, int], max_tokens: int) -> np.ndarray:
    limits = np.asarray(capacity, np.int64) - 1
    if max_tokens:
        limits = np.minimum(limits, max_tokens)
    return np.all(lengths_N2 <= limits, axis=1)


def _fill_rows(
    cells: np.ndarray, stride: int, capacity: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(cells in the order of their places, row starts), both int64."""
    S, T = capacity
    source_left, target_left = (int(lengths.sum()) for lengths in np.divmod(cells, stride))
    reserve_source = RESERVE * source_left / max(len(cells), 1)
    reserve_target = RESERVE * target_left / max(len(cells), 1)
    average = min(S * len(cells) / max(source_left, 1), T * len(cells) / max(target_left, 1))
    hand_size = max(HAND, round(1.5 * average))
    gaps = itertools.product(range(SLACK + 1), repeat=2)
    slack = [s * stride + t for s, t in sorted(gaps, key=lambda gap: gap[0] / S + gap[1] / T)]
    pool = _Pool(cells)
    draws = pool.draws()
    hand: list[int] = []
    placed, starts = array("q"), array("q", [0])
    while True:
        hand.extend(itertools.islice(draws, hand_size - len(hand)))
        if not hand:
            return np.array(placed, np.int64), np.array(starts, np.int64)
        row = [hand.pop(0)]  # the oldest: nothing waits for ever
        # Both sides are to run out together: the wider one is not filled beyond its due.
        aim_source = min(S, -(-T * source_left // target_left))
        aim_target = min(T, -(-S * target_left // source_left))
        if row[0] // stride > aim_source or row[0] % stride > aim_target:
            aim_source, aim_target = S, T
        free = aim_source * stride + aim_target - row[0]
        i = 0
        while i < len(hand) and free // stride > reserve_source and free % stride > reserve_target:
            if _inside(hand[i], free, stride):
                row.append(hand.pop(i))
                free -= row[-1]
            else:
                i += 1
        row += _close(free, stride, hand, pool, slack)
        placed.extend(row)
        starts.append(len(placed))
        source_left -= sum(row) // stride
        target_left -= sum(row) % stride


def _inside(cell: int, free: int, stride: int) -> bool:
    rest = free - cell
    return rest >= 0 and rest % stride <= free % stride


def _close(free: int, stride: int, hand: list[int], pool: _Pool, slack: list[int]) -> list[int]:
    """Takes pairs from hand and pool that fill the gap `free`, exactly if at all possible."""
    row: list[int] = []
    while free >= stride and free % stride:
        for gap in slack:
            wanted = free - gap
            if wanted in pool.count:
                return [*row, pool.take(wanted)]
            for i, cell in enumerate(hand):
                if wanted - cell in pool.count:
                    return [*row, hand.pop(i), pool.take(wanted - cell)]
        fitting = [cell for cell in hand if _inside(cell, free, stride)]
        if not fitting:
            break
        row.append(max(fitting))
        hand.remove(row[-1])
        free -= row[-1]
    return row


class _Pool:
    """The pairs not yet in a row or in the hand, as a count for each pair of lengths."""

    def __init__(self, cells: np.ndarray):
        kinds, counts = np.unique(cells, return_counts=True)
        self.count: dict[int, int] = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
        self._cells = cells

    def take(self, cell: int) -> int:
        """The cell, with one pair fewer of it in the pool."""
        if self.count[cell] == 1:
            del self.count[cell]
        else:
            self.count[cell] -= 1
        return cell

    def draws(self) -> Iterator[int]:
        """Draws in the given order until the pool is empty.

        What `take` has taken meanwhile is left out when its kind has run out, which need not be
        where the same pair would have come: pairs of a kind are interchangeable.
        """
        for start in range(0, len(self._cells), DRAW_CHUNK):
            for cell in self._cells[start : start + DRAW_CHUNK].tolist():
                if cell in self.count:
                    yield self.take(cell)
