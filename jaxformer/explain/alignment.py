"""Word alignments read from cross-attention, and their error rate against gold ones."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure

from jaxformer.config import DataConfig
from jaxformer.data.text import prepared
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import UserError
from jaxformer.explain.figures import FONTS, ORANGE, heat
from jaxformer.inference.translator import Translator
from jaxformer.model import Transformer, recorded

Links = frozenset[tuple[int, int]]
"""(source word, target word) pairs."""

ROWS = 64
"""Sentences run through the model together."""

SHARES = (0.0, 0.3, 0.5, 0.7, 1.0)
LEAST = (0.05, 0.1, 0.15, 0.2, 0.3)
"""What `best_readout` tries."""


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
      of_target: a link's weight is at least this share of the highest of its target word,
      of_source: and of the highest of its source word; articles, which look at a noun that belongs
        to another word, have none that passes both,
      least: and at least this.
    """

    heads: tuple[tuple[int, int], ...]
    shift: int = 0
    of_target: float = 0.5
    of_source: float = 0.5
    least: float = 0.1

    def told(self) -> dict[str, Any]:
        """For people and programs: layers and heads count from 1."""
        told = dataclasses.asdict(self)
        return told | {"heads": [f"{layer + 1}.{head + 1}" for layer, head in self.heads]}


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
    return _links(mean_of(weights, readout), readout)


def mean_of(weights: np.ndarray, readout: ReadOut) -> np.ndarray:
    """The mean weights of the heads that a read-out looks at: [target words, source words]."""
    layers, heads = zip(*readout.heads, strict=True)
    return weights[readout.shift, list(layers), list(heads)].mean(0)


def _links(mean: np.ndarray, readout: ReadOut) -> Links:
    high = mean >= readout.of_target * mean.max(1, keepdims=True)
    high &= mean >= readout.of_source * mean.max(0, keepdims=True)
    high &= mean >= readout.least
    return frozenset((int(c), int(e)) for e, c in zip(*np.nonzero(high), strict=True))


def best_readout(weights: Sequence[np.ndarray], right: Sequence[Links]) -> ReadOut:
    """The read-out of lowest error on these sentences.

    Tried are each head, the mean of each layer and the mean of all, at both positions.
    """
    _, L, H = weights[0].shape[:3]
    every = list(itertools.product(range(L), range(H)))
    layers = [[(layer, head) for head in range(H)] for layer in range(L)]
    best: tuple[float, ReadOut] | None = None
    for shift, heads in itertools.product((0, 1), ([*([h] for h in every), *layers, every])):
        start = ReadOut(tuple(heads), shift)
        means = [mean_of(one, start) for one in weights]
        for of_target, of_source, least in itertools.product(SHARES, SHARES, LEAST):
            tried = ReadOut(start.heads, shift, of_target, of_source, least)
            rate = error_rate((_links(mean, tried) for mean in means), right)
            if best is None or rate < best[0]:
                best = rate, tried
    assert best is not None
    return best[1]


def picture(
    sentences: Sequence[Aligned],
    weights: Sequence[np.ndarray],
    found: Sequence[Links],
    readout: ReadOut,
    count: int = 4,
) -> Figure:
    """The first sentences: weights as shades, gold links as rings, found ones as dots."""
    with matplotlib.rc_context(FONTS):
        figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
        places = figure.subplots(2, (count + 1) // 2, squeeze=False).ravel()
        columns = (sentences, weights, found)
        for axes, sentence, one, links_found in zip(places, *columns, strict=False):
            rows, names = sentence.target_words, sentence.source_words
            heat(axes, mean_of(one, readout), rows, names, top=1)
            for links_drawn, size, style in (
                (sentence.links, 230, {"facecolors": "none", "edgecolors": ORANGE}),
                (links_found, 50, {"color": ORANGE}),
            ):
                points = sorted(links_drawn)
                axes.scatter([c for c, _ in points], [e for _, e in points], s=size, **style)
        rate = error_rate(found, [one.links for one in sentences])
        figure.suptitle(
            f"Cross-attention as word alignment: AER {rate:.3f} on {len(sentences)} sentences\n"
            "ring 圈: gold 标准对齐 · dot 点: read from the weights 读自注意力",
            fontsize=12,
        )
        return figure
