"""A small parallel text in a file, and a run on it that takes seconds."""

import random
from pathlib import Path

import ml_collections

from configs import tsv

WORDS = {"我": "I", "你": "you", "看见": "see", "建造": "build", "房子": "house", "桥": "bridge"}


def write_text(folder: Path, lines: int = 300) -> None:
    """train.tsv, valid.tsv and test.tsv: random words, each translated by itself."""
    rng = random.Random(0)
    for name, count in (("train", lines), ("valid", 20), ("test", 20)):
        rows = [rng.choices(list(WORDS), k=rng.randint(1, 6)) for _ in range(count)]
        text = "".join("".join(r) + "\t" + " ".join(WORDS[w] for w in r) + "\n" for r in rows)
        (folder / f"{name}.tsv").write_text(text, encoding="utf-8")


def small(folder: Path, **changes) -> ml_collections.ConfigDict:
    """configs/tsv.py on the text in `folder`, made tiny; `changes` are section__name=value."""
    c = tsv.get_config()
    c.model.update(d_model=16, num_heads=2, d_ff=32, encoder_layers=1, decoder_layers=1)
    c.data.update(
        {split: str(folder / f"{split}.tsv") for split in ("train", "valid", "test")},
        data_dir=str(folder / "data"),
        vocab_size=300,
        target_length=16,
        tokens_per_batch=128,
    )
    c.optimizer.update(warmup_steps=5)
    c.train.update(steps=8, log_every=1, eval_every=4, checkpoint_every=4)
    c.decode.update(beam=1, max_length=16)
    for name, value in changes.items():
        *section, field = name.split("__")
        (c[section[0]] if section else c)[field] = value
    return c


def flags(c: ml_collections.ConfigDict) -> list[str]:
    """The same config as flags of `train.py --config=configs/tsv.py`."""
    original = tsv.get_config()
    return [
        f"--config.{section}.{field}={value}"
        for section, fields in c.items()
        if isinstance(fields, ml_collections.ConfigDict)
        for field, value in fields.items()
        if value != original[section][field]
    ]
