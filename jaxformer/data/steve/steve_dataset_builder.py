"""The tfds builder `steve`: Chinese-English sentences of a small grammar of our own."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from jaxformer.data.steve.grammar import Sentence
from jaxformer.data.steve.sampling import splits

_DESCRIPTION = (
    "Chinese-English sentence pairs drawn from a small bilingual grammar, with gold word "
    "segmentation and word alignment. Validation and test hold compositions (subject, predicate, "
    "complement) that are never seen in training."
)


class Builder(tfds.core.GeneratorBasedBuilder):
    """`史蒂夫建造房子` is `Steve builds a house`: parallel text that a laptop can learn.

    Every sentence has a composition: the Chinese heads of its subject, its predicate and its
    complement, such as (史蒂夫, 建造, 房子). The SHA-256 of salt and composition, modulo 100,
    decides the split for all sentences of that composition: below 5 test, below 10 validation,
    else training. So no held-out composition is seen in training, in any tense, mood or place,
    while each of its words is. The salt is chosen so that (史蒂夫, 建造, 房子) falls into test
    and every domain into all splits.

    The English is a function of the Chinese: a perfect translation scores BLEU 100.

    Written and read without TensorFlow:

        builder = Builder(data_dir=...)
        builder.download_and_prepare()
        source = builder.as_data_source("train")

    An example holds `zh`, `en`, `domain` (bytes), `zh_words`, `en_words` (lists of bytes) and
    `alignment` (int32 [n, 2]: Chinese word index, English word index).
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (tfds reads it from the class)

    # Left to itself, tfds 4.9.10 looks for this with importlib_resources, which it needs on every
    # Python but declares as a dependency only below 3.9.
    code_path = epath.Path(__file__)

    def __init__(self, *, file_format: str = "array_record", **kwargs: Any) -> None:
        # The default of tfds, tfrecord, has no random access and so makes no data source.
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            description=_DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "zh": text(),
                    "en": text(),
                    "domain": text(),
                    "zh_words": tfds.features.Sequence(text()),
                    "en_words": tfds.features.Sequence(text()),
                    "alignment": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
                }
            ),
            supervised_keys=("zh", "en"),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download: the grammar is in this package
        return {name: self._generate_examples(sentences) for name, sentences in splits().items()}

    def _generate_examples(
        self, sentences: Iterable[Sentence]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        for key, sentence in enumerate(sentences):
            yield key, as_example(sentence)


def as_example(sentence: Sentence) -> dict[str, Any]:
    """A sentence as the features of the dataset."""
    return {
        "zh": sentence.zh,
        "en": sentence.en,
        "domain": sentence.domain,
        "zh_words": list(sentence.zh_words),
        "en_words": list(sentence.en_words),
        "alignment": np.array(sentence.alignment, np.int32),
    }
