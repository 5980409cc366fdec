"""The tfds builder of `zh_en`; it needs no TensorFlow to be built or read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from jaxformer.data.zh_en import sources
from jaxformer.data.zh_en.collect import collect
from jaxformer.data.zh_en.split import Pair, split


class Builder(tfds.core.GeneratorBasedBuilder):
    """Chinese-English pairs of four domains: hsk, bible, cdda, lohelp.

    `info.metadata` records which sources the build really had, with counts and hashes:
    "sources", "missing" and "warnings" as `collect` gives them, plus "splits": the pairs of each
    domain in each split.
    """

    VERSION = tfds.core.Version("1.0.0")
    # Nothing comes by URL. tfds would look for a list of URLs beside this file, and to find the
    # file imports `importlib_resources`, which it does not declare as a dependency.
    url_infos: ClassVar[dict[str, Any]] = {}

    def __init__(self, **kwargs: Any):
        # Without a default of our own, tfds would write TFRecord files, which need TensorFlow.
        super().__init__(**{"file_format": "array_record", **kwargs})

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return tfds.core.DatasetInfo(
            builder=self,
            description="Chinese-English sentence pairs that ordinary packages carry.",
            features=tfds.features.FeaturesDict({"zh": text(), "en": text(), "domain": text()}),
            supervised_keys=("zh", "en"),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # a split's order is that of its sources
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
        cache = Path(dl_manager.download_dir) / self.name
        pairs, record = collect(sources.SOURCES, cache)
        parts = split(pairs, {source.domain: source.rule for source in sources.SOURCES})
        self.info.metadata.update(record, splits=_counts(parts))
        return {name: self._generate_examples(part) for name, part in parts.items()}

    def _generate_examples(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, dict[str, str]]]:
        for key, pair in enumerate(pairs):
            yield key, {"zh": pair.zh, "en": pair.en, "domain": pair.domain}


def _counts(parts: Mapping[str, Sequence[Pair]]) -> dict[str, dict[str, int]]:
    return {name: dict(Counter(pair.domain for pair in part)) for name, part in parts.items()}
