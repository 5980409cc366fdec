"""The small bilingual grammar behind the `steve` dataset, and its tfds builder."""
