"""The token ids of a split, in flat arrays on disk: made once, then only mapped into memory."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rich.progress import track

from jaxformer.data.pairs import Pair, ParallelText
from jaxformer.data.tokenizer import Tokenizer

SIDES = ("source", "target")
PARTS = ("ids", "offsets")
CHUNK = 10_000
"""Pairs tokenized and written at a time."""

SLOW = 500_000
"""From so many pairs on it takes long enough to show progress."""


class TokenPairs:
    """Token ids of sentence pairs, without BOS and EOS.

    Attributes:
      fingerprint: hexadecimal; of the text and the tokenizer.
      lengths_N2: int32 [N, 2], source and target tokens of each pair.
    """

    def __init__(self, fingerprint: str, sides: Sequence[tuple[np.ndarray, np.ndarray]]):
        """From (ids, offsets) of each side; sentence i is ids[offsets[i] : offsets[i + 1]]."""
        self.fingerprint = fingerprint
        self._folder: Path | None = None
        # Slices of a memory map are memory maps, which are slow to make; of a view they are not.
        self._sides = [(np.asarray(ids), np.asarray(offsets)) for ids, offsets in sides]
        lengths = [np.diff(offsets) for _, offsets in self._sides]
        self.lengths_N2 = np.stack(lengths, axis=1).astype(np.int32)

    @classmethod
    def of(cls, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> TokenPairs:
        """Token ids that are in memory already."""
        sides = [_flat(sources), _flat(targets)]
        digest = hashlib.sha256(b"".join(a.tobytes() for side in sides for a in side))
        return cls(digest.hexdigest(), sides)

    @classmethod
    def mapped(cls, folder: Path) -> TokenPairs:
        """What `tokenize` wrote, without reading it."""
        sides = [
            tuple(np.load(folder / f"{side}.{part}.npy", mmap_mode="r") for part in PARTS)
            for side in SIDES
        ]
        tokens = cls(folder.name, [(ids, offsets) for ids, offsets in sides])
        tokens._folder = folder
        return tokens

    def __reduce__(self):
        # A worker process maps the files again instead of receiving a copy of all tokens.
        if self._folder is not None:
            return TokenPairs.mapped, (self._folder,)
        return TokenPairs, (self.fingerprint, self._sides)

    def __len__(self) -> int:
        return len(self.lengths_N2)

    def source(self, index: int) -> np.ndarray:
        """int32 ids of one source sentence."""
        return self._sentence(0, index)

    def target(self, index: int) -> np.ndarray:
        """int32 ids of one target sentence."""
        return self._sentence(1, index)

    def _sentence(self, side: int, index: int) -> np.ndarray:
        ids, offsets = self._sides[side]
        return ids[offsets[index] : offsets[index + 1]].astype(np.int32)


def tokenize(text: ParallelText, tokenizer: Tokenizer, cache: Path) -> TokenPairs:
    """The tokens of a text, from the cache or made now.

    Args:
      text: sentence pairs.
      tokenizer: turns both sides into ids.
      cache: directory; the result lives in a folder of it that is named by text and tokenizer, and
        that appears only when it is complete.
    """
    name = hashlib.sha256(f"{text.fingerprint} {tokenizer.fingerprint}".encode()).hexdigest()
    folder = cache / name[:32]
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as partial:
            _write(Path(partial), text, tokenizer)
            finished = Path(partial) / "finished"
            finished.mkdir()
            for path in Path(partial).glob("*.npy"):
                shutil.move(path, finished)
            try:
                finished.replace(folder)
            except OSError:  # another process was as fast, with the same result
                if not folder.exists():
                    raise
    return TokenPairs.mapped(folder)


def _write(folder: Path, text: ParallelText, tokenizer: Tokenizer) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    lengths: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    with (folder / "source").open("wb") as source, (folder / "target").open("wb") as target:
        for pairs in _chunks(text):
            for side, file in zip(SIDES, (source, target), strict=True):
                rows = tokenizer.encode([getattr(pair, side) for pair in pairs])
                lengths[side].append(np.array([len(row) for row in rows], np.int64))
                file.write(_flat(rows)[0].astype(dtype).tobytes())
    for side in SIDES:
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths[side]))])
        np.save(folder / f"{side}.offsets.npy", offsets)
        # Nothing cannot be mapped.
        ids = np.memmap(folder / side, dtype, "r") if offsets[-1] else np.empty(0, dtype)
        np.save(folder / f"{side}.ids.npy", ids)


def _chunks(text: ParallelText) -> Iterable[list[Pair]]:
    pairs = iter(text)
    starts: Iterable[int] = range(0, len(text), CHUNK)
    if len(text) >= SLOW:
        starts = track(range(0, len(text), CHUNK), description="Tokenizing")
    return (list(itertools.islice(pairs, CHUNK)) for _ in starts)


def _flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = np.fromiter(itertools.chain.from_iterable(rows), np.int32)
    lengths = np.array([len(row) for row in rows], np.int64)
    return ids, np.concatenate([[0], np.cumsum(lengths)])
