"""A sentence pair, and what any collection of them offers."""

from __future__ import annotations

import abc
from collections.abc import Iterator
from typing import NamedTuple


class Pair(NamedTuple):
    """One sentence in two languages, without surrounding white space."""

    source: str
    target: str
    domain: str


class ParallelText(abc.ABC):
    """Sentence pairs by index, read when asked for.

    Attributes:
      name: for people.
      fingerprint: hexadecimal; equal text has equal fingerprints.
    """

    name: str
    fingerprint: str

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Pair: ...

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))
