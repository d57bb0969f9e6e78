"""Responses that the LLM gives to prompts, in JSON Lines files: sequence-level distillation."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from l2s_jax.data.examples import key_array
from l2s_jax.data.ragged import Growing, GrowingRagged
from l2s_jax.data.table import Example, Indexed, chunks
from l2s_jax.data.tokens import AT_ONCE
from l2s_jax.experiment import shards
from l2s_jax.files import json_object, matching_names, read_bytes, write_json_lines
from l2s_jax.sealed import with_hash, without_hash

log = logging.getLogger(__name__)

SHARD = 2048
_PLAIN_KEY = re.compile("[0-9a-f]{32}")
_AGAIN = "remove the file, and the same command makes it again"


class Label(NamedTuple):
    """What the LLM said, and whether it was stopped before its end."""

    response: str
    cut: bool


class Keys(Indexed[str]):
    """What labels are kept by: a hash of the prompt, and which of its likes it is if sampled.

    Attributes:
      binary: the same in 16 bytes each, V16 [N].
    """

    def __init__(self, prompts: Iterable[str], *, sampled: bool):
        self._hashes = key_array(
            hashlib.sha256(prompt.encode(errors="surrogatepass")).digest()[:16]
            for prompt in prompts
        )
        self._numbers = _numbers(self._hashes) if sampled else None
        self.binary = self._hashes
        if self._numbers is not None and (repeated := np.flatnonzero(self._numbers)).size:
            self.binary = self._hashes.copy()
            self.binary[repeated] = key_array(_binary(self[i]) for i in repeated.tolist())

    def __len__(self) -> int:
        return len(self._hashes)

    def at(self, place: int) -> str:
        """A key as the lines of files have it."""
        number = 0 if self._numbers is None else self._numbers[place]
        return f"{self._hashes[place].tobytes().hex()}{f'-{number}' if number else ''}"


def _numbers(hashes: np.ndarray) -> np.ndarray:
    """How many equal ones come before each of `hashes`, V16 [N], int64 [N]."""
    halves = hashes.view(np.dtype(("<u8", 2)))
    order = np.lexsort(halves.T)  # which leaves equal ones in their order
    places = np.arange(len(hashes))
    is_first = np.ones(len(hashes), bool)
    is_first[1:] = (halves[order[1:]] != halves[order[:-1]]).any(-1)
    numbers = np.empty(len(hashes), np.int64)
    numbers[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return numbers


def _binary(key: str) -> bytes:
    """A key of a line in 16 bytes."""
    if _PLAIN_KEY.fullmatch(key):
        return bytes.fromhex(key)
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()[:16]


class LabelFiles:
    """SPLIT-NUMBER.jsonl, with the hash of a prompt and its response in each line.

    Lines of version 0.1 do not say whether the LLM was stopped: these count as whole.
    """

    def __init__(self, directory: str, split: str = "train"):
        self.directory, self._split = directory, split

    def files(self) -> list[str]:
        """Paths of the files that are there, oldest first."""
        return matching_names(self.directory, f"{self._split}-*.jsonl")

    def missing(self, files: Sequence[str], keys: Keys) -> np.ndarray:
        """Where `keys` has one that is in none of the files, each key once, int64."""
        # Imported here and below: where the LLM makes no labels, nobody waits for it.
        from l2s_jax.experiment.record_files import lacking

        return lacking(key_array(_binary(key) for key, _ in self.read(files)), keys.binary)

    def read(self, files: Sequence[str]) -> Iterator[tuple[str, Label]]:
        """Keys and labels, in the order of the lines; of one key the last label counts.

        Raises:
          ValueError: a line that is no label.
        """
        for path in files:
            for number, record in enumerate(_records(path), 1):
                key, response, cut = (record.get(n) for n in ("prompt", "response", "cut"))
                if not (isinstance(key, str) and isinstance(response, str)):
                    raise ValueError(
                        f"{path}:{number}: no label; expected the keys 'prompt' and 'response': "
                        f"{_AGAIN}"
                    )
                yield key, Label(response, cut is True)

    def write(self, number: int, keys: Sequence[str], values: Sequence[Label]) -> None:
        """Adds a file."""
        path = os.path.join(self.directory, f"{self._split}-{number:05d}.jsonl")
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


def seed_of(seed: int, place: int) -> int:
    """The seed of the label of the example at `place` in the split: 32 bits."""
    return int(np.random.SeedSequence((seed, place)).generate_state(1)[0])


def fill(
    examples: Sequence[Example],
    make_generator: Callable[[], Any],
    directory: str,
    *,
    split: str = "train",
    seed: int | None = None,
    together: bool = False,
) -> None:
    """Adds what is missing of the labels of `examples`; the generator is made only if some is.

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
    keys = Keys((example.prompt for example in examples), sampled=seed is not None)
    store = LabelFiles(directory, split)

    def make(places: list[int], part: shards.Part) -> Iterator[shards.Made]:
        settings: dict[str, Any] = {"description": f"labels of {split}", "part": part}
        if seed is not None:
            settings["seeds"] = [seed_of(seed, place) for place in places]
        prompts = [examples[i].prompt for i in places]
        for indices, outputs in make_generator().answered(prompts, **settings):
            labels = [Label(output.text, output.cut) for output in outputs]
            yield [places[i] for i in indices], lambda labels=labels: labels

    def announce(missing: np.ndarray) -> None:
        from l2s_jax.experiment.record_files import distinct

        log.info(
            "labels: the LLM answers %d of %d prompts of %s",
            len(missing),
            distinct(keys.binary),
            split,
        )

    shards.fill(store, keys, make, size=SHARD, together=together, announce=announce)


class Labelled(Indexed[Example]):
    """Examples with the responses of labels, whose text lies in files where it is much."""

    def __init__(self, examples: Sequence[Example], keys: Keys, store: LabelFiles):
        """`keys` are of the examples, all of which have a label in the store.

        Raises:
          ValueError: one has none, or a file holds no labels.
        """
        from l2s_jax.experiment.record_files import last_places

        texts, cut, there = GrowingRagged(np.uint8), Growing(bool), Growing(keys.binary.dtype)
        for some in chunks(store.read(store.files()), AT_ONCE):
            encoded = [label.response.encode(errors="surrogatepass") for _, label in some]
            texts.append(np.frombuffer(b"".join(encoded), np.uint8), [*map(len, encoded)])
            cut.append(np.array([label.cut for _, label in some]))
            there.append(key_array(_binary(key) for key, _ in some))
        self._examples = examples
        self._responses, self._cut = texts.done(), cut.array()
        self._places = last_places(there.array(), keys.binary)
        if (lost := np.flatnonzero(self._places < 0)).size:
            raise ValueError(f"{store.directory}: no label of prompt {keys[int(lost[0])]}")

    def __len__(self) -> int:
        return len(self._places)

    def at(self, place: int) -> Example:
        """An example with the response of its label."""
        return self._labelled(self._examples[place], self._places[place])

    def __iter__(self) -> Iterator[Example]:
        return map(self._labelled, self._examples, self._places)

    def _labelled(self, example: Example, place: np.integer) -> Example:
        response = self._responses[int(place)].tobytes().decode(errors="surrogatepass")
        return Example(example.prompt, response, (response,), bool(self._cut[place]))


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
