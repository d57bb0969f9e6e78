"""Text to ids and back: SentencePiece, tokenizer.json, and what they share.

Imports no other room.
"""

from l2s_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
