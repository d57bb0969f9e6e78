"""Published geometries; checkpoints of them with random weights are as fast as real ones.

Sources: the config.json files of the models of the same names on huggingface.co.
"""

from __future__ import annotations

import json
import os

import jax

from l2s_jax import convert
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel
from l2s_jax.models.t5 import T5Config

_FLAN = {"activation": "gated_gelu", "tied_head": False}


def _t5(width: int, heads: int, hidden: int, layers: int, **others: object) -> T5Config:
    return T5Config(
        width=width,
        num_heads=heads,
        head_width=64,
        feed_forward_width=hidden,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        **others,
    )


GEOMETRIES: dict[str, ModelConfig] = {
    "tiny": _t5(64, 2, 128, 2),
    "t5-small": _t5(512, 8, 2048, 6),
    "t5-base": _t5(768, 12, 3072, 12),
    "t5-large": _t5(1024, 16, 4096, 24),
    "flan-t5-small": _t5(512, 6, 1024, 8, **_FLAN),
    "flan-t5-base": _t5(768, 12, 2048, 12, **_FLAN),
    "flan-t5-large": _t5(1024, 16, 2816, 24, **_FLAN),
    "flan-t5-xl": _t5(2048, 32, 5120, 24, **_FLAN),
    "gpt2": GPT2Config(),
    "pythia-160m": GPTNeoXConfig(
        vocab_size=50304,
        width=768,
        num_heads=12,
        feed_forward_width=3072,
        num_layers=12,
        rotary=Rotary(16),
    ),
    "qwen3-0.6b": LlamaConfig(
        vocab_size=151936,
        width=1024,
        num_heads=16,
        num_kv_heads=8,
        head_width=128,
        feed_forward_width=3072,
        num_layers=28,
        rotary=Rotary(128, 1e6),
        query_key_norm=True,
        tied_head=True,
    ),
}


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
