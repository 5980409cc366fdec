"""From a sentence to its translation."""
