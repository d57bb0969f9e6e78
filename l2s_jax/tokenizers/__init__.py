"""Text to ids and back: SentencePiece, tokenizer.json, and what they share.

Imports no other room.
"""

from l2s_jax.tokenizers.tokenizer import Tokenizer, for_chat, load_tokenizer

__all__ = ["Tokenizer", "for_chat", "load_tokenizer"]
