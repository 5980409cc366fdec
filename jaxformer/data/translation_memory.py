"""The floor under every score: the target of the most similar training source, copied."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import scipy.sparse

_ORDERS = (1, 2)  # characters per n-gram: Chinese words are that long
# N-grams in more sources than this count and share of them cost the most time and tell the least.
_FREQUENT_COUNT, _FREQUENT_SHARE = 1000, 0.3
_CHUNK = 200  # queries compared with all sources at a time: bounds the memory


def nearest_targets(
    queries: Sequence[str], sources: Sequence[str], targets: Sequence[str]
) -> list[str]:
    """What a translation memory would answer to each query, in any language.

    Similarity is the cosine of character n-gram counts, weighted (1 + log tf) * (1 + log idf).
    Of equally similar sources the first is taken; a query that shares no n-gram with any source
    gets the first target.

    Raises:
      ValueError: there are no sources, or not as many targets.
    """
    if len(sources) != len(targets) or not sources:
        raise ValueError(f"{len(sources)} sources and {len(targets)} targets: need as many, not 0")
    vocabulary: dict[str, int] = {}
    source_grams = _gram_counts(sources, vocabulary, grow=True)
    query_grams = _gram_counts(queries, vocabulary, grow=False)
    frequency = np.bincount(source_grams.indices, minlength=len(vocabulary))
    weights = 1 + np.log((1 + len(sources)) / (1 + frequency))
    weights[frequency > max(_FREQUENT_COUNT, _FREQUENT_SHARE * len(sources))] = 0
    weighting = scipy.sparse.diags_array(weights.astype(np.float32))
    index = _unit_rows(source_grams @ weighting).T.tocsr()
    query_rows = (query_grams @ weighting).tocsr()
    found: list[str] = []
    for start in range(0, len(queries), _CHUNK):
        scores = (query_rows[start : start + _CHUNK] @ index).tocsr()
        found += [targets[_first_best(scores, row)] for row in range(scores.shape[0])]
    return found


def _gram_counts(
    texts: Sequence[str], vocabulary: dict[str, int], grow: bool
) -> scipy.sparse.csr_array:
    """1 + log of the n-gram counts of each text; `grow` adds unknown ones to `vocabulary`."""
    columns: list[int] = []
    counts: list[int] = []
    starts = [0]
    for text in texts:
        grams = Counter(text[i : i + n] for n in _ORDERS for i in range(len(text) - n + 1))
        for gram, count in grams.items():
            if grow:
                vocabulary.setdefault(gram, len(vocabulary))
            if gram in vocabulary:
                columns.append(vocabulary[gram])
                counts.append(count)
        starts.append(len(columns))
    values = 1 + np.log(np.array(counts, np.float32))
    return scipy.sparse.csr_array((values, columns, starts), (len(texts), len(vocabulary)))


def _unit_rows(matrix: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    norms = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
    return scipy.sparse.diags_array(1 / np.maximum(norms, 1e-9)) @ matrix


def _first_best(scores: scipy.sparse.csr_array, row: int) -> int:
    part = slice(scores.indptr[row], scores.indptr[row + 1])
    values, columns = scores.data[part], scores.indices[part]
    return int(columns[values == values.max()].min()) if values.size else 0
