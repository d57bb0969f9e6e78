"""Tasks: which records to read and how they become a prompt and a response."""

import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from l2s_jax.data import sources
from l2s_jax.data.fitting import Prompt, Span

SOURCES = ("tfds", "jsonl", "tsv", "text")
SPLITS = ("train", "validation", "test")


class Example(NamedTuple):
    """A prompt, its response and all accepted responses, the first of which is `response`.

    cut: whether the response has no end, since whoever wrote it was stopped.
    """

    prompt: str
    response: str
    references: tuple[str, ...]
    cut: bool = False


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
        self._prompt = _template_of(config)
        self.prompt_fields = _template_fields(self._prompt)
        self._sides: dict[str, str] = dict(config.get("truncate") or {}) or dict.fromkeys(
            self.prompt_fields, "end"
        )
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

    def examples(self, split: str) -> Sequence[Example]:
        """All examples of `split`.

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
            examples: Sequence[Example] = _TfdsExamples(self, records, references)
        else:
            examples = [self._example(record, references) for record in records]
        if not examples:
            raise ValueError(
                f"task {self.name!r}: split {split!r} ({self._splits[split]}) is empty"
            )
        return examples

    def settings(self, split: str) -> list[Any]:
        """What decides, beside the content of its files, which examples a split has; JSON-able."""
        references = self._references if split != "train" else ""
        source = [self._source, self._tfds_name, self._splits.get(split)]
        return [*source, self._prompt, self._response, references, *self._wrapping]

    def files(self, split: str, *, prepare: bool) -> list[str]:
        """The files of a split; those of a TFDS dataset only if it may be prepared."""
        if self._source == "tfds":
            return sources.tfds_files(self._tfds_name, self._data_dir) if prepare else []
        value = self._splits.get(split, {})
        names = value.values() if isinstance(value, Mapping) else [value]
        return [sources.resolve(self._data_dir, name) for name in names]

    def render_prompt(self, record: Mapping[str, Any], where: str = "the record") -> Prompt:
        """The prompt of a record that holds the template's fields; of a chat, what the user says.

        Args:
          record: text by field name.
          where: the record's place, for messages.

        Raises:
          ValueError: a field is missing or is no string, or all of them are blank.
        """
        return self._render(sources.Record(record, where, None))

    def _render(self, record: sources.Record) -> Prompt:
        values = {field: _text_field(record, field) for field in self.prompt_fields}
        if not any(value.strip() for value in values.values()):
            raise ValueError(
                f"{record.where(self.prompt_fields[0])}: empty prompt: "
                f"nothing in {', '.join(map(repr, values))}"
            )
        text, spans = "", []
        for literal, field, _, _ in string.Formatter().parse(self._prompt):
            text += literal
            if field is not None:
                value = values[field]
                if field in self._sides:
                    spans.append(Span(field, len(text), len(text) + len(value), self._sides[field]))
                text += value
        return Prompt(text, spans)

    def _example(self, record: sources.Record, references: str) -> Example:
        prompt = self._render(record)
        response = _text_field(record, self._response)
        if not response.strip():
            where = record.where(self._response)
            raise ValueError(f"{where}: empty response: nothing in {self._response!r}")
        extra = _text_list_field(record, references) if references else ()
        return Example(prompt, response, (response, *extra))

    def _records(self, split: str) -> Iterable[sources.Record]:
        value = self._splits[split]
        if self._source == "tfds":
            return sources.TfdsRecords(self._tfds_name, value, self._data_dir)
        if self._source == "text":
            files = {field: sources.resolve(self._data_dir, file) for field, file in value.items()}
            return sources.read_text(files)
        read = {"jsonl": sources.read_jsonl, "tsv": sources.read_tsv}[self._source]
        return read(sources.resolve(self._data_dir, value))


class _TfdsExamples(Sequence[Example]):
    def __init__(self, task: Task, records: sources.TfdsRecords, references: str):
        self._task = task
        self._records = records
        self._references = references

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        return self._task._example(self._records[index], self._references)

    def __iter__(self) -> Iterator[Example]:
        return (self._task._example(record, self._references) for record in self._records)


def load_task(config: ConfigDict) -> Task:
    """The task that a config describes; no data is touched, since generation works without any.

    Args:
      config: `name`, `source` (one of `SOURCES`), `splits` by name (text: field -> file; jsonl,
        tsv: file; tfds: a TFDS split), `prompt` (a `str.format` template of plain field names),
        `response` (a field); optional `data_dir` (relative files lie there; for tfds its own
        folder), `tfds_name` (tfds only), `references` (a field that holds more accepted responses:
        a list of strings, or one string).

    Raises:
      ValueError: a value is missing, unknown or contradicts another.
    """
    required = ["name", "source", "splits", "response"]
    if config.get("source") == "tfds":
        required.append("tfds_name")
    if missing := [key for key in required if not config.get(key)]:
        raise ValueError(f"config.task.{missing[0]} is not set")
    if not _template_of(config):
        raise ValueError("config.task.prompt is not set, nor is config.task.chat.user")
    if config.source not in SOURCES:
        raise ValueError(
            f"config.task.source is {config.source!r}, expected one of {', '.join(SOURCES)}"
        )
    for split, value in config.splits.items():
        _check_split(config.source, split, value)
    fields = _template_fields(_template_of(config))
    for field in config.get("truncate") or {}:
        if field not in fields:
            raise ValueError(
                f"config.task.truncate has {field!r}, which is no field of the prompt "
                f"(it has: {', '.join(fields)})"
            )
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


def _template_of(config: ConfigDict) -> str:
    """The template of a prompt, or of what the user says in a chat."""
    chat = config.get("chat") or {}
    return chat.get("user", "") or config.get("prompt", "")


def _template_fields(template: str) -> tuple[str, ...]:
    """Names in a template, each once, in order."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"config.task.prompt {template!r} is no template: {error}") from error
    fields = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(
                f"config.task.prompt {template!r}: {{{shown}}} is no plain field name in braces"
            )
        fields.append(name)
    if not fields:
        raise ValueError(
            f"config.task.prompt {template!r} has no {{field}}: all prompts would be equal"
        )
    return tuple(dict.fromkeys(fields))


def _field(record: sources.Record, field: str) -> Any:
    if field not in record.fields:
        known = ", ".join(map(str, record.fields)) or "none"
        raise ValueError(f"{record.where()}: no field {field!r} (fields: {known})")
    return record.fields[field]


def _text_field(record: sources.Record, field: str) -> str:
    value = _field(record, field)
    if not isinstance(value, str):
        raise ValueError(
            f"{record.where(field)}: field {field!r} is {_show(value)}, expected a string"
        )
    return value


def _text_list_field(record: sources.Record, field: str) -> tuple[str, ...]:
    value = _field(record, field)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) and v.strip() for v in values):
        raise ValueError(
            f"{record.where(field)}: field {field!r} is {_show(value)}, "
            "expected a list of strings that are not empty"
        )
    return tuple(values)


def _show(value: Any) -> str:
    shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
