"""Tasks: which records to read and how they become a prompt and a response."""

import functools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from l2s_jax.data import sources
from l2s_jax.data.parquet import read_parquet
from l2s_jax.data.table import Example, ExampleTable
from l2s_jax.data.templates import Prompt, Template

SOURCES = ("tfds", "jsonl", "tsv", "parquet", "text")
SPLITS = ("train", "validation", "test")
BLANK_ROWS = ("skip", "error")

log = logging.getLogger(__name__)


class Blank(ValueError):
    """A record whose prompt, or whose response, has no text; the message says where."""


class Task:
    """A source of records, a prompt template and a response field; made by `load_task`."""

    def __init__(self, config: ConfigDict):
        self.name: str = config.name
        self._source: str = config.source
        self._data_dir: str = config.get("data_dir", "")
        self._tfds_name: str = config.get("tfds_name", "")
        self._splits: dict[str, Any] = {
            split: value.to_dict() if isinstance(value, ConfigDict) else value
            for split, value in config.splits.items()
        }
        self._template = _template_of(config)
        self.prompt_fields = self._template.fields
        # Where a config sets it: how prompts are cut, and a chat's system.
        chat = config.get("chat") or {}
        self._wrapping = [
            {name: value}
            for name, value in (
                ("truncate", dict(config.get("truncate") or {})),
                ("chat", dict(chat) if chat.get("user") else {}),
            )
            if value
        ]
        self._response: str = config.response
        self._references: str = config.get("references", "")
        self.skips_blank: bool = config.get("blank_rows", "skip") == "skip"

    def examples(self, split: str) -> Sequence[Example]:
        """All examples of `split`, but for blank ones where these are skipped.

        Files are read and checked whole, TFDS records when they are accessed. Extra references
        serve evaluation, so the train split need not hold them.

        Raises:
          ValueError: the task has no such split, or its data is missing or malformed.
        """
        if split not in self._splits:
            known = ", ".join(self._splits) or "none"
            raise ValueError(
                f"task {self.name!r} has no split {split!r} in config.task.splits (it has: {known})"
            )
        references = self._references if split != "train" else ""
        records = self._records(split)
        if isinstance(records, sources.TfdsRecords):
            self._check_some(split, len(records), 0)
            return _TfdsExamples(self, split, records, references)
        rows = 0

        def found() -> Iterator[Example]:
            nonlocal rows
            for record in records:
                rows += 1
                example = self._example(record, references)
                if example is not None:
                    yield example

        examples = ExampleTable(found())
        self._check_some(split, rows, rows - len(examples))
        return examples

    def _check_some(self, split: str, rows: int, blank: int) -> None:
        """Says once how many rows of a split are left out, and raises if none is left."""
        if blank == rows:
            all_blank = ": all of its rows are blank" if rows else ""
            raise ValueError(
                f"task {self.name!r}: split {split!r} ({self._splits[split]}) is empty{all_blank}"
            )
        if blank:
            log.warning(
                "%s: %d of %d rows of the %s split have a blank prompt or response and are left "
                "out (config.task.blank_rows)",
                self.name,
                blank,
                rows,
                split,
            )

    def settings(self, split: str) -> list[Any]:
        """What decides, beside the content of its files, which examples a split has; JSON-able."""
        references = self._references if split != "train" else ""
        source = [self._source, self._tfds_name, self._splits.get(split)]
        # A split that was read before rows could be skipped had none to skip.
        blank = [] if self.skips_blank else ["error"]
        return [*source, self._template.text, self._response, references, *self._wrapping, *blank]

    def files(self, split: str, *, prepare: bool) -> list[str]:
        """The files of a split; those of a TFDS dataset only if it may be prepared."""
        if self._source == "tfds":
            return sources.tfds_files(self._tfds_name, self._data_dir) if prepare else []
        value = self._splits.get(split, {})
        names = value.values() if isinstance(value, Mapping) else [value]
        paths = [sources.resolve(self._data_dir, name) for name in names]
        try:
            return [file for path in paths for file in sources.expand(path)]
        except ValueError:  # said where they are read
            return paths

    def render_prompt(self, record: Mapping[str, Any], where: str = "the record") -> Prompt:
        """The prompt of a record that holds the template's fields; of a chat, what the user says.

        Args:
          record: text by field name.
          where: the record's place, for messages.

        Raises:
          Blank: there is no text in any of the fields.
          ValueError: a field is missing or is no string.
        """
        return self._render(sources.Record(record, where, None))

    def _render(self, record: sources.Record) -> Prompt:
        values = {field: _text_field(record, field) for field in self.prompt_fields}
        if not any(value.strip() for value in values.values()):
            raise Blank(
                f"{record.where(self.prompt_fields[0])}: empty prompt: "
                f"nothing in {', '.join(map(repr, values))}"
            )
        return self._template.render(values)

    def _example(self, record: sources.Record, references: str) -> Example | None:
        """The example of a record; None if it is blank and those are skipped."""
        try:
            prompt = self._render(record)
            response = _text_field(record, self._response)
            if not response.strip():
                where = record.where(self._response)
                raise Blank(f"{where}: empty response: nothing in {self._response!r}")
        except Blank:
            if self.skips_blank:
                return None
            raise
        extra = self._extra_references(record, references) if references else ()
        return Example(prompt, response, (response, *extra))

    def _extra_references(self, record: sources.Record, field: str) -> tuple[str, ...]:
        texts = _text_list_field(record, field)
        if not self.skips_blank and not all(text.strip() for text in texts):
            raise Blank(f"{record.where(field)}: field {field!r} holds an empty reference")
        return tuple(text for text in texts if text.strip())

    def _records(self, split: str) -> Iterable[sources.Record]:
        value = self._splits[split]
        if self._source == "tfds":
            return sources.TfdsRecords(self._tfds_name, value, self._data_dir)
        if self._source == "text":
            files = {field: sources.resolve(self._data_dir, file) for field, file in value.items()}
            return sources.read_text(files)
        columns = [*self.prompt_fields, self._response]
        if self._references and split != "train":
            columns.append(self._references)
        read = {
            "jsonl": sources.read_jsonl,
            "tsv": sources.read_tsv,
            "parquet": functools.partial(read_parquet, columns=columns),
        }[self._source]
        shards = sources.expand(sources.resolve(self._data_dir, value))
        return (record for shard in shards for record in read(shard))


