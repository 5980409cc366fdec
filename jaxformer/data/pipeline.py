"""From the names in a config to batches: text, tokenizer, tokens, packing, in this order."""

from __future__ import annotations

import hashlib
import tempfile
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from jaxformer import writing
from jaxformer.config import Config
from jaxformer.data.batches import Batches, EvalBatches, eval_batches
from jaxformer.data.packing import source_capacity
from jaxformer.data.text import ParallelText, load
from jaxformer.data.tokenizer import Tokenizer
from jaxformer.data.tokens import tokenize


class Dataset(NamedTuple):
    """Everything that training reads."""

    tokenizer: Tokenizer
    train: Batches
    valid: EvalBatches | None
    source_length: int  # S of the packed rows
    fingerprint: str  # of text, tokenizer, seed and row shapes: equal prints give equal batches


def prepare(config: Config, tokenizer: Tokenizer | None = None) -> Dataset:
    """Builds what is missing and opens the rest; everything is cached below `data_dir`.

    Args:
      config: of the run.
      tokenizer: the one of a checkpoint; None trains one on the training split (or takes the one
        trained before on the same text).
    """
    data = config.data
    cache = Path(data.data_dir) / "cache"
    text = load(data, "train")
    with _written_below(cache):
        tokenizer = tokenizer or trained_tokenizer(text, data.vocab_size, cache)
        tokens = tokenize(text, tokenizer, cache)
    source_length = data.source_length or source_capacity(
        tokens.lengths_N2, data.target_length, data.max_tokens
    )
    rows = data.tokens_per_batch // data.target_length
    train = Batches(
        tokens,
        seed=config.seed,
        rows=rows,
        source_length=source_length,
        target_length=data.target_length,
        max_tokens=data.max_tokens,
    )
    valid = None
    if data.valid:
        text = load(data, "valid")
        with _written_below(cache):
            held_out = tokenize(text, tokenizer, cache)
        valid = eval_batches(held_out, rows, source_length, data.target_length)
    return Dataset(tokenizer, train, valid, source_length, train.fingerprint)


def _written_below(cache: Path) -> AbstractContextManager[None]:
    return writing.below(cache, "make room there, or name another config.data.data_dir")


def trained_tokenizer(text: ParallelText, vocab_size: int, cache: Path) -> Tokenizer:
    """The tokenizer of this text: from the cache, or trained on both sides of it."""
    name = hashlib.sha256(f"{text.fingerprint} {vocab_size}".encode()).hexdigest()[:16]
    path = cache / f"{name}.spm"
    if path.exists():
        return Tokenizer.from_bytes(path.read_bytes())
    console = Console(stderr=True)
    console.print(f"Training the tokenizer on the {len(text):,} pairs of {text.name}")
    lines = (line for pair in text for line in (pair.source, pair.target))
    with console.status("SentencePiece counts and prunes; 20 s for 80,000 pairs"):
        tokenizer = Tokenizer.train(lines, vocab_size)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        partial = Path(folder) / path.name
        partial.write_bytes(tokenizer.to_bytes())
        partial.replace(path)
    return tokenizer
