"""The command line of a benchmark."""

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


def count(text: str) -> int:
    """ "8" -> 8."""
    values = integers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one positive integer")
    return values[0]
