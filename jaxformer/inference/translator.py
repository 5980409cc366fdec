"""Text in, text out."""

from __future__ import annotations

import base64
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress

from jaxformer import trees
from jaxformer.checkpoint import load_weights
from jaxformer.config import Config
from jaxformer.data.tokenizer import EOS, Tokenizer
from jaxformer.errors import UserError
from jaxformer.inference.decode import Decoded, Sampling, beam_search, sample
from jaxformer.model import Transformer

BUCKETS = (16, 32, 64, 128, 256)
"""Source lengths that programs are compiled for."""

ROWS = (1, 8)
"""Batch sizes for few lines; more of them fill `decode.tokens_per_batch`."""

SLOW_LINES = 64
"""From so many lines on, progress is shown."""

SENTENCE_END = re.compile(r"(?<=[。！？；!?;])|(?<=\.)(?=\s)")


@dataclasses.dataclass(frozen=True)
class Translation:
    """One hypothesis for one line.

    Attributes:
      text: the translation.
      score: log-probability in nats, over the length penalty in beam search; the sum over the
        pieces of a line that was split.
      tokens: ids without EOS.
      warning: what a reader should know of this line; "" if all is well.
    """

    text: str
    score: float
    tokens: tuple[int, ...]
    warning: str = ""


class Translator:
    """A trained model and its tokenizer, ready to translate."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: Config, step: int = 0):
        self.model, self.tokenizer, self.config, self.step = model, tokenizer, config, step

    @classmethod
    def load(cls, workdir: str | Path, average: int = 1) -> Translator:
        """From the checkpoints of a run; nothing else is needed.

        Args:
          workdir: of the training.
          average: the mean weights of so many of the last checkpoints.

        Raises:
          UserError: there is no whole checkpoint, or there are fewer than `average`.
        """
        weights, meta = load_weights(workdir, average=average)
        config = Config.of(meta["config"])
        tokenizer = Tokenizer.from_bytes(base64.b64decode(meta["tokenizer"]))
        like = jax.eval_shape(
            lambda: Transformer(config.model, tokenizer.vocab_size, jax.random.key(0))
        )
        model = jax.device_put(trees.unflatten(like, weights))
        return cls(model, tokenizer, config, meta["step"])

    def __call__(self, lines: Iterable[str]) -> list[str]:
        """The best translation of each line, by the settings of the config."""
        return [hypotheses[0].text for hypotheses in self.translate(list(lines))]

    def translate(
        self,
        lines: Sequence[str],
        *,
        beam: int | None = None,
        alpha: float | None = None,
        n_best: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        console: Console | None = None,
    ) -> list[list[Translation]]:
        """The `n_best` translations of each line, best first; one entry a line, in order.

        Args:
          lines: any text; an empty line stays empty, a line too long for the model is translated
            in pieces and carries a warning.
          beam: hypotheses kept at each step; 1 is greedy. None: as configured.
          alpha: strength of the length penalty. None: as configured.
          n_best: how many hypotheses to return.
          sampling: draw instead of searching.
          seed: of the draws; line i is drawn alike whatever the other lines are.
          console: where to show progress.

        Raises:
          UserError: settings that cannot be met, see `check`.
        """
        beam = self.config.decode.beam if beam is None else beam
        alpha = self.config.decode.alpha if alpha is None else alpha
        check(beam, alpha, n_best, sampling, seed)
        pieces = [self._pieces(line) for line in lines]
        flat = [ids for row in pieces for ids in row]
        places = [(line, piece) for line, row in enumerate(pieces) for piece in range(len(row))]
        search = _Search(self, beam, alpha, n_best, sampling, seed)
        decoded = iter(search.run(flat, places, console))
        return [self._join([next(decoded) for _ in row], n_best) for row in pieces]

    def _pieces(self, line: str) -> list[list[int]]:
        """Token ids of the line; of its sentences, one by one, if it is longer than a bucket."""
        limit = min(BUCKETS[-1], self.config.model.max_length) - 1
        line = line.encode("utf-8", "replace").decode().strip()  # half a surrogate pair is no text
        if not line:
            return []
        whole = self.tokenizer.encode([line])[0]
        if len(whole) <= limit:
            return [whole]
        sentences = [part.strip() for part in SENTENCE_END.split(line) if part.strip()]
        rows = self.tokenizer.encode(sentences)
        return [row[i : i + limit] for row in rows for i in range(0, len(row), limit)]

    def _join(self, pieces: list[list[Translation]], n_best: int) -> list[Translation]:
        if not pieces:
            return [Translation("", 0.0, ())] * n_best
        if len(pieces) == 1:
            return pieces[0][:n_best]
        warning = f"too long for the model; translated in {len(pieces)} pieces"
        return [
            Translation(
                " ".join(piece[rank].text for piece in pieces if piece[rank].text),
                sum(piece[rank].score for piece in pieces),
                tuple(token for piece in pieces for token in piece[rank].tokens),
                warning,
            )
            for rank in range(n_best)
        ]


def check(
    beam: int | None, alpha: float | None, n_best: int, sampling: Sampling | None, seed: int
) -> None:
    """Refuses settings of `Translator.translate` that cannot be met; None is not known yet.

    Raises:
      UserError: names the setting, its value and what would be right.
    """
    for name, value, least in (("beam", beam, 1), ("n_best", n_best, 1), ("alpha", alpha, 0)):
        if value is not None and not least <= value < math.inf:  # nor NaN
            raise UserError(f"{name} is {value}; it must be at least {least}.")
    if not 0 <= seed < 2**32:  # JAX looks at no more bits
        raise UserError(f"seed is {seed}; it must be at least 0 and below 2^32.")
    if sampling is None:
        if beam is not None and n_best > beam:
            raise UserError(f"n_best={n_best} needs a beam of at least {n_best}; it is {beam}.")
        return
    if n_best > 1:
        raise UserError("Sampling gives one translation a line: n_best must be 1.")
    if not 0 < sampling.temperature < math.inf:
        raise UserError(f"temperature is {sampling.temperature}; it must be above 0, and finite.")
    if not 0 < sampling.top_p <= 1:
        raise UserError(f"top_p is {sampling.top_p}; it must be above 0 and at most 1.")
    if sampling.top_k < 0:
        raise UserError(f"top_k is {sampling.top_k}; it must be 0 (all tokens) or more.")


class _Search:
    """Runs batches of few shapes, so that few programs are compiled."""

    def __init__(
        self,
        translator: Translator,
        beam: int,
        alpha: float,
        n_best: int,
        sampling: Sampling | None,
        seed: int,
    ):
        self.translator, self.beam, self.alpha, self.n_best = translator, beam, alpha, n_best
        self.sampling, self.key = sampling, jax.random.key(seed)
        self.decode = translator.config.decode

    def run(
        self, rows: list[list[int]], places: list[tuple[int, int]], console: Console | None
    ) -> list[list[Translation]]:
        """Hypotheses for each row of source ids, in order; (line, piece) decides what it draws."""
        found: list[list[Translation]] = [[] for _ in rows]
        buckets: dict[int, list[int]] = {}
        for index in sorted(range(len(rows)), key=lambda i: len(rows[i])):
            bucket = next(size for size in BUCKETS if len(rows[index]) < size)
            buckets.setdefault(bucket, []).append(index)
        show = console is not None and console.is_terminal and len(rows) >= SLOW_LINES
        with Progress(console=console, disable=not show, transient=True) as progress:
            task = progress.add_task("Translating", total=len(rows))
            for length, indices in buckets.items():
                size = self._rows(length, len(indices))
                for start in range(0, len(indices), size):
                    chosen = indices[start : start + size]
                    decoded = self._batch(
                        [rows[i] for i in chosen], [places[i] for i in chosen], size, length
                    )
                    for index, hypotheses in zip(chosen, self._texts(decoded), strict=False):
                        found[index] = hypotheses
                    progress.advance(task, len(chosen))
        return found

    def _rows(self, length: int, lines: int) -> int:
        full = max(self.decode.tokens_per_batch // length, 1)
        return next((size for size in ROWS if lines <= size <= full), full)

    def _batch(
        self, rows: list[list[int]], places: list[tuple[int, int]], size: int, length: int
    ) -> Decoded:
        source_BS = np.zeros((size, length), np.int32)
        for row, tokens in enumerate(rows):
            source_BS[row, : len(tokens) + 1] = [*tokens, EOS]
        segments_BS = (source_BS != 0).astype(np.int32)
        model = self.translator.model
        max_length = min(self.decode.max_length, 2 * length + 16)
        if self.sampling is None and self.beam > 1:
            return beam_search(
                model,
                source_BS,
                segments_BS,
                beam=self.beam,
                alpha=self.alpha,
                max_length=max_length,
                n_best=self.n_best,
            )
        numbers_B2 = np.zeros((size, 2), np.uint32)
        numbers_B2[: len(places)] = places
        fold_in = jax.vmap(jax.random.fold_in)
        keys_B = fold_in(
            fold_in(jnp.broadcast_to(self.key, size), numbers_B2[:, 0]), numbers_B2[:, 1]
        )
        return sample(
            model, source_BS, segments_BS, keys_B, max_length=max_length, sampling=self.sampling
        )

    def _texts(self, decoded: Decoded) -> list[list[Translation]]:
        tokens_BNT, scores_BN = np.asarray(decoded.tokens_BNT), np.asarray(decoded.scores_BN)
        results = []
        for tokens_NT, scores_N in zip(tokens_BNT, scores_BN, strict=True):
            rows = [_until_end(tokens) for tokens in tokens_NT]
            # Spelled in bytes, a line break is a token like any other; a line must stay one.
            texts = [" ".join(t.split()) for t in self.translator.tokenizer.decode(rows)]
            results.append(
                [
                    Translation(text, float(score), row)
                    for text, score, row in zip(texts, scores_N, rows, strict=True)
                ]
            )
        return results


def _until_end(tokens_T: np.ndarray) -> tuple[int, ...]:
    row = tokens_T.tolist()
    end = next((i for i, token in enumerate(row) if token in (EOS, 0)), len(row))
    return tuple(row[:end])