class _TfdsExamples(Sequence[Example]):
    """Examples that are read when they are asked for.

    Which rows are blank is known once all have been read: whoever goes through all of them needs
    nothing else, and the number or an index of a row takes such a pass of its own before.
    """

    def __init__(self, task: Task, split: str, records: sources.TfdsRecords, references: str):
        self._task, self._split = task, split
        self._records = records
        self._references = references
        # Where the examples are among the records.
        self._places: np.ndarray | None = None
        if not task.skips_blank:
            self._places = np.arange(len(records))

    def __len__(self) -> int:
        return len(self._known_places())

    def __getitem__(self, index: int) -> Example:
        record = self._records[int(self._known_places()[index])]
        example = self._task._example(record, self._references)
        if example is None:
            raise ValueError(f"{record.where()}: the dataset has changed while it was read")
        return example

    def __iter__(self) -> Iterator[Example]:
        places = []
        for place, record in enumerate(self._records):
            example = self._task._example(record, self._references)
            if example is not None:
                places.append(place)
                yield example
        if self._places is None:
            rows = len(self._records)
            self._task._check_some(self._split, rows, rows - len(places))
            self._places = np.asarray(places)

    def _known_places(self) -> np.ndarray:
        if self._places is None:
            for _ in self:
                pass
        assert self._places is not None
        return self._places


def load_task(config: ConfigDict) -> Task:
    """The task that a config describes; no data is touched, since generation works without any.

    Args:
      config: `name`, `source` (one of `SOURCES`), `splits` by name (text: field -> file; jsonl,
        tsv, parquet: file, or files by a name with "*"; tfds: a TFDS split), `prompt` (a
        `str.format` template of plain field names), `response` (a field); optional `data_dir`
        (relative files lie there; for tfds its own folder), `tfds_name` (tfds only), `references`
        (a field that holds more accepted responses: a list of strings, or one string),
        `blank_rows` (one of `BLANK_ROWS`).

    Raises:
      ValueError: a value is missing, unknown or contradicts another.
    """
    required = ["name", "source", "splits", "response"]
    if config.get("source") == "tfds":
        required.append("tfds_name")
    if missing := [key for key in required if not config.get(key)]:
        raise ValueError(f"config.task.{missing[0]} is not set")
    if config.source not in SOURCES:
        raise ValueError(
            f"config.task.source is {config.source!r}, expected one of {', '.join(SOURCES)}"
        )
    for split, value in config.splits.items():
        _check_split(config.source, split, value)
    fields = _template_of(config).fields
    if config.source == "text":
        for split, files in config.splits.items():
            _check_text_fields(config, split, files, fields)
    return Task(config)


def _check_split(source: str, split: str, value: Any) -> None:
    key = f"config.task.splits.{split}"
    if split not in SPLITS:
        raise ValueError(f"{key}: unknown split, expected one of {', '.join(SPLITS)}")
    if source == "text":
        valid = isinstance(value, Mapping | ConfigDict) and all(
            isinstance(file, str) and file for file in value.values()
        )
        expected = "a file for each field"
    else:
        valid = isinstance(value, str) and bool(value)
        expected = "a TFDS split" if source == "tfds" else "a file"
    if not valid:
        raise ValueError(f"{key} is {_show(value)}, expected {expected} (source {source!r})")


def _check_text_fields(
    config: ConfigDict, split: str, files: Mapping[str, str], prompt_fields: Sequence[str]
) -> None:
    used = {field: "prompt" for field in prompt_fields} | {config.response: "response"}
    if split != "train" and config.get("references"):
        used[config.references] = "references"
    for field, key in used.items():
        if field not in files:
            raise ValueError(
                f"config.task.{key} uses field {field!r}, "
                f"which config.task.splits.{split} does not have (it has: {', '.join(files)})"
            )


def _template_of(config: ConfigDict) -> Template:
    """The template of a prompt, or of what the user says in a chat."""
    chat = config.get("chat") or {}
    key = "chat.user" if chat.get("user") else "prompt"
    text = chat.get("user") or config.get("prompt")
    if not text:
        raise ValueError("config.task.prompt is not set, nor is config.task.chat.user")
    return Template(text, dict(config.get("truncate") or {}), f"config.task.{key}")


def _field(record: sources.Record, field: str) -> Any:
    if field not in record.fields:
        known = ", ".join(map(str, record.fields)) or "none"
        raise ValueError(f"{record.where()}: no field {field!r} (fields: {known})")
    return record.fields[field]


def _text_field(record: sources.Record, field: str) -> str:
    value = _field(record, field)
    if value is None:  # how Parquet and pandas say that there is no text
        return ""
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where(field)}: field {field!r} is {_show(value)}, expected a string"
        )
    return value


def _text_list_field(record: sources.Record, field: str) -> tuple[str, ...]:
    value = _field(record, field)
    values = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise ValueError(
            f"{record.where(field)}: field {field!r} is {_show(value)}, expected a list of strings"
        )
    return tuple(values)


def _show(value: Any) -> str:
    shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
