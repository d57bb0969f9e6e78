"""A tiny task and config, so that tests can run the whole main job in seconds."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from unittest import mock

from absl.flags import FLAGS

from l2s_jax import main

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]

CONFIG = """
from ml_collections import ConfigDict

from l2s_jax.config import default


def get_config():
    config = default()
    config.task.name = "reverse"
    config.task.source = "jsonl"
    config.task.data_dir = "{data_dir}"
    config.task.splits = ConfigDict(
        {{"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}}
    )
    config.task.prompt = "reverse: {{words}}"
    config.task.response = "reversed"
    config.tokenizer.train_vocab_size = 30
    config.max_prompt_tokens = 32
    config.max_response_tokens = 32
    config.buckets = ((32, 32),)
    config.decoding.max_new_tokens = 8
    config.decoding.batch_size = 8
    config.evaluation.latency.update(
        batch_size=1, prompt_tokens=8, new_tokens=8, repeats=2
    )
    for section in (config.llm, config.slm):
        section.model.update(
            width=16, num_heads=2, head_width=8, feed_forward_width=32,
            num_encoder_layers=1, num_decoder_layers=1,
        )
    for section in (config.llm, config.slm, config.l2s):
        section.train.update(steps=4, batch_size=8, evaluate_every=2, log_every=1)
    return config
"""


def write_task(directory: Path) -> Path:
    """Writes the task's data and its config; gives the config's path."""
    rng = random.Random(0)
    directory.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 64), ("validation", 8), ("test", 11)):
        with open(directory / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(count):
                words = rng.choices(WORDS, k=rng.randint(1, 6))
                record = {"words": " ".join(words), "reversed": " ".join(reversed(words))}
                file.write(json.dumps(record) + "\n")
    config = directory / "tiny.py"
    config.write_text(CONFIG.format(data_dir=directory), encoding="utf-8")
    return config


def run(*arguments: str) -> int:
    """The command in this process; its exit status."""
    FLAGS.unparse_flags()
    for name in [name for name in FLAGS if name.startswith("config.")]:
        delattr(FLAGS, name)
    command = ["l2s_jax.main", *arguments]
    # ml_collections looks for overrides in sys.argv, whatever it is asked to parse.
    with mock.patch.object(sys, "argv", command):
        return main.main(command)
