"""A toy task and small random checkpoints: something to go through, with nothing downloaded."""

from __future__ import annotations

import json
import os
import random

import jax

from l2s_jax.checkpoints import pretrained
from l2s_jax.config import model_config
from l2s_jax.models.families import make_config
from l2s_jax.models.systems import LanguageModel
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece

_WORDS = ("one", "two", "three", "four", "five", "red", "green", "blue", "small", "large", "old")
_SIZES = {"train": 512, "validation": 32, "test": 32}


def write_task(directory: str, *, seed: int = 0) -> str:
    """Writes train, validation and test.jsonl with a field `text`; gives `directory`."""
    rng = random.Random(seed)
    os.makedirs(directory, exist_ok=True)
    for split, size in _SIZES.items():
        with open(os.path.join(directory, f"{split}.jsonl"), "w", encoding="utf-8") as file:
            for _ in range(size):
                text = " ".join(rng.choices(_WORDS, k=rng.randint(2, 8)))
                file.write(json.dumps({"text": text}) + "\n")
    return directory


def write_checkpoint(directory: str, *, family: str, texts: str, seed: int = 0) -> str:
    """Writes a random model of a family as a Hugging Face directory, with a tokenizer of its own.

    The tokenizer is trained on the train split that `write_task` wrote to `texts`. The large model
    that "t5" gives is twice as wide and deep as the others. Gives `directory`.
    """
    with open(os.path.join(texts, "train.jsonl"), encoding="utf-8") as file:
        lines = [f"repeat: {json.loads(line)['text']}" for line in file]
    scale = 2 if family == "t5" else 1
    tokenizer = train_sentencepiece(
        lines, vocab_size=40 + 8 * scale, directory=directory, model_type="bpe", seed=seed
    )
    geometry = model_config(family).to_dict()
    geometry |= {"width": 32 * scale, "num_heads": 4, "feed_forward_width": 64 * scale}
    geometry |= {name: scale for name in geometry if name.endswith("_layers")}
    if "head_width" in geometry:
        geometry["head_width"] = 8 * scale
    if "num_kv_heads" in geometry:
        geometry["num_kv_heads"] = 2
    config = make_config(
        geometry.pop("family"),
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        eos_id=tokenizer.eos_id,
        **geometry,
    )
    params = jax.jit(LanguageModel("slm", config).init)(jax.random.key(seed))["slm"]
    pretrained.save_hf(config, params, directory)
    return directory
