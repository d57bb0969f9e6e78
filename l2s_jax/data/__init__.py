"""Data: sources (files, TFDS) -> tasks (prompt templates) -> token ids -> batches (Grain)."""
