"""Near copies, and a split into train, validation and test that has none across its parts.

Two pairs are neighbours when their Chinese character trigrams or their English word bigrams
overlap with a Jaccard index of at least 0.5 (exact twins of either side have 1). A random split of
software text leaves every fourth test sentence such a neighbour to copy from.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse

THRESHOLD = 0.5
_SEED = "zh_en 1"
_CHUNK = 2000  # rows compared with all others at a time: bounds the memory


class Pair(NamedTuple):
    """One translation. `book` is set where whole books, not sentences, are held out."""

    zh: str
    en: str
    domain: str
    book: int = 0


class Rule(NamedTuple):
    """How one source is split: by whole books if any are named, else that many single pairs."""

    validation: int = 0
    test: int = 0
    validation_books: frozenset[int] = frozenset()
    test_books: frozenset[int] = frozenset()


def chinese_grams(text: str) -> set[str]:
    """Character trigrams of the letters and digits of `text` (all of it, if shorter)."""
    letters = "".join(re.findall(r"\w", text)) or text
    return {letters[i : i + 3] for i in range(max(1, len(letters) - 2))}


def english_grams(text: str) -> set[str]:
    """Word bigrams of `text` in lower case, without punctuation (all of it, if shorter)."""
    words = re.findall(r"\w+", text.lower()) or [text]
    return {" ".join(words[i : i + 2]) for i in range(max(1, len(words) - 1))}


class Neighbours:
    """Finds pairs whose gram sets overlap with a Jaccard index of at least `THRESHOLD`.

    With the grams of a set of n ordered from rare to frequent, a set that overlaps by t shares one
    of the first n - ceil(t n) + 1. Only those are searched, which leaves the frequent half of the
    grams, and with it nearly all the work, to the exact check of the few pairs found.
    """

    def __init__(self, texts: Sequence[str], grams: Callable[[str], set[str]]):
        self._sets = _incidence([grams(text) for text in texts])
        self._sizes = np.diff(self._sets.indptr)
        self._prefixes = _rare_prefixes(self._sets)
        self._inverted = self._prefixes.T.tocsr()

    def edges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Index pairs (i, j), i from `rows` and j != i from all texts, that are neighbours."""
        found = [self._edges(rows[i : i + _CHUNK]) for i in range(0, len(rows), _CHUNK)]
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([i for i, _ in found]), np.concatenate([j for _, j in found])

    def _edges(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        candidates = (self._prefixes[rows] @ self._inverted).tocoo()
        i, j = rows[candidates.row], candidates.col.astype(np.int64)
        shorter, longer = (
            np.minimum(self._sizes[i], self._sizes[j]),
            np.maximum(self._sizes[i], self._sizes[j]),
        )
        possible = (i != j) & (shorter >= THRESHOLD * longer)
        i, j = i[possible], j[possible]
        shared = np.concatenate([np.empty(0, np.int64), *self._shared(i, j)])
        near = shared >= THRESHOLD * (self._sizes[i] + self._sizes[j] - shared)
        return i[near], j[near]

    def _shared(self, i: np.ndarray, j: np.ndarray) -> Iterator[np.ndarray]:
        for start in range(0, len(i), 100_000):
            part = slice(start, start + 100_000)
            both = self._sets[i[part]].multiply(self._sets[j[part]])
            yield np.asarray(both.sum(axis=1), np.int64).ravel()


def _incidence(sets: Sequence[set[str]]) -> scipy.sparse.csr_array:
    """Rows of ones at the grams of each set; columns are ordered from rare to frequent."""
    vocabulary: dict[str, int] = {}
    columns = np.fromiter(
        (vocabulary.setdefault(gram, len(vocabulary)) for grams in sets for gram in sorted(grams)),
        np.int64,
    )
    counts = np.bincount(columns, minlength=len(vocabulary))
    rank = np.empty(len(vocabulary), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(vocabulary))
    starts = np.concatenate([[0], np.cumsum([len(grams) for grams in sets], dtype=np.int64)])
    ones = np.ones(len(columns), np.int32)
    matrix = scipy.sparse.csr_array((ones, rank[columns], starts), (len(sets), len(vocabulary)))
    matrix.sort_indices()
    return matrix


def _rare_prefixes(sets: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    sizes = np.diff(sets.indptr)
    lengths = sizes - np.ceil(THRESHOLD * sizes).astype(sizes.dtype) + 1
    offsets = np.arange(sets.nnz) - np.repeat(sets.indptr[:-1], sizes)
    keep = offsets < np.repeat(lengths, sizes)
    starts = np.concatenate([[0], np.cumsum(np.minimum(lengths, sizes))])
    return scipy.sparse.csr_array((sets.data[keep], sets.indices[keep], starts), sets.shape)


def split(pairs: Sequence[Pair], rules: Mapping[str, Rule]) -> dict[str, list[Pair]]:
    """Splits `pairs` by the rule of their domain; every part keeps their order.

    Whole books are held out as they are. Single pairs are held out only if they have no neighbour
    in any domain; which ones is decided by a hash of their text. Training pairs that are
    neighbours of a held-out one are dropped.

    Returns:
      {"train": ..., "validation": ..., "test": ...}; a domain with too few isolated pairs holds
      out fewer than its rule asks for, at most a quarter of its pairs.
    """
    searches = _searches(pairs)
    part = np.full(len(pairs), "train", dtype="<U10")
    for domain, rule in rules.items():
        members = [i for i, pair in enumerate(pairs) if pair.domain == domain]
        for i in members:
            if pairs[i].book in rule.test_books:
                part[i] = "test"
            elif pairs[i].book in rule.validation_books:
                part[i] = "validation"
        if wanted := min(rule.test + rule.validation, len(members) // 4):
            chosen = _isolated(pairs, members, searches, wanted)
            tests = round(len(chosen) * rule.test / (rule.test + rule.validation))
            part[chosen[:tests]] = "test"
            part[chosen[tests:]] = "validation"
    held_out = np.flatnonzero(part != "train")
    for search in searches:
        _, near = search.edges(held_out)
        part[near[part[near] == "train"]] = "dropped"
    names = ("train", "validation", "test")
    return {name: [pairs[i] for i in np.flatnonzero(part == name).tolist()] for name in names}


def contamination(held_out: Sequence[Pair], train: Sequence[Pair]) -> int:
    """How many of the `held_out` pairs have a neighbour (or an exact twin) in `train`."""
    near: set[int] = set()
    for search in _searches([*held_out, *train]):
        i, j = search.edges(np.arange(len(held_out)))
        near.update(i[j >= len(held_out)].tolist())
    return len(near)


def _searches(pairs: Sequence[Pair]) -> tuple[Neighbours, Neighbours]:
    return (
        Neighbours([pair.zh for pair in pairs], chinese_grams),
        Neighbours([pair.en for pair in pairs], english_grams),
    )


def _isolated(
    pairs: Sequence[Pair], members: Sequence[int], searches: Sequence[Neighbours], wanted: int
) -> np.ndarray:
    """The first `wanted` of `members`, in the order of a hash, that have no neighbour at all."""
    order = np.array(sorted(members, key=lambda i: _hash(pairs[i])), np.int64)
    chosen: list[int] = []
    while len(chosen) < wanted and len(order):
        rows, order = order[: 2 * wanted], order[2 * wanted :]
        crowded = np.concatenate([search.edges(rows)[0] for search in searches])
        chosen += rows[~np.isin(rows, crowded)].tolist()
    return np.array(chosen[:wanted], np.int64)


def _hash(pair: Pair) -> bytes:
    return hashlib.blake2b(f"{_SEED}\t{pair.zh}\t{pair.en}".encode()).digest()
