"""Batches as a pure function of the step: no state to save, nothing to fast-forward on resuming.

The pairs are packed into rows once. Every epoch shuffles all rows anew, and the epochs joined end
to end are one endless stream of rows, of which step s takes the rows [s R, (s + 1) R). All epochs
have the same number of rows N, so row k of the stream is row k mod N of epoch k div N: finding a
step costs one permutation, every pair is seen exactly once per epoch, and data smaller than a batch
works too.
"""

from __future__ import annotations

import collections
import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from jaxformer.data.packing import pack, random_order
from jaxformer.data.tokenizer import BOS, EOS
from jaxformer.errors import UserError

if TYPE_CHECKING:
    from jaxformer.data.tokens import TokenPairs

Rows = slice | np.ndarray  # which rows of a global batch: a slice of them, or their numbers
ALL = slice(None)
VERSION = 1  # of the packing and the shuffles: changes when the same seed gives other batches
READY = 4  # batches prepared ahead


class PackedRows:
    """Packed sentence pairs, and the arrays of any of their rows."""

    def __init__(
        self,
        tokens: TokenPairs,
        *,
        seed: int,
        rows: int,
        source_length: int,
        target_length: int,
        max_tokens: int = 0,
    ):
        """Packs the pairs.

        Args:
          tokens: the token ids of the split.
          seed: decides which pairs share a row, and the order of the rows.
          rows: R, rows of the global batch.
          source_length: S, source positions of a row (see `packing.source_capacity`).
          target_length: T, target positions of a row.
          max_tokens: pairs with a longer sentence are left out; 0: only the row limits.

        Raises:
          UserError: not one pair fits into a row.
        """
        self.tokens = tokens
        self.rows = rows
        self._stream = _digest(VERSION, tokens.fingerprint, seed)
        capacity = (source_length, target_length)
        self.packing = pack(
            tokens.lengths_N2, capacity, key=_key(self._stream, "packing"), max_tokens=max_tokens
        )
        if not self.packing.rows:
            raise UserError(_nothing_fits(tokens.lengths_N2, capacity, max_tokens))
        self.fingerprint = _digest(self._stream, rows, source_length, target_length, max_tokens)

    @property
    def pairs(self) -> int:
        """Sentence pairs that are in rows."""
        return len(self.packing.order)

    @property
    def excluded(self) -> int:
        """Sentence pairs left out because they are longer than a row or than max_tokens."""
        return len(self.packing.excluded)

    @property
    def padding(self) -> tuple[float, float]:
        """The share of source and of target positions that are padding."""
        return self.packing.padding

    @property
    def tokens_per_batch(self) -> float:
        """Target tokens (EOS counts) of a mean batch: what a step learns from."""
        return self.packing.filled[1] / self.packing.rows * self.rows

    def rows_at(self, step: int, rows: Rows = ALL) -> np.ndarray:
        """int64: which packed rows are in these rows of batch `step`; -1 is an empty row."""
        raise NotImplementedError

    def batch_at(self, step: int, rows: Rows = ALL) -> dict[str, np.ndarray]:
        """The batch of one step, or only some rows of it; a pure function of its arguments.

        Args:
          step: counts from 0.
          rows: which of the R rows of the global batch; a host asks for its own.

        Returns:
          int32 arrays source_BS, source_segments_BS, source_positions_BS, inputs_BT, targets_BT,
          target_segments_BT and target_positions_BT. Segments count the pairs of a row from 1, the
          same on both sides; positions count from 0 in each sentence; padding is 0 everywhere.
        """
        ids_of_row = self._ids(self.rows_at(step, rows))
        pairs_B = np.array([len(ids) for ids in ids_of_row], np.int64)
        ids = np.concatenate([*ids_of_row, np.empty(0, np.int64)]).tolist()
        S, T = self.packing.capacity
        source = _Side(pairs_B, [self.tokens.source(i) for i in ids], S)
        target = _Side(pairs_B, [self.tokens.target(i) for i in ids], T)
        return {
            "source_BS": source.ending_with(EOS),
            "source_segments_BS": source.segments(),
            "source_positions_BS": source.positions(),
            "inputs_BT": target.beginning_with(BOS),
            "targets_BT": target.ending_with(EOS),
            "target_segments_BT": target.segments(),
            "target_positions_BT": target.positions(),
        }

    def example_ids_at(self, step: int, rows: Rows = ALL) -> list[np.ndarray]:
        """The indices of the sentence pairs in each row of the batch, in segment order."""
        return self._ids(self.rows_at(step, rows))

    def _ids(self, rows: np.ndarray) -> list[np.ndarray]:
        order, starts = self.packing.order, self.packing.starts
        return [order[starts[row] : starts[row + 1]] if row >= 0 else order[:0] for row in rows]


class Batches(PackedRows):
    """The endless stream of training batches."""

    @property
    def steps_per_epoch(self) -> float:
        """Batches per pass through the data; a batch may end one epoch and begin the next."""
        return self.packing.rows / self.rows

    def rows_at(self, step: int, rows: Rows = ALL) -> np.ndarray:
        """int64: which packed rows are in these rows of batch `step`."""
        in_stream = step * self.rows + np.arange(self.rows)[rows]
        epochs, places = np.divmod(in_stream, self.packing.rows)
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = _shuffled(self._stream, epoch, self.packing.rows)[places[here]]
        return chosen


