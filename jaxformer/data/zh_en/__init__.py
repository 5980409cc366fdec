"""Chinese-English text that ordinary packages carry, as a tfds dataset: see `docs/data.md`."""

from jaxformer.data.zh_en.collect import SourcesUnavailable
from jaxformer.data.zh_en.split import Pair, contamination
from jaxformer.data.zh_en.zh_en_dataset_builder import Builder

__all__ = ["Builder", "Pair", "SourcesUnavailable", "contamination"]
