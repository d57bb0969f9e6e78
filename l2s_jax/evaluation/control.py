"""The control of a report: L2S that is fed the LLM's representations of another prompt."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.output import Output
from l2s_jax.serving.refilled import Refilled

log = logging.getLogger(__name__)


class Control:
    """Answers each prompt with H of a prompt of other tokens.

    That is one of the same batch, and a task may have a row for each reference of a prompt. So that
    no batch is full of one prompt, the rows of one that would fill it are answered by its others.
    """

    def __init__(self, generator: Generator):
        self._generator = generator

    def generate(self, prompts: Sequence[str], *, description: str, shared: bool) -> list[Output]:
        """As `Generator.generate`."""
        most = max(self._generator.batch_size, 2) - 1
        first = self._first(prompts)
        rows: dict[int, list[int]] = {}
        for place, of in enumerate(first):
            rows.setdefault(of, []).append(place)
        if len(rows) == 1:
            log.warning("%s: there is one prompt, which gets H of padding", description)
        asked = [place for place, of in enumerate(first) if place in rows[of][:most]]
        outputs = Refilled(self._generator).generate(
            [prompts[place] for place in asked],
            seeds=asked,
            description=description,
            mismatched=True,
            shared=shared,
        )
        if not outputs:  # another process has them
            return []
        told = dict(zip(asked, outputs, strict=True))
        return [told.get(place, told[of]) for place, of in enumerate(first)]

    def _first(self, prompts: Sequence[str]) -> list[int]:
        """Of each prompt, the place of the first one of the same tokens."""
        tokenizer = self._generator.prompt_tokenizer
        data = TokenizedExamples(
            [Example(prompt, "", ()) for prompt in prompts],
            prompt_tokenizer=tokenizer,
            response_tokenizer=tokenizer,
            max_prompt_tokens=self._generator.prompt_lengths[-1],
            max_response_tokens=1,
        )
        first: dict[bytes, int] = {}
        keys = (key.tobytes() for key in data.prompt_keys)
        return [first.setdefault(key, place) for place, key in enumerate(keys)]
