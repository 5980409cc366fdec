"""Token ids of a split."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np


class TokenPairs:
    def __init__(self, sources, targets, fingerprint):
        self._s = [np.asarray(x, np.int32) for x in sources]
        self._t = [np.asarray(x, np.int32) for x in targets]
        self.lengths_N2 = np.array(
            [[len(a), len(b)] for a, b in zip(self._s, self._t, strict=True)], np.int32
        ).reshape(-1, 2)
        self.fingerprint = fingerprint

    @classmethod
    def of(cls, sources, targets):
        return cls(sources, targets, hashlib.sha256(repr((sources, targets)).encode()).hexdigest())

    def __len__(self):
        return len(self._s)

    def source(self, i):
        return self._s[i]

    def target(self, i):
        return self._t[i]


def tokenize(text, tokenizer, cache_dir: Path | None):
    pairs = list(text)
    return TokenPairs(
        tokenizer.encode([p.source for p in pairs]),
        tokenizer.encode([p.target for p in pairs]),
        hashlib.sha256((text.fingerprint + tokenizer.fingerprint).encode()).hexdigest(),
    )
