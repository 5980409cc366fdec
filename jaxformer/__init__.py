"""jaxformer: the Transformer of "Attention is all you need" in JAX/Flax."""
