"""Positive numbers on the command line of a benchmark."""

from __future__ import annotations

import argparse


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
