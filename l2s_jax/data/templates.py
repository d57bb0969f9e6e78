"""Templates of prompts, and prompts that know where in them the text of each field lies."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Span(NamedTuple):
    """Where in a prompt a field's text lies, and which end of it is lost first."""

    field: str
    start: int
    stop: int
    side: str


class Prompt(str):
    """The text of a prompt that knows which parts of it may be lost.

    Any other text counts as one field, which loses its end.
    """

    spans: tuple[Span, ...]

    def __new__(cls, text: str, spans: Sequence[Span]) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.spans = tuple(spans)
        return prompt


def spans_of(prompt: str) -> tuple[Span, ...]:
    """The parts of a prompt that may be lost, in the order of the text."""
    return getattr(prompt, "spans", (Span("text", 0, len(prompt), "end"),))


def fields_of(prompt: str) -> str:
    """The text of a prompt's fields, without the template around them."""
    return "\n".join(prompt[span.start : span.stop] for span in spans_of(prompt))


class Template:
    """A `str.format` template of plain field names.

    Attributes:
      text: the template.
      fields: its names, each once, in order.
    """

    def __init__(self, text: str, truncate: Mapping[str, str], key: str):
        """`truncate`: which fields lose text where a prompt is too long, and on which side, "start"
        or "end"; without any, all of them at their end. `key`: the setting that it comes from.

        Raises:
          ValueError: it is no template, or has no such fields.
        """
        self.text = text
        self.fields = _fields(text, key)
        for field in truncate:
            if field not in self.fields:
                raise ValueError(
                    f"config.task.truncate has {field!r}, which is no field of the prompt "
                    f"(it has: {', '.join(self.fields)})"
                )
        self._sides = truncate or dict.fromkeys(self.fields, "end")

    def render(self, values: Mapping[str, str]) -> Prompt:
        """The prompt with these values of its fields."""
        text, spans = "", []
        for literal, field, _, _ in string.Formatter().parse(self.text):
            text += literal
            if field is not None:
                end = len(text) + len(values[field])
                if side := self._sides.get(field):
                    spans.append(Span(field, len(text), end, side))
                text += values[field]
        return Prompt(text, spans)


def _fields(template: str, key: str) -> tuple[str, ...]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"{key} {template!r} is no template: {error}") from error
    fields = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if not name.isidentifier() or spec or conversion:
            shown = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{key} {template!r}: {{{shown}}} is no plain field name in braces")
        fields.append(name)
    if not fields:
        raise ValueError(f"{key} {template!r} has no {{field}}: all prompts would be equal")
    return tuple(dict.fromkeys(fields))
