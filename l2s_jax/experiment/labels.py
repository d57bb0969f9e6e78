"""Responses that the LLM gives to the train split, kept on disk: sequence-level distillation.

They are written in files of `SHARD` examples, each of which appears whole or not at all, so that
an interrupted run continues with the first that is missing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence

from l2s_jax.cluster import distributed
from l2s_jax.data.tasks import Example
from l2s_jax.files import write_json_lines
from l2s_jax.serving.generator import Generator, Output

log = logging.getLogger(__name__)

SHARD = 2048


def label(
    examples: Sequence[Example],
    make_generator: Callable[[], Generator],
    directory: str,
    *,
    process_index: int = 0,
    process_count: int = 1,
    together: bool = False,
) -> list[Example]:
    """`examples` with responses by the generator, which is made only if some are missing.

    Of several processes, which share `directory`, each answers every process_count-th file and
    waits for the others. `together`: their generators are one, so all of them answer every file,
    and process 0 writes.

    Raises:
      ValueError: a file holds another number of labels than it should.
    """
    paths = [
        os.path.join(directory, f"train-{number:05d}.jsonl")
        for number in range(-(-len(examples) // SHARD))
    ]

    def missing() -> list[int]:
        return [number for number, path in enumerate(paths) if not os.path.exists(path)]

    if together:
        own = distributed.on_primary(missing)
    else:
        own = [number for number in missing() if number % process_count == process_index]
    if own:
        log.info("labels: the LLM answers %d of %d files of prompts", len(own), len(paths))
        generator = make_generator()
        for number in own:
            indices = range(number * SHARD, min((number + 1) * SHARD, len(examples)))
            prompts = [examples[i].prompt for i in indices]
            outputs = generator.generate(prompts, description=f"labels {number}")
            if not together or process_index == 0:
                _write(paths[number], outputs)
    if process_count > 1:
        distributed.barrier("labels")
    responses = [
        response
        for number, path in enumerate(paths)
        for response in _read(path, min(SHARD, len(examples) - number * SHARD))
    ]
    return [
        Example(example.prompt, response, (response,))
        for example, response in zip(examples, responses, strict=True)
    ]


def _write(path: str, outputs: Sequence[Output]) -> None:
    write_json_lines(path, ({"response": output.text} for output in outputs))


def _read(path: str, count: int) -> list[str]:
    with open(path, encoding="utf-8") as file:
        responses = [json.loads(line)["response"] for line in file]
    if len(responses) != count:
        raise ValueError(f"{path}: {len(responses)} labels, expected {count}: remove the file")
    return responses
