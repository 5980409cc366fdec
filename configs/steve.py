"""A grammar of its own: sentences like 史蒂夫建造房子, learned in three minutes without a network.

Made to be looked into: pieces that are mostly words or letters, an encoder that mixes words only
once, and attention dropout, which leaves no head alone, give cross-attention that is a good word
alignment (`jaxformer explain --alignments`).
"""

import ml_collections

from jaxformer.config import default


def get_config() -> ml_collections.ConfigDict:
    """A small model of today's form; reaches BLEU 99 on compositions it has never seen."""
    c = default()
    c.data.name = "steve"
    c.data.vocab_size = 540
    c.data.target_length = 64
    c.data.tokens_per_batch = 2048
    c.model.update(
        d_model=128,
        num_heads=4,
        d_ff=512,
        encoder_layers=1,
        decoder_layers=2,
        norm="rms",
        norm_position="pre",
        positions="rotary",
        bias=False,
        dropout=0.1,
        attention_dropout=0.1,
    )
    c.optimizer.update(
        name="adamw",
        schedule="cosine",
        learning_rate=2e-3,
        warmup_steps=100,
        weight_decay=0.01,
        clip_norm=1.0,
    )
    c.train.update(steps=800, eval_every=100, checkpoint_every=400)
    c.decode.max_length = 64
    return c
