"""A task of random sentences, for benchmarks that train an LLM on it by the command."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

_WORDS = 8  # of a sentence
_CONFIG = """
from l2s_jax.config import default


def get_config():
    config = default()
    config.task.update(name="sentences", source="jsonl", data_dir={folder!r})
    config.task.splits.update(train="train.jsonl", validation="some.jsonl", test="some.jsonl")
    config.task.update(prompt="{{question}}", response="answer")
    config.tokenizer.train_vocab_size = 2000
    config.max_prompt_tokens = config.max_response_tokens = 48
    config.buckets = ((48, 48),)
    config.llm.model.update(**{model})
    config.llm.train.update(**{train})
    return config
"""


def write_task(
    folder: str, rows: int, *, model: Mapping[str, int], train: Mapping[str, int]
) -> str:
    """The splits, `rows` to train with and a few for the others, and a config; gives its path.

    `model` and `train` are settings of `config.llm`.
    """
    letters, chance = "abcdefghijklmnopqrstuvwxyz", random.Random(0)
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(20000)]
    for name, number in (("train", rows), ("some", 32)):
        with open(os.path.join(folder, f"{name}.jsonl"), "w", encoding="utf-8") as file:
            for _ in range(number):
                question, answer = (" ".join(chance.choices(words, k=_WORDS)) for _ in range(2))
                file.write(f'{{"question": "{question}", "answer": "{answer}"}}\n')
    config = os.path.join(folder, "sentences.py")
    with open(config, "w", encoding="utf-8") as file:
        file.write(_CONFIG.format(folder=folder, model=dict(model), train=dict(train)))
    return config
