"""Text in, text out: the Generator, a trained L2S model on disk, prompts from a file.

Imports decoding, checkpoints, data, and what they stand on.
"""
