"""Checkpoints of published geometries; with random weights they are as fast as real ones."""

from __future__ import annotations

import json
import os

import jax

from l2s_jax import convert
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel


def write_random(name: str, directory: str) -> None:
    """A checkpoint in Hugging Face's format, float32, with a tokenizer of made-up pieces.

    Raises:
      ValueError: there is no geometry of that name.
    """
    if name not in GEOMETRIES:
        raise ValueError(
            f"{name!r}: neither a folder nor a geometry, expected one of {', '.join(GEOMETRIES)}"
        )
    config = GEOMETRIES[name]
    system = LanguageModel("llm", config)
    os.makedirs(directory)
    convert.save_hf(config, jax.jit(system.init)(jax.random.key(0))["llm"], directory)
    _write_pieces(config.vocab_size, directory)


def _write_pieces(vocab_size: int, directory: str) -> None:
    """What converters of other libraries want to see: one piece per id."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*special, *(f"\N{LOWER ONE EIGHTH BLOCK}{i}" for i in range(3, vocab_size))]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": piece,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, piece in enumerate(special)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
        "model": {
            "type": "WordLevel",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "unk_token": "<unk>",
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as file:
            json.dump(value, file, ensure_ascii=False)
