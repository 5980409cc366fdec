"""Real Chinese-English text of four domains, read out of ordinary packages."""

import ml_collections

from jaxformer.config import default


def get_config(preset: str = "laptop") -> ml_collections.ConfigDict:
    c = default()
    c.data.name = "zh_en"
    c.data.vocab_size = 8000
    c.data.target_length = 128
    c.data.tokens_per_batch = 4096
    c.model.update(d_model=256, num_heads=4, d_ff=1024, encoder_layers=3, decoder_layers=3, norm="rms", norm_position="pre", positions="rotary", bias=False, dropout=0.1)
    c.optimizer.update(name="adamw", schedule="cosine", learning_rate=2e-3, warmup_steps=100, beta2=0.98, epsilon=1e-9, weight_decay=0.01, clip_norm=1.0)
    c.train.update(steps=600, eval_every=150, checkpoint_every=300)
    return c
