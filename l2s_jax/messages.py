"""What people read in one line: values and errors, whatever a file has put into them.

Errors in threads of libraries end a command with its one line, and are not told twice.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def errors_once() -> Iterator[None]:
    """Has libraries not tell of errors in threads of theirs, which end the command with its line.

    Of a write or a read that fails, Orbax and TensorStore print a traceback for each array.
    """
    logs = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for log in logs:
        log.addFilter(_is_news)
    before = sys.excepthook, sys.unraisablehook, threading.excepthook
    sys.excepthook = functools.partial(_of_main_thread, before[0])
    sys.unraisablehook, threading.excepthook = _main_thread_only, _not_of_files
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = before
        for log in logs:
            log.removeFilter(_is_news)


# Of warnings of what is as it should be: Orbax's of each checkpoint that is saved without a
# validation, TFDS's of a dataset that is yet to be made.
_NO_NEWS = ("tracked_metric", "Variant folder %s has no")


def _is_news(record: logging.LogRecord) -> bool:
    return record.levelno != logging.ERROR and not any(x in str(record.msg) for x in _NO_NEWS)


def _of_main_thread(tell: Callable[..., Any], *error: Any) -> None:
    """In place of sys.excepthook, which threads of TensorStore's call too."""
    if threading.current_thread() is threading.main_thread():
        tell(*error)


def _main_thread_only(arguments: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(arguments)


def _not_of_files(arguments: threading.ExceptHookArgs) -> None:
    if not issubclass(arguments.exc_type, OSError):
        threading.__excepthook__(arguments)
