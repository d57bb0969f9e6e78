"""Responses that the LLM gives to prompts, in JSON Lines files: sequence-level distillation."""

from __future__ import annotations

import collections
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.data.table import Example, ExampleTable
from l2s_jax.experiment import shards
from l2s_jax.files import json_object, matching_names, read_bytes, write_json_lines
from l2s_jax.sealed import with_hash, without_hash

log = logging.getLogger(__name__)

SHARD = 2048
_AGAIN = "remove the file, and the same command makes it again"


class Label(NamedTuple):
    """What the LLM said, and whether it was stopped before its end."""

    response: str
    cut: bool


class LabelFiles:
    """SPLIT-NUMBER.jsonl, with the hash of a prompt and its response in each line.

    Lines of version 0.1 do not say whether the LLM was stopped: these count as whole.
    """

    def __init__(self, directory: str, split: str = "train"):
        self._directory, self._split = directory, split

    def files(self) -> list[str]:
        """Paths of the files that are there, oldest first."""
        return matching_names(self._directory, f"{self._split}-*.jsonl")

    def keys(self, files: Sequence[str]) -> set[str]:
        """Keys of all labels in some files."""
        return set(self.read(files))

    def missing(self, files: Sequence[str], keys: Sequence[str]) -> list[int]:
        """Where `keys` has one that is in none of the files, each key once."""
        there = self.keys(files)
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        return sorted(place for key, place in first.items() if key not in there)

    def read(self, files: Sequence[str]) -> dict[str, Label]:
        """Labels by key.

        Raises:
          ValueError: a line that is no label.
        """
        labels = {}
        for path in files:
            for number, record in enumerate(_records(path), 1):
                key, response, cut = (record.get(n) for n in ("prompt", "response", "cut"))
                if not (isinstance(key, str) and isinstance(response, str)):
                    raise ValueError(
                        f"{path}:{number}: no label; expected the keys 'prompt' and 'response': "
                        f"{_AGAIN}"
                    )
                labels[key] = Label(response, cut is True)
        return labels

    def write(self, number: int, keys: Sequence[str], values: Sequence[Label]) -> None:
        """Adds a file."""
        path = os.path.join(self._directory, f"{self._split}-{number:05d}.jsonl")
        records = (
            with_hash({"prompt": key, "response": response, **({"cut": True} if cut else {})})
            for key, (response, cut) in zip(keys, values, strict=True)
        )
        write_json_lines(path, records)

    def count(self) -> int:
        """Lines of all files, with keys or without."""
        return sum(len(_records(path)) for path in self.files())

    def give_keys(self, keys: Sequence[str]) -> None:
        """Rewrites files that hold labels by their places in the split, as version 0.1 wrote them.

        Raises:
          ValueError: they hold more labels than there are keys.
        """
        start = 0
        for number, path in enumerate(self.files()):
            records = _records(path)
            own = keys[start : start + len(records)]
            if len(own) < len(records):
                raise ValueError(
                    f"{path}: labels of more than the {len(keys)} prompts of the train split; "
                    "expected the data that they were made of"
                )
            self.write(number, own, [Label(r.get("response", ""), False) for r in records])
            start += len(records)


def keys_of(prompts: Sequence[str], *, sampled: bool) -> list[str]:
    """What labels are kept by: a hash of the prompt, and which of its likes it is if sampled."""
    seen: collections.Counter[str] = collections.Counter()
    keys = []
    for prompt in prompts:
        key = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:32]
        if sampled and seen[key]:
            keys.append(f"{key}-{seen[key]}")
        else:
            keys.append(key)
        seen[key] += 1
    return keys


def seed_of(seed: int, place: int) -> int:
    """The seed of the label of the example at `place` in the split: 32 bits."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


def label(
    examples: Sequence[Example],
    make_generator: Callable[[], Any],
    directory: str,
    *,
    split: str = "train",
    seed: int | None = None,
    together: bool = False,
) -> Sequence[Example]:
    """`examples` with responses by the generator, which is made only if some are missing.

    Args:
      examples: of the split, or its first ones.
      make_generator: gives what answers, a `Generator` or a `Refilled` one.
      directory: where labels are, and will be.
      split: whose labels they are; each has files of its own.
      seed: of labels that are sampled, each by this and its place; None: they are not.
      together: the processes of a job are one generator, and answer every batch together; else
        each answers batches of its own.

    Raises:
      ValueError: a file holds no labels.
    """
    prompts = [example.prompt for example in examples]
    keys = keys_of(prompts, sampled=seed is not None)
    store = LabelFiles(directory, split)

    def make(places: list[int], part: shards.Part) -> Iterator[shards.Made]:
        settings: dict[str, Any] = {"description": f"labels of {split}", "part": part}
        if seed is not None:
            settings["seeds"] = [seed_of(seed, place) for place in places]
        for indices, outputs in make_generator().answered([prompts[i] for i in places], **settings):
            labels = [Label(output.text, output.cut) for output in outputs]
            yield [places[i] for i in indices], lambda labels=labels: labels

    def announce(missing: list[int]) -> None:
        log.info(
            "labels: the LLM answers %d of %d prompts of %s", len(missing), len(set(keys)), split
        )

    files = shards.fill(store, keys, make, size=SHARD, together=together, announce=announce)
    labels = store.read(files)

    def labelled() -> Iterator[Example]:
        for example, key in zip(examples, keys, strict=True):
            response, cut = labels[key]
            yield Example(example.prompt, response, (response,), cut)

    return ExampleTable(labelled())


def _records(path: str) -> list[dict[str, Any]]:
    """The objects in a file's lines, each once it is what it was when it was written."""
    records = []
    for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
        where = f"{path}:{number}"
        try:
            records.append(without_hash(json_object(line, where), where))
        except ValueError as error:
            raise ValueError(f"{error}; {_AGAIN}") from None
    return records
