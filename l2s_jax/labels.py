"""Responses that the LLM gives to the train split, kept on disk: sequence-level distillation.

They are written in files of `SHARD` examples, each of which appears whole or not at all, so that
an interrupted run continues with the first that is missing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence

from l2s_jax.data.tasks import Example
from l2s_jax.generate import Generator

log = logging.getLogger(__name__)

SHARD = 2048


def label(
    examples: Sequence[Example], make_generator: Callable[[], Generator], directory: str
) -> list[Example]:
    """`examples` with responses by the generator, which is made only if some are missing."""
    labelled: list[Example] = []
    generator = None
    for number, start in enumerate(range(0, len(examples), SHARD)):
        shard = list(examples[start : start + SHARD])
        path = os.path.join(directory, f"train-{number:05d}.jsonl")
        if not os.path.exists(path):
            if generator is None:
                log.info("labels: the LLM answers %d prompts", len(examples) - start)
                generator = make_generator()
            outputs = generator.generate([e.prompt for e in shard], description=f"labels {number}")
            with open(f"{path}.tmp", "w", encoding="utf-8") as file:
                for output in outputs:
                    file.write(json.dumps({"response": output.text}, ensure_ascii=False) + "\n")
            os.replace(f"{path}.tmp", path)
        responses = _read(path, len(shard))
        labelled += [
            Example(e.prompt, response, (response,))
            for e, response in zip(shard, responses, strict=True)
        ]
    return labelled


def _read(path: str, count: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        responses = [json.loads(line)["response"] for line in file]
    if len(responses) != count:
        raise ValueError(f"{path}: {len(responses)} labels, expected {count}: remove the file")
    return responses
