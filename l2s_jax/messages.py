"""What people read in one line: values and errors, whatever a file has put into them."""

from __future__ import annotations

from typing import Any

# Characters of a value, and of a line.
_SHOWN, _LINE = 80, 900


def shown(value: Any) -> str:
    """A value of a file in a message: the beginning of its repr."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of more digits than are written"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(error: BaseException | str) -> str:
    """What an error says, in one line, which no text of a file in it makes a long or another one.

    A terminal obeys some characters, and turns the line round at others: these are escaped.
    """
    line = escaped(" ".join(str(error).split())) or type(error).__name__
    return line if len(line) <= _LINE else f"{line[: _LINE * 2 // 3]} ... {line[-_LINE // 4 :]}"


def escaped(text: str) -> str:
    """A text with what is no printable character as Python writes it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
