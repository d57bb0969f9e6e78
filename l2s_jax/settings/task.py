"""Settings of the task: where its records are, and how they become prompts and responses."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from l2s_jax.settings.declare import Section, setting

_LANGUAGE = re.compile(r"[a-z]{2,3}([-_][A-Za-z0-9]{2,8})*")


def _text(meaning: str) -> Any:
    return setting(
        "",
        meaning,
        fits=lambda text: not re.search("[\ud800-\udfff]", text),
        expected="a text of whole characters",
    )


def _are_sides(sides: dict[str, Any]) -> bool:
    return all(side in ("start", "end") for side in sides.values())


@dataclasses.dataclass(frozen=True)
class Chat(Section):
    """Prompts in the format of a chat model: by the chat template of its own checkpoint."""

    user: str = _text(
        "What the user says: a template over field names, in the place of `task.prompt`. A "
        "tokenizer without a chat template gets it as it is.",
    )
    system: str = _text("What the system says before; for some models there is none.")
    options: dict[str, Any] = setting(
        {},
        "Values of other names that the template looks at, as in `{'enable_thinking': False}` for "
        "Qwen3.",
    )


@dataclasses.dataclass(frozen=True)
class Task(Section):
    """The records, and how they become a prompt and a response; see data/tasks.py."""

    name: str = setting("", "What reports call it.")
    source: str = setting(
        "", "Kind of the data.", one_of=("tfds", "jsonl", "tsv", "parquet", "text")
    )
    data_dir: str = setting(
        "", "Where relative file names start: a folder, or any fsspec URL.", is_path=True
    )
    tfds_name: str = setting("", "Name of a dataset of tensorflow-datasets.")
    splits: dict[str, Any] = setting(
        {},
        "`train`, `validation` and `test`: a file each, or files by a name with `*`; for `text` a "
        "file for each field; for `tfds` a TFDS split.",
    )
    prompt: str = _text("Template over field names, as in `translate to German: {en}`.")
    chat: Chat = Chat()
    truncate: dict[str, Any] = setting(
        {},
        "Which fields lose text where a prompt is too long, and on which side: `start` or `end`, "
        "as in `{'mail': 'end'}`; without any: all of them, at their end.",
        fits=_are_sides,
        expected="'start' or 'end' for each field",
    )
    cut_responses: str = setting(
        "keep",
        "Responses to learn that are cut, by `max_response_tokens` or where the LLM was stopped: "
        "keep: they teach no end; drop: their examples are left out.",
        one_of=("keep", "drop"),
    )
    response: str = setting("", "Name of the field that holds the response.")
    references: str = setting("", "Field of further references, if there is one.")
    language: str = setting(
        "",
        "Code of the responses' language, as in `de`, `zh` or `pt-BR`; metrics look at it.",
        fits=lambda code: not code or bool(_LANGUAGE.fullmatch(code)),
        expected="a code of two or three letters, with or without parts after a hyphen",
    )
    blank_rows: str = setting(
        "skip",
        "What becomes of rows with a blank prompt or response: they are left out and counted, or "
        "the first one is an error.",
        one_of=("skip", "error"),
    )

    def conflict(self) -> str:
        """Two templates."""
        if self.prompt and self.chat.user:
            return f"prompt={self.prompt!r} and chat.user={self.chat.user!r}: expected one of them"
        return ""
