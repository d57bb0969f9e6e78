"""Sources (files, TFDS) -> tasks (templates) -> examples (token ids) -> batches (Grain).

Imports tokenizers.
"""
