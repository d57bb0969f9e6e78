"""Text to ids and back: SentencePiece, tokenizer.json, and what they share.

Imports no other room.
"""
