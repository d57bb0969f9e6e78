"""Command lines: of all flags where a path begins at home, and of those that argparse reads."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


def at_home(argument: str) -> str:
    """`--flag=~/x` with the home folder in the place of "~", as a shell has it in `--flag ~/x`."""
    flag, equals, value = argument.partition("=")
    return f"{flag}={os.path.expanduser(value)}" if equals and flag.startswith("-") else argument


class Parser(argparse.ArgumentParser):
    """Bad input is one line and exit status 2; no flag has a text that may begin with "~"."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        return super().parse_known_args(list(map(at_home, given)), namespace)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def integers(text: str) -> list[int]:
    """ "1,8" -> [1, 8]."""
    values = [int(value) if value.isdecimal() else 0 for value in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers")
    return values


def share(text: str) -> float:
    """ "0.8" -> 0.8."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 0 to 1")
    return value


def count(text: str) -> int:
    """ "8" -> 8."""
    values = integers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one positive integer")
    return values[0]
