"""SentencePiece: text to token ids and back, one vocabulary for both languages."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence

import sentencepiece

from jaxformer.errors import UserError

PAD, UNK, BOS, EOS = 0, 1, 2, 3

COVERAGE = 0.9995
"""Share of the characters of the text that get a piece; the rest is spelled in bytes."""

MAX_LINES = 2_000_000
"""Lines that training looks at; of a longer text a sample, the same one every time."""


class Tokenizer:
    """A unigram SentencePiece model (Kudo 2018) with byte fallback: no text is unknown to it.

    Text goes in as it is, without Unicode normalisation: full-width punctuation is right in
    Chinese, and what comes out can be compared with references that nobody normalised.
    """

    def __init__(self, model: bytes):
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> Tokenizer:
        """Learns at most `vocab_size` pieces, PAD, UNK, BOS, EOS and the 256 bytes included.

        The same lines in the same order give the same tokenizer. Text that has fewer pieces to
        offer gives a smaller vocabulary.

        Raises:
          UserError: there is no text, or its characters alone need a larger vocabulary; says how
            large.
        """
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines),
                model_writer=model,
                vocab_size=vocab_size,
                hard_vocab_limit=False,
                byte_fallback=True,
                character_coverage=COVERAGE,
                normalization_rule_name="identity",
                input_sentence_size=MAX_LINES,
                pad_id=PAD,
                unk_id=UNK,
                bos_id=BOS,
                eos_id=EOS,
                num_threads=2,
                minloglevel=2,
            )
        except RuntimeError as error:
            if re.search("sentences_.empty|all_chars_count", str(error)):
                raise UserError(
                    "There is no text to learn a vocabulary from; config.data.train must hold some."
                ) from error
            needed = re.search(r"smaller than required_chars. \d+ vs (\d+)", str(error))
            if needed is None:
                raise
            raise UserError(
                f"config.data.vocab_size={vocab_size} is too small for the characters of this "
                f"text; it must be at least {needed.group(1)}."
            ) from error
        return cls(model.getvalue())

    @classmethod
    def from_bytes(cls, model: bytes) -> Tokenizer:
        """The tokenizer that `to_bytes` gave."""
        return cls(model)

    def to_bytes(self) -> bytes:
        """The whole model, to be stored with the weights that learned its ids."""
        return self._model

    @property
    def vocab_size(self) -> int:
        """V, all special pieces included."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """The ids of each line, without BOS and EOS."""
        return self._processor.encode(list(lines))

    def decode(self, ids: Iterable[Sequence[int]]) -> list[str]:
        """The text of each sequence up to its first EOS; PAD and BOS are dropped."""
        return self._processor.decode([_words(row) for row in ids])

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The piece behind each id, ▁ standing for a space."""
        return [self._processor.id_to_piece(int(token)) for token in ids]


def _words(ids: Sequence[int]) -> list[int]:
    row = [int(token) for token in ids]
    if EOS in row:
        row = row[: row.index(EOS)]
    return [token for token in row if token not in (PAD, BOS)]
