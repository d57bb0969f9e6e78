"""Responses of an LLM to many prompts: in batches, and in rows that take the next prompt at once.

python benchmarks/refilled.py --model=t5-small --prompts=256 --rows=32 --mean=40 --new_tokens=160

The model is random, in float32. It samples, and so many tokens end a response that its length has
the mean, geometrically distributed, up to --new_tokens. Prompts have 8 to 64 tokens. Both ways give
the same responses, or the benchmark ends with an error. Turns alternate; a time is the median, and
what is compiled before is not in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.geometry import random_like
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.output import Output
from l2s_jax.serving.refilled import Refilled
from l2s_jax.settings.search import Search

_SHORTEST, _LONGEST = 8, 64


class Numbers:
    """Space-separated ids, as a tokenizer; the first of them end a response."""

    is_chat = False
    fingerprint = identity = "numbers"

    def __init__(self, vocab_size: int, ends: int):
        self.vocab_size, self.pad_id, self.eos_id = vocab_size, 0, 1
        self.end_ids = tuple(range(1, 1 + ends))
        self.pieces, self.special_ids = list(map(str, range(vocab_size))), [0, 1]

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""
        return [list(map(int, text.split())) for text in texts]

    encode_responses = encode_prompts

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return " ".join(map(str, ids))


def main() -> None:
    """Prints a table: how, seconds, tokens per second."""
    parser = Parser(description="Responses to many prompts.", allow_abbrev=False)
    parser.add_argument("--model", choices=sorted(GEOMETRIES), default="t5-small")
    for name, default in (
        ("prompts", 256), ("rows", 32), ("mean", 40), ("new_tokens", 160), ("repeats", 3),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=count, default=default)
    flags = parser.parse_args()
    system = LanguageModel("llm", GEOMETRIES[flags.model])
    params = random_like(jax.eval_shape(system.init, jax.random.key(0)))
    size = system.config.vocab_size
    tokenizer: Any = Numbers(size, max(1, size // flags.mean))
    chance = np.random.default_rng(0)
    lengths = chance.integers(_SHORTEST, _LONGEST, flags.prompts, endpoint=True)
    prompts = [" ".join(map(str, chance.integers(2, size, length))) for length in lengths]
    generator = Generator(
        system,
        params,
        {},
        tokenizer,
        tokenizer,
        prompt_lengths=[_LONGEST],
        max_new_tokens=flags.new_tokens,
        batch_size=flags.rows,
        search=Search(temperature=1.0),
    )
    ways = {"in batches": generator, "rows refilled": Refilled(generator)}

    def answer(way: Generator | Refilled) -> tuple[float, dict[int, Output]]:
        began, found = time.perf_counter(), dict[int, Output]()
        for places, outputs in way.answered(prompts):
            found.update(zip(places, outputs, strict=True))
        return time.perf_counter() - began, found

    # Compiled, and seen to be right.
    first, other = (answer(way)[1] for way in ways.values())
    if first != other:
        raise RuntimeError("responses differ between batches and rows that are refilled")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(flags.repeats):
        for name, way in ways.items():
            times[name].append(answer(way)[0])
    tokens = [output.tokens for output in first.values()]
    print(
        f"{flags.prompts} responses of {statistics.mean(tokens):.1f} tokens, {max(tokens)} at most"
    )
    print("| rows | seconds | tokens/s |\n|---|---:|---:|")
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} | {sum(tokens) / value:.0f} |")
    print(f"ratio: {seconds['in batches'] / seconds['rows refilled']:.2f}")


if __name__ == "__main__":
    main()
