"""Texts as token ids, cut to length, and what they lost by that."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from l2s_jax.data import fitting
from l2s_jax.data.ragged import Growing, GrowingRagged, Ragged, numbers
from l2s_jax.data.table import Example
from l2s_jax.tokenizers import Tokenizer

# Examples that are tokenized at a time.
AT_ONCE = 8192


class Loss(NamedTuple):
    """What texts lost because they were too long.

    prompts, responses: how many were cut, of `examples`.
    hopeless: prompts that were too long without any text of their fields.
    fields: of the prompts that were cut, by field: characters lost, and of how many.
    left_out: examples that are not there because their response was cut.
    """

    examples: int
    prompts: int
    responses: int
    hopeless: int
    fields: dict[str, fitting.Loss]
    left_out: int = 0

    def describe(self, most: int) -> list[str]:
        """A line about prompts and one about responses, where some were cut; `most`: tokens."""
        lines = []
        if self.prompts:
            shares = {field: lost / of for field, (lost, of) in self.fields.items() if lost}
            lost = ", ".join(f"{share:.0%} of {field}" for field, share in shares.items())
            lines.append(
                f"{self.prompts} of {self.examples} prompts were longer than {most} tokens and "
                f"lost text: {lost or 'none of a field'}"
            )
        if self.hopeless:
            lines.append(
                f"{self.hopeless} of {self.examples} prompts are longer than {most} tokens even "
                "without their fields: the end of the template is lost"
            )
        if self.responses:
            what = "are left out" if self.left_out else "teach no end"
            lines.append(f"{self.responses} of {self.examples} responses were cut, and {what}")
        return lines


class Sequences(Protocol):
    """Token ids by index: int32 [t] each; `lengths` int32 [N] has all t."""

    def __getitem__(self, index: int) -> np.ndarray: ...

    @property
    def lengths(self) -> np.ndarray: ...


class Tokens(NamedTuple):
    """Of N examples.

    cut: bool [N], whether a response has no end.
    """

    prompts: Sequences
    responses: Sequences
    cut: np.ndarray
    loss: Loss


class Tokenization(NamedTuple):
    """How texts become ids.

    A prompt over its maximum loses text of its fields (fitting.py). A response over its maximum is
    cut, and one that was cut before stays so: no eos follows it.
    """

    prompt_tokenizer: Tokenizer
    response_tokenizer: Tokenizer
    max_prompt_tokens: int
    max_response_tokens: int

    def __call__(self, examples: Sequence[Example]) -> Tokens:
        """The tokens of some examples, all at once."""
        prompts = [example.prompt for example in examples]
        fitted = fitting.fit(prompts, self.prompt_tokenizer, self.max_prompt_tokens)
        responses = self.response_tokenizer.encode_responses([e.response for e in examples])
        cut = [
            example.cut or len(ids) > self.max_response_tokens
            for example, ids in zip(examples, responses, strict=True)
        ]
        responses = [
            ids[:-1][: self.max_response_tokens] if is_cut else ids
            for ids, is_cut in zip(responses, cut, strict=True)
        ]
        loss = Loss(len(examples), fitted.cut, sum(cut), fitted.hopeless, fitted.losses)
        return Tokens(_ragged(fitted.ids), _ragged(responses), np.array(cut, bool), loss)


def gathered(parts: Iterable[Tokens]) -> Tokens:
    """The tokens of all parts, in order. Large arrays lie in files (`ragged.Growing`)."""
    prompts, responses, cut = GrowingRagged(np.int32), GrowingRagged(np.int32), Growing(bool)
    losses = []
    for part in parts:
        for side, new in ((prompts, part.prompts), (responses, part.responses)):
            assert isinstance(new, Ragged)
            side.append(new.values, new.lengths)
        cut.append(part.cut)
        losses.append(part.loss)
    return Tokens(prompts.done(), responses.done(), cut.array(), total(losses))


def total(losses: Iterable[Loss]) -> Loss:
    """What all of them lost together."""
    examples = prompts = responses = hopeless = 0
    fields: dict[str, fitting.Loss] = {}
    for loss in losses:
        examples, prompts = examples + loss.examples, prompts + loss.prompts
        responses, hopeless = responses + loss.responses, hopeless + loss.hopeless
        for field, (lost, of) in loss.fields.items():
            before = fields.get(field, fitting.Loss(0, 0))
            fields[field] = fitting.Loss(before.lost + lost, before.of + of)
    return Loss(examples, prompts, responses, hopeless, fields)


def _ragged(ids: Sequence[Sequence[int]]) -> Ragged:
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    return Ragged(numbers(ids, np.int32), offsets)
