"""Models of published geometries with random weights: they are as fast as real ones."""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax.checkpoints import pretrained
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel


def write_random(name: str, directory: str, *, weights: bool = True) -> None:
    """A folder in Hugging Face's format, with a tokenizer of made-up pieces.

    Its weights are float32. Without them the folder says what the model is, and who reads it makes
    weights of its own where it needs them: a large model's take minutes to write and to read.

    Raises:
      ValueError: there is no geometry of that name.
    """
    if name not in GEOMETRIES:
        raise ValueError(
            f"{name!r}: neither a folder nor a geometry, expected one of {', '.join(GEOMETRIES)}"
        )
    config = GEOMETRIES[name]
    os.makedirs(directory)
    if weights:
        system = LanguageModel("llm", config)
        pretrained.save_hf(config, jax.jit(system.init)(jax.random.key(0))["llm"], directory)
    else:
        with open(os.path.join(directory, "config.json"), "w", encoding="utf-8") as file:
            json.dump(pretrained.family_of(config).config_to_hf(config), file)
    _write_pieces(config.vocab_size, directory)


def random_like(shapes: Any) -> Any:
    """Small random numbers for a tree of shapes and dtypes, made where they are to be.

    An array is made at a time, by one program for all of its shape, so that no more memory is
    taken than the tree needs.
    """
    made: dict[Any, Any] = {}

    def random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kind = (leaf.shape, leaf.dtype)
        if kind not in made:
            made[kind] = jax.jit(lambda key, kind=kind: _random(key, *kind))
        key = jax.random.key(len(made))
        return jax.block_until_ready(made[kind](key))

    return jax.tree.map(random, shapes)


def _random(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(key, shape, -127, 128).astype(dtype)
    return (0.02 * jax.random.normal(key, shape)).astype(dtype)


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
        "pre_tokenizer": {"type": "WhitespaceSplit"},
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
