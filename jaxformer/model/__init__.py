"""The Transformer, as pure functions of (parameters, inputs, key).

Shapes stand in names: `x_BTD` is an array of B rows, T positions and D features. The letters,
once and for all:

  B  rows of a batch            H  attention heads         L  layers
  T  target length, or queries  G  heads of keys/values    V  vocabulary
  S  source length, or keys     R  query heads per G       N  beams
  D  width of the model         K  size of one head        F  width of the feed-forward layer

Modules are Flax NNX modules used as plain pytrees of parameters: build one, then `jax.jit`,
`jax.grad`, `jax.lax.scan` and `jax.tree.map` work on it directly.
"""

from jaxformer.model.transformer import (
    Transformer,
    decode,
    encode,
    forward,
    lens,
    logits,
    recorded,
)

__all__ = ["Transformer", "decode", "encode", "forward", "lens", "logits", "recorded"]
