"""Parallel text: builders, tokenizer, packing and batches."""
