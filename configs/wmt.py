"""The paper's own models (Vaswani et al. 2017, tables 2 and 3) on the text of the WMT tasks.

base, big: Chinese to English (WMT19). base_de_en, big_de_en: the German-English text of WMT14, from
English into German, as in the paper. TensorFlow Datasets brings the text, from the network; to
unpack it once it asks for `pip install tensorflow-cpu`, to read it for nothing.
"""

import ml_collections

from jaxformer.config import choose, default

# The other fields of `default()` are the base model and its recipe already. Checkpoints come as
# often as the paper's (every 10 minutes of its machine), and as many stay as it averages.
SIZES = {
    "base": {
        "model": {"d_model": 512, "num_heads": 8, "d_ff": 2048, "dropout": 0.1},
        "train": {"steps": 100_000, "checkpoint_every": 1500, "keep_checkpoints": 5},
    },
    "big": {
        "model": {"d_model": 1024, "num_heads": 16, "d_ff": 4096, "dropout": 0.3},
        "train": {"steps": 300_000, "checkpoint_every": 600, "keep_checkpoints": 20},
    },
}

TEXTS = {
    # WMT19 has no test split here: its validation split is kept for the end.
    "zh_en": {
        "name": "wmt19_translate/zh-en",
        "source": "zh",
        "target": "en",
        "train": "train[4000:]",
        "valid": "train[:4000]",
        "test": "validation",
    },
    "de_en": {
        "name": "wmt14_translate/de-en",
        "source": "en",
        "target": "de",
        "train": "train",
        "valid": "validation",
        "test": "test",
    },
}

PRESETS = {
    "base": ("base", "zh_en"),
    "big": ("big", "zh_en"),
    "base_de_en": ("base", "de_en"),
    "big_de_en": ("big", "de_en"),
}


def get_config(preset: str = "base") -> ml_collections.ConfigDict:
    """The config of a preset."""
    size, text = choose(preset, PRESETS)
    c = default()
    c.data.update(TEXTS[text])
    c.data.vocab_size = 37_000
    c.data.target_length = 256
    c.data.tokens_per_batch = 96 * 256  # about 25,000, in rows that 2 to 32 devices can share
    c.model.update(SIZES[size]["model"])
    c.train.update(SIZES[size]["train"])
    return c
