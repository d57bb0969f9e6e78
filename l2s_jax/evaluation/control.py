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

    The rows of a batch get H of each other, and a task may have a row for each reference of a
    prompt. So a prompt that repeats is answered once, for all of its rows.
    """

    def __init__(self, generator: Generator):
        self._generator = generator

    def generate(self, prompts: Sequence[str], *, description: str, shared: bool) -> list[Output]:
        """As `Generator.generate`."""
        places = self._places(prompts)
        first = list(dict.fromkeys(places))
        if len(first) == 1 < len(prompts):
            log.warning("%s: all prompts are one, which gets H of padding", description)
        outputs = Refilled(self._generator).generate(
            [prompts[place] for place in first],
            seeds=first,
            description=description,
            mismatched=True,
            shared=shared,
        )
        if not outputs:  # another process has them
            return []
        of = dict(zip(first, outputs, strict=True))
        return [of[place] for place in places]

    def _places(self, prompts: Sequence[str]) -> list[int]:
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
