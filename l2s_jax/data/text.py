"""Text as it comes in: without halves of characters, and never a string taken for a list.

JSON may escape half of a character, as in "\\ud83d", and Python then has a string that is no text:
no tokenizer takes it, no file holds it. U+FFFD takes the place of each half.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

_HALVES = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """The text with U+FFFD for each half of a character."""
    # Where there is nothing to mend it is the same object: a Prompt knows where its fields lie.
    if text.isascii() or not _HALVES.search(text):
        return text
    return _HALVES.sub("\N{REPLACEMENT CHARACTER}", text)


def all_whole(value: Any) -> Any:
    """`whole` of every string in what JSON holds, names of fields too."""
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, Mapping):
        return {all_whole(key): all_whole(item) for key, item in value.items()}
    if isinstance(value, list):
        return [all_whole(item) for item in value]
    return value


def decoded(data: bytes) -> str:
    """UTF-8 as text, with U+FFFD for halves of characters that somebody has encoded.

    Raises:
      UnicodeDecodeError: it is not UTF-8 in another way.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        try:
            return whole(data.decode(errors="surrogatepass"))
        except UnicodeDecodeError:
            raise error from None


def text_list(texts: Iterable[str], name: str) -> list[str]:
    """The texts as a list, each of them `whole`.

    Raises:
      TypeError: `texts`, which `name` names in the message, is one string, or something else is
        among the texts.
    """
    if isinstance(texts, str | bytes):
        raise TypeError(
            f"{name}: expected a sequence of strings, got one string: did you mean [{texts[:40]!r}]"
        )
    taken = list(texts)
    for index, text in enumerate(taken):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise TypeError(f"{name}: expected strings, number {index} is of type {kind}")
    return [whole(text) for text in taken]


def integer_list(numbers: Iterable[int], name: str) -> list[int]:
    """The numbers as a list; `name` names them in messages.

    Raises:
      TypeError: `numbers` is one number, a string, or holds something else than integers.
    """
    if isinstance(numbers, str | bytes) or not isinstance(numbers, Iterable):
        kind = type(numbers).__name__
        raise TypeError(f"{name}: expected a sequence of integers, got one of type {kind}")
    try:
        return [operator.index(number) for number in numbers]
    except TypeError as error:
        raise TypeError(f"{name}: expected integers: {error}") from None


def asked(
    prompts: Iterable[str], seeds: Iterable[int] | None, name: str = "prompts"
) -> tuple[list[str], list[int]]:
    """Prompts and a seed for each, their places where there are none; `name` is for messages.

    Raises:
      TypeError: prompts are one string, or hold something else than strings; likewise seeds.
      ValueError: the numbers of seeds and prompts differ, or a seed does not fit in 32 bits.
    """
    texts = text_list(prompts, name)
    numbers = list(range(len(texts))) if seeds is None else integer_list(seeds, "seeds")
    if len(numbers) != len(texts):
        raise ValueError(f"{len(numbers)} seeds: expected one per prompt, {len(texts)}")
    if numbers and not 0 <= min(numbers) <= max(numbers) < 2**32:
        raise ValueError(f"seeds {min(numbers)} to {max(numbers)}: expected 0 to {2**32 - 1}")
    return texts, numbers
