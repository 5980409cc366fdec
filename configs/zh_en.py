"""Real Chinese-English text of four domains, read out of ordinary packages.

laptop: ten minutes on two cores; full: an hour and a half on two cores.
"""

import ml_collections

from jaxformer.config import choose, default

PRESETS = {
    # Little more than one pass over the text: nothing to overfit, so no dropout, and many small
    # steps go further than few large ones.
    "laptop": {"steps": 2200, "batch": 1024, "learning_rate": 1.2e-3, "dropout": 0.0},
    "full": {"steps": 8000, "batch": 2048, "learning_rate": 2e-3, "dropout": 0.1},
}


def get_config(preset: str = "laptop") -> ml_collections.ConfigDict:
    """The config of a preset."""
    chosen = choose(preset, PRESETS)
    c = default()
    c.data.name = "zh_en"
    c.data.vocab_size = 8000
    c.data.target_length = 128
    c.data.tokens_per_batch = chosen["batch"]
    c.model.update(
        d_model=256,
        num_heads=4,
        d_ff=1024,
        encoder_layers=3,
        decoder_layers=3,
        norm="rms",
        norm_position="pre",
        positions="rotary",
        bias=False,
        dropout=chosen["dropout"],
    )
    c.optimizer.update(
        name="adamw",
        schedule="cosine",
        learning_rate=chosen["learning_rate"],
        warmup_steps=200,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    c.train.update(steps=chosen["steps"], eval_every=500, checkpoint_every=500)
    return c
