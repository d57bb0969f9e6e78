"""Command lines of flags that argparse reads."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Bad input is one line and exit status 2."""

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
