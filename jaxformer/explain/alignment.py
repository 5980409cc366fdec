"""Word alignments read from cross-attention, and their error rate against gold ones."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jax import Array
from matplotlib.figure import Figure

from jaxformer.config import DataConfig
from jaxformer.data.text import prepared
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import UserError
from jaxformer.explain.figures import ORANGE, fonts, heat
from jaxformer.inference.translator import Translator
from jaxformer.model import Transformer, recorded
from jaxformer.model.transformer import output_table

Links = frozenset[tuple[int, int]]
"""(source word, target word) pairs."""

ROWS = 64
"""Sentences run through the model together."""

SHARES = (0.0, 0.2, 0.3, 0.45, 0.6, 0.7, 0.85, 1.0)
LEAST = (0.02, 0.05, 0.1, 0.15, 0.3, 0.5)
"""What `best_readout` tries; LEAST in shares of what the words' best votes typically are."""


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
    """How links are read from votes (see `word_votes`); counts from 0.

    Attributes:
      heads: (layer, head) of the cross-attention heads whose votes are added up.
      of_target: a link has at least this share of the best vote for its target word,
      of_source: and of the best of its source word; articles, for which a noun votes that belongs
        to another word, have none that passes both,
      least: and at least this, in nats.
    """

    heads: tuple[tuple[int, int], ...]
    of_target: float = 0.5
    of_source: float = 0.5
    least: float = 0.0

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
def votes(model: Transformer, batch: dict[str, Array], said_BT: Array) -> Array:
    """What each source token adds to the logit of the next target token: [L, B, H, T, S] in nats.

    A cross-attention weight alone says where a head looks, and not whether it brings something from
    there (Kobayashi et al. 2020, "Attention is not only a weight"). So the weight is multiplied
    by what the value behind it, taken through the head's output projection straight to the output
    layer, adds to the score of the token `said_BT`, less what it adds to tokens on average (direct
    logit attribution: Elhage et al. 2021).
    """
    _, record = recorded(model, batch)
    cross = record["decoder"]["cross_attention"]
    attention = model.decoder.blocks.cross_attention
    assert attention is not None
    output_LHKD = attention.output_HKD[...]
    shared = output_LHKD.shape[1] // cross["v_BSGK"].shape[3]
    v_LBSHK = jnp.repeat(cross["v_BSGK"], shared, axis=3)
    table_VD = output_table(model)[...]
    towards_BTD = (table_VD - table_VD.mean(0, keepdims=True))[said_BT]
    if model.decoder.norm is not None:
        last_BTD = record["decoder"]["feed_forward"]["stream_BTD"][-1]
        size_BT1 = jnp.sqrt(jnp.square(last_BTD).mean(-1, keepdims=True))
        towards_BTD = towards_BTD * (model.decoder.norm.scale_D[...][None, None] / size_BT1)
    towards_LBTHK = jnp.einsum("lhkd,btd->lbthk", output_LHKD, towards_BTD)
    return cross["weights_BHTS"] * jnp.einsum("lbthk,lbshk->lbhts", towards_LBTHK, v_LBSHK)


