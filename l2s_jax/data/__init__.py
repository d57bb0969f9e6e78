"""Data: sources (files, TFDS) -> tasks (prompt templates) -> batches (Grain)."""
