"""A look inside: one translation, step by step, with the numbers of the production forward pass."""
