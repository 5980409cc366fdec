"""Parallel text by name (temporary)."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from jaxformer.config import DataConfig


class Pair(NamedTuple):
    source: str
    target: str
    domain: str


class ParallelText:
    def __init__(self, pairs, fingerprint, name):
        self._pairs, self.fingerprint, self.name = pairs, fingerprint, name

    def __len__(self):
        return len(self._pairs)

    def __getitem__(self, i):
        return self._pairs[i]


def load(data: DataConfig, split: str) -> ParallelText:
    import importlib
    name = getattr(data, split)
    module = importlib.import_module(f"jaxformer.data.{data.name}.{data.name}_dataset_builder")
    builder = module.Builder(data_dir=data.data_dir)
    builder.download_and_prepare()
    pairs = [
        Pair(r[data.source].decode(), r[data.target].decode(), r["domain"].decode())
        for r in builder.as_data_source(name)
    ]
    return ParallelText(pairs, hashlib.sha256(repr(pairs).encode()).hexdigest(), data.name)
