"""Word alignments read from cross-attention, and their error rate against gold ones."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxformer.config import DataConfig
from jaxformer.data.text import prepared
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import UserError
from jaxformer.inference.translator import Translator
from jaxformer.model import Transformer, recorded

Links = frozenset[tuple[int, int]]
"""(source word, target word) pairs."""

ROWS = 64
"""Sentences run through the model together."""

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
MIXTURES = 4
"""Heads that a read-out may average at most."""


@dataclasses.dataclass(frozen=True)
class Aligned:
    """A sentence pair with its gold alignment: words of both sides, and the links between them."""

    source_words: tuple[str, ...]
    target_words: tuple[str, ...]
    links: Links
    source: str
    target: str


@dataclasses.dataclass(frozen=True)
class ReadOut:
    """How links are read from weights; counts from 0.

    Attributes:
      heads: (layer, head) of the cross-attention heads whose mean is taken.
      shift: 0 reads the weights at the position that predicts a word, 1 at the one that reads it,
        where the model knows which word it is (Chen et al. 2020).
      threshold: a link is where the weight is at least this share of the word's highest, looking
        from the source word or from the target word.
    """

    heads: tuple[tuple[int, int], ...]
    shift: int
    threshold: float


def gold(data: DataConfig, split: str, limit: int | None = None) -> list[Aligned]:
    """The sentence pairs of a split whose dataset has the features of `steve`.

    Raises:
      UserError: the dataset has no gold alignments.
    """
    if data.name == "files" or "alignment" not in prepared(data).info.features:
        raise UserError(
            f"--alignments needs gold alignments, which config.data.name={data.name!r} lacks; take "
            "a run of configs/steve.py."
        )
    records = prepared(data).as_data_source(getattr(data, split))
    count = len(records) if limit is None else min(limit, len(records))

    def words(record, key: str) -> tuple[str, ...]:
        return tuple(word.decode() for word in record[key])

    return [
        Aligned(
            words(r, "zh_words"),
            words(r, "en_words"),
            frozenset((int(s), int(t)) for s, t in r["alignment"]),
            r["zh"].decode(),
            r["en"].decode(),
        )
        for r in (records[i] for i in range(count))
    ]


def error_rate(found: Iterable[Links], right: Iterable[Links]) -> float:
    """AER = 1 - 2 |A and G| / (|A| + |G|) over all sentences (Och & Ney 2003; all links sure)."""
    both = total = 0
    for a, g in zip(found, right, strict=True):
        both += len(a & g)
        total += len(a) + len(g)
    return 1 - 2 * both / total if total else 0.0


def shares(pieces: Sequence[str], words: Sequence[str]) -> np.ndarray:
    """How much of each piece lies in each word, by bytes: [pieces, words], rows sum to 1 or 0."""
    spans = [_spans(_bytes(piece) for piece in pieces), _spans(word.encode() for word in words)]
    overlap = np.zeros((len(pieces), len(words)))
    for (i, (a, b)), (j, (c, d)) in itertools.product(*(enumerate(span) for span in spans)):
        overlap[i, j] = max(0, min(b, d) - max(a, c)) / max(b - a, 1)
    return overlap


def _bytes(piece: str) -> bytes:
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", "").encode()


def _spans(parts: Iterable[bytes]) -> list[tuple[int, int]]:
    ends = list(itertools.accumulate(len(part) for part in parts))
    return list(zip([0, *ends], ends, strict=False))


def batch_of(sources: Sequence[Sequence[int]], inputs: Sequence[Sequence[int]], pads: int = 0):
    """Token rows as the batch of `forward`, one sentence a row; `pads` more PAD in the source."""
    source, source_segments, source_positions = _rows(sources, pads)
    target, target_segments, target_positions = _rows(inputs, 0)
    return {
        "source_BS": source,
        "source_segments_BS": source_segments,
        "source_positions_BS": source_positions,
        "inputs_BT": target,
        "target_segments_BT": target_segments,
        "target_positions_BT": target_positions,
    }


def _rows(tokens: Sequence[Sequence[int]], pads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    length = max(len(row) for row in tokens) + pads
    padded, segments = (np.zeros((len(tokens), length), np.int32) for _ in range(2))
    for i, row in enumerate(tokens):
        padded[i, : len(row)] = row
        segments[i, : len(row)] = 1
    places = np.broadcast_to(np.arange(length, dtype=np.int32), padded.shape)
    return padded, segments, places


@jax.jit
def _cross_weights(model: Transformer, batch) -> jax.Array:
    return recorded(model, batch)[1]["decoder"]["cross_attention"]["weights_BHTS"]


def word_weights(translator: Translator, sentences: Sequence[Aligned]) -> list[np.ndarray]:
    """Weights between words, for each sentence [shift, L, H, target words, source words].

    The reference translation is read by the decoder (teacher forcing); a source word has the sum of
    its pieces, a target word the mean.
    """
    tokenizer = translator.tokenizer
    sources = tokenizer.encode([s.source for s in sentences])
    targets = tokenizer.encode([s.target for s in sentences])
    # Two lengths for all, so that one program serves.
    longest = [max(len(row) for row in side) + 1 for side in (sources, targets)]
    found = []
    for start in range(0, len(sentences), ROWS):
        here = slice(start, start + ROWS)
        rows = [[*row, EOS] for row in sources[here]] + [[EOS] * longest[0]]
        inputs = [[BOS, *row] for row in targets[here]] + [[BOS] * longest[1]]
        fill = ROWS + 1 - len(rows)
        batch = batch_of(rows + [[EOS]] * fill, inputs + [[BOS]] * fill)
        weights_LBHTS = np.asarray(_cross_weights(translator.model, batch), np.float64)
        for i, sentence in enumerate(sentences[here]):
            source, target = sources[start + i], targets[start + i]
            in_source = shares(tokenizer.pieces(source), sentence.source_words)
            in_target = shares(tokenizer.pieces(target), sentence.target_words)
            in_target /= np.maximum(in_target.sum(0), 1e-9)
            weights = weights_LBHTS[:, i, :, : len(target) + 1, : len(source)]
            shifted = np.stack([weights[:, :, :-1], weights[:, :, 1:]])
            found.append(np.einsum("xlhts,te,sc->xlhec", shifted, in_target, in_source))
    return found


def links(weights: np.ndarray, readout: ReadOut) -> Links:
    """The links of one sentence from its `word_weights`."""
    layers, heads = zip(*readout.heads, strict=True)
    mean = weights[readout.shift, list(layers), list(heads)].mean(0)
    return _links(mean, readout.threshold)


def _links(mean: np.ndarray, threshold: float) -> Links:
    high = (mean >= threshold * mean.max(1, keepdims=True)) & (mean > 0)
    return frozenset((int(c), int(e)) for e, c in zip(*np.nonzero(high), strict=True))


def best_readout(weights: Sequence[np.ndarray], right: Sequence[Links]) -> ReadOut:
    """The read-out of lowest error on these sentences: heads are added while they help."""
    _, L, H = weights[0].shape[:3]

    def rate(readout: ReadOut) -> float:
        return error_rate((links(w, readout) for w in weights), right)

    best: tuple[float, ReadOut] | None = None
    for shift in (0, 1):
        heads: tuple[tuple[int, int], ...] = ()
        for _ in range(MIXTURES):
            tried = [
                (rate(readout), readout)
                for head in itertools.product(range(L), range(H))
                if head not in heads
                for threshold in THRESHOLDS
                for readout in [ReadOut((*heads, head), shift, threshold)]
            ]
            if not tried:
                break
            step = min(tried, key=lambda pair: pair[0])
            heads = step[1].heads
            if best is None or step[0] < best[0]:
                best = step
    assert best is not None
    return best[1]
