"""SentencePiece: text to token ids and back, one vocabulary for both languages."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence

import sentencepiece as spm

PAD, UNK, BOS, EOS = 0, 1, 2, 3


class Tokenizer:
    def __init__(self, model: bytes):
        self._model = model
        self._processor = spm.SentencePieceProcessor(model_proto=model)

    @classmethod
    def train(cls, lines: Iterable[str], vocab_size: int) -> Tokenizer:
        out = io.BytesIO()
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, vocab_size=vocab_size,
            byte_fallback=True, character_coverage=0.9995, pad_id=PAD, unk_id=UNK, bos_id=BOS,
            eos_id=EOS, minloglevel=2, hard_vocab_limit=False, num_threads=2,
            normalization_rule_name="identity", model_type="unigram",
        )
        return cls(out.getvalue())

    @classmethod
    def from_bytes(cls, model: bytes) -> Tokenizer:
        return cls(model)

    def to_bytes(self) -> bytes:
        return self._model

    @property
    def vocab_size(self) -> int:
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self._model).hexdigest()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return self._processor.encode(list(lines))

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        kept = []
        for row in ids:
            row = list(map(int, row))
            if EOS in row:
                row = row[: row.index(EOS)]
            kept.append([i for i in row if i not in (PAD, BOS)])
        return self._processor.decode(kept)
