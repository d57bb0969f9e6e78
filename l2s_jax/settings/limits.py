"""Sizes that no program has: more than any machine holds.

A number above them is a slip, or somebody else's file; an array of that size would be asked for.
"""

TOKENS = 2**20  # in a row
ROWS = 2**16
ALL_TOKENS = 2**26  # in all rows of a batch


def too_many(rows: int, tokens: int) -> str:
    """What is wrong with so many rows of so many tokens; "" where a machine may hold them."""
    if rows * tokens <= ALL_TOKENS:
        return ""
    return f"{rows * tokens} tokens, expected at most {ALL_TOKENS}"