def word_votes(translator: Translator, sentences: Sequence[Aligned]) -> list[np.ndarray]:
    """Votes between words, for each sentence [L, H, target words, source words].

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
        fill = ROWS - len(sources[here])
        rows = [[*row, EOS] for row in sources[here]] + [[EOS]] * fill + [[EOS] * longest[0]]
        said = [[*row, EOS] for row in targets[here]] + [[EOS]] * fill + [[EOS] * longest[1]]
        batch = batch_of(rows, [[BOS, *row[:-1]] for row in said])
        votes_LBHTS = np.asarray(votes(translator.model, batch, _rows(said, 0)[0]), np.float64)
        for i, sentence in enumerate(sentences[here]):
            source, target = sources[start + i], targets[start + i]
            in_source = shares(tokenizer.pieces(source), sentence.source_words)
            in_target = shares(tokenizer.pieces(target), sentence.target_words)
            in_target /= np.maximum(in_target.sum(0), 1e-9)
            between = votes_LBHTS[:, i, :, : len(target), : len(source)]
            found.append(np.einsum("lhts,te,sc->lhec", between, in_target, in_source))
    return found


def links(votes: np.ndarray, readout: ReadOut) -> Links:
    """The links of one sentence from its `word_votes`."""
    linked = _linked(sum_of(votes, readout), readout)
    return frozenset((int(c), int(e)) for e, c in zip(*np.nonzero(linked), strict=True))


def sum_of(votes: np.ndarray, readout: ReadOut) -> np.ndarray:
    """The votes of the heads that a read-out listens to: [target words, source words]."""
    layers, heads = zip(*readout.heads, strict=True)
    return votes[list(layers), list(heads)].sum(0)


def _linked(sum_EC: np.ndarray, readout: ReadOut) -> np.ndarray:
    """Which of [..., target words, source words] are links."""
    high = sum_EC >= readout.of_target * sum_EC.max(-1, keepdims=True)
    high &= sum_EC >= readout.of_source * sum_EC.max(-2, keepdims=True)
    return high & (sum_EC >= readout.least)


def best_readout(votes: Sequence[np.ndarray], right: Sequence[Links]) -> ReadOut:
    """A read-out of low error on these sentences.

    It begins with the best head, and takes in the one that helps most until none helps.
    """
    E, C = (max(one.shape[axis] for one in votes) for axis in (2, 3))
    votes_LHNEC = np.stack([_filled(one, E, C) for one in votes], axis=2)
    right_NEC = np.zeros((len(right), E, C), bool)
    for n, linked in enumerate(right):
        for c, e in linked:
            right_NEC[n, e, c] = True
    L, H = votes_LHNEC.shape[:2]
    rate, best = 2.0, ReadOut(())
    while True:
        more = [head for head in itertools.product(range(L), range(H)) if head not in best.heads]
        tried = [
            _best_bounds(sum_of(votes_LHNEC, ReadOut(heads)), heads, right_NEC)
            for heads in ((*best.heads, head) for head in more)
        ]
        lowest = min(tried, key=lambda found: found[0], default=(2.0, best))
        if lowest[0] >= rate:
            return best
        rate, best = lowest


def _filled(votes: np.ndarray, E: int, C: int) -> np.ndarray:
    """Words that are not there get no vote."""
    short = (E - votes.shape[2], C - votes.shape[3])
    return np.pad(votes, ((0, 0), (0, 0), (0, short[0]), (0, short[1])))


def _best_bounds(
    sum_NEC: np.ndarray, heads: tuple[tuple[int, int], ...], right_NEC: np.ndarray
) -> tuple[float, ReadOut]:
    """The error and read-out of the best bounds for these heads."""
    highest = sum_NEC.max(-1)
    typical = float(np.median(highest[highest > 0])) if (highest > 0).any() else 1.0
    best = 2.0, ReadOut(heads)
    for of_target, of_source, least in itertools.product(SHARES, SHARES, LEAST):
        readout = ReadOut(heads, of_target, of_source, least * typical)
        linked = _linked(sum_NEC, readout)
        rate = 1 - 2 * (linked & right_NEC).sum() / (linked.sum() + right_NEC.sum())
        best = min(best, (float(rate), readout), key=lambda found: found[0])
    return best


def picture(
    sentences: Sequence[Aligned],
    votes: Sequence[np.ndarray],
    found: Sequence[Links],
    readout: ReadOut,
    count: int = 4,
) -> Figure:
    """The first sentences: votes as shades, gold links as rings, found ones as dots."""
    with matplotlib.rc_context(fonts()):
        figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
        places = figure.subplots(2, (count + 1) // 2, squeeze=False).ravel()
        columns = (sentences, votes, found)
        for axes, sentence, one, links_found in zip(places, *columns, strict=False):
            rows, names = sentence.target_words, sentence.source_words
            heat(axes, sum_of(one, readout), rows, names)
            for links_drawn, size, style in (
                (sentence.links, 230, {"facecolors": "none", "edgecolors": ORANGE}),
                (links_found, 50, {"color": ORANGE}),
            ):
                points = sorted(links_drawn)
                axes.scatter([c for c, _ in points], [e for _, e in points], s=size, **style)
        rate = error_rate(found, [one.links for one in sentences])
        figure.suptitle(
            f"Cross-attention as word alignment: AER {rate:.3f} on {len(sentences)} sentences\n"
            "ring 圈: gold 标准对齐 · dot 点: read from the votes 读自注意力的贡献",
            fontsize=12,
        )
        return figure
