"""Real Chinese-English text of four domains, read out of ordinary packages.

laptop: twelve minutes on two cores; full: an hour and a quarter on two cores.
"""

import ml_collections

from jaxformer.config import choose, default

PRESETS = {
    # Little more than one pass over the text: there is nothing to overfit, so no dropout.
    "laptop": {"steps": 1300, "dropout": 0.0},
    "full": {"steps": 8000, "dropout": 0.1},
}


def get_config(preset: str = "laptop") -> ml_collections.ConfigDict:
    """The config of a preset."""
    chosen = choose(preset, PRESETS)
    c = default()
    c.data.name = "zh_en"
    c.data.vocab_size = 8000
    c.data.target_length = 128
    c.data.tokens_per_batch = 2048
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
        learning_rate=2e-3,
        warmup_steps=200,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    c.train.update(steps=chosen["steps"], eval_every=500, checkpoint_every=100)
    return c
