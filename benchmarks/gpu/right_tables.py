"""The tables of `benchmarks.gpu.right`, and what it holds in them."""

from __future__ import annotations

# Of float32 logits, relative to the largest. The gap of two may move by twice as much.
TOLERANCE = 1e-5
# Of our root mean square error in bfloat16, in transformers' own.
RATIO = 1.5

PRODUCTS = "Products of float32"
LOGITS = "Logits beside transformers"
RESPONSES = "Responses beside transformers, in float32"
COMPANY = "Greedy responses in different company"
PARTED = "Rows that differ"

# Title -> (columns, note).
TABLES: dict[str, tuple[tuple[str, ...], str]] = {
    PRODUCTS: (
        ("precision", "largest error"),
        "Of 512 x 512 normal numbers, relative to the largest. Near 3e-4 is TF32.",
    ),
    LOGITS: (
        (
            "model",
            "parameters",
            "float32: largest difference",
            "bfloat16: largest error",
            "largest of transformers",
            "bfloat16: rms error",
            "rms of transformers",
            "ratio",
            "holds",
        ),
        "Relative to the largest logit. Errors are differences from transformers' float32 logits. "
        f"Held: a difference of at most {TOLERANCE:g}, a ratio of at most {RATIO:g}.",
    ),
    RESPONSES: (
        ("model", "search", "rows", "ended", "differ", "ties", "score moved", "holds"),
        "Ended: by the eos, before the limit or at it. Ties: how many of those that differ. Score: "
        "log p per token. Held: all that differ are ties.",
    ),
    COMPANY: (
        (
            "model",
            "dtype",
            "rows",
            "run",
            "beside",
            "differ",
            "ties",
            "largest gap",
            "tie up to",
            "holds",
        ),
        "Ties: how many of those that differ. Gaps of two logits, relative to the largest logit. "
        "Held: all that differ are ties.",
    ),
    PARTED: (
        ("model", "dtype", "run", "beside", "row", "step", "margin", "gap", "verdict"),
        "At the first step that differs: the margin between the two best logits, and the gap from "
        "the best to the lesser of the two tokens' logits, relative to the largest logit. Of beams "
        "they decide nothing.",
    ),
}