class EvalBatches(PackedRows):
    """Every pair that fits exactly once, in a fixed order; the last batch ends with empty rows."""

    def __len__(self) -> int:
        return -(-self.packing.rows // self.rows)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.batch_at(step) for step in range(len(self)))

    def rows_at(self, step: int, rows: Rows = ALL) -> np.ndarray:
        """int64: which packed rows are in these rows of batch `step`; -1 is an empty row."""
        chosen = step * self.rows + np.arange(self.rows)[rows]
        return np.where(chosen < self.packing.rows, chosen, -1)


def eval_batches(
    tokens: TokenPairs, rows: int, source_length: int, target_length: int
) -> EvalBatches:
    """The batches of a held-out split; pairs longer than a row are counted in `.excluded`."""
    return EvalBatches(
        tokens, seed=0, rows=rows, source_length=source_length, target_length=target_length
    )


def prefetch(
    batches: PackedRows, start: int, stop: int, *, rows: Rows = ALL, workers: int = 0
) -> Generator[tuple[int, dict[str, np.ndarray]], None, None]:
    """Yields (step, batch) for the steps [start, stop), prepared in the background.

    Close the iterator (`contextlib.closing`) when leaving early: that ends thread and processes.

    Args:
      batches: where the batches come from.
      start: the first step.
      stop: the step after the last.
      rows: which rows of each global batch.
      workers: processes that prepare batches; 0: one thread of this process.

    Raises:
      Exception: whatever went wrong in the background, when the turn of its batch comes.
    """
    executor: Executor
    if workers:
        # Spawned: a fork would copy the locks of the threads that JAX runs.
        spawn = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(workers, spawn, _adopt, (batches,))
        prepare: Callable[[int, Rows], dict[str, np.ndarray]] = _adopted_batch_at
    else:
        # One thread: preparing a batch holds the interpreter, so that two would take turns.
        executor, prepare = ThreadPoolExecutor(1, "batches"), batches.batch_at
    ready = READY + workers
    try:
        first = range(start, min(start + ready, stop))
        ahead = collections.deque(executor.submit(prepare, step, rows) for step in first)
        for step in range(start, stop):
            if step + ready < stop:
                ahead.append(executor.submit(prepare, step + ready, rows))
            yield step, ahead.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


_adopted: PackedRows  # in a worker process: what it makes batches from, sent once


def _adopt(batches: PackedRows) -> None:
    """Begins a worker process: it leaves Ctrl-C to its parent, and ends when the parent is gone."""
    global _adopted
    _adopted = batches
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _adopted_batch_at(step: int, rows: Rows) -> dict[str, np.ndarray]:
    return _adopted.batch_at(step, rows)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
    os._exit(0)


class _Side:
    """Where the tokens of one side go: sentence by sentence, with a place for BOS or EOS each."""

    def __init__(self, pairs_B: np.ndarray, sentences: Sequence[np.ndarray], length: int):
        self._shape = (len(pairs_B), length)
        sizes = np.array([len(sentence) + 1 for sentence in sentences], np.int64)
        self._tokens = np.concatenate([*sentences, np.empty(0, np.int32)])
        ends = np.cumsum(sizes)
        first_pair_B = np.cumsum(pairs_B) - pairs_B
        # Tokens count from the beginning of all rows' tokens; places from the beginning of a row.
        starts = np.concatenate([[0], ends])
        shift_B = np.arange(len(pairs_B)) * length - starts[first_pair_B]
        count = int(starts[-1])
        self._positions = np.arange(count) - np.repeat(ends - sizes, sizes)
        self._places = np.arange(count) + np.repeat(np.repeat(shift_B, pairs_B), sizes)
        segments = np.arange(len(sizes)) - np.repeat(first_pair_B, pairs_B) + 1
        self._segments = np.repeat(segments, sizes)
        self._last = np.zeros(count, bool)
        self._last[ends - 1] = True

    def ending_with(self, token: int) -> np.ndarray:
        return self._around(token, self._last)

    def beginning_with(self, token: int) -> np.ndarray:
        return self._around(token, self._positions == 0)

    def positions(self) -> np.ndarray:
        return self._put(self._positions)

    def segments(self) -> np.ndarray:
        return self._put(self._segments)

    def _around(self, token: int, extra: np.ndarray) -> np.ndarray:
        values = np.full(len(extra), token, np.int32)
        values[~extra] = self._tokens
        return self._put(values)

    def _put(self, values: np.ndarray) -> np.ndarray:
        rows = np.zeros(self._shape, np.int32)
        rows.reshape(-1)[self._places] = values
        return rows


@lru_cache(maxsize=4)  # a batch touches one epoch, or two; the threads share them
def _shuffled(stream: str, epoch: int, rows: int) -> np.ndarray:
    return random_order(rows, _key(stream, epoch))


def _digest(*parts: str | int) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _key(stream: str, part: str | int) -> int:
    """A 128-bit key of the random generator."""
    return int(_digest(stream, part)[:32], 16)


def _nothing_fits(lengths_N2: np.ndarray, capacity: tuple[int, int], max_tokens: int) -> str:
    if not len(lengths_N2):
        return "The data holds no sentence pairs; check config.data and its split names."
    S, T = capacity
    source, target = lengths_N2[np.argmin(lengths_N2.max(axis=1))].tolist()
    longest_source, longest_target = lengths_N2.max(axis=0).tolist()
    if max_tokens and source < S and target < T:
        cure = f"raise config.data.max_tokens={max_tokens}, or set it to 0"
    else:
        cure = "raise config.data.source_length or config.data.target_length"
    return (
        f"None of the {len(lengths_N2)} sentence pairs fits a row of {S} source and {T} target "
        f"positions: even the shortest has {source} source and {target} target tokens, and each "
        f"sentence takes one position more (the longest: {longest_source} and {longest_target}); "
        f"{cure}."
    )
