"""How the next token is chosen: the settings of greedy decoding, sampling and beam search."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from l2s_jax.settings.declare import Section, setting

# A float32 logit divided by less may overflow, and by what rounds to 0 become NaN.
_LEAST_TEMPERATURE = 1e-3


@dataclasses.dataclass(frozen=True)
class Search(Section):
    """Settings of one way to decode; the defaults are greedy decoding.

    Their names and meanings are those of transformers' GenerationConfig, except that sampling is
    asked for by a temperature above 0. Without sampling, or without beam search, their settings are
    refused: they would not be looked at.
    """

    temperature: float = setting(
        0.0,
        "Above 0, tokens are sampled at that temperature; 0: the likeliest is taken.",
        fits=lambda value: value == 0 or value >= _LEAST_TEMPERATURE,
        expected=f"a number >= 0, and at least {_LEAST_TEMPERATURE} if not 0",
    )
    top_k: int = setting(0, "Sampling is from the k likeliest tokens; 0: from all.", at_least=0)
    # Holtzman et al. 2020, arXiv 1904.09751.
    top_p: float = setting(
        1.0,
        "Sampling is from the fewest likeliest tokens whose probabilities sum to this.",
        above=0,
        at_most=1,
    )
    # Nguyen et al. 2024, arXiv 2407.01082.
    min_p: float = setting(
        0.0,
        "Sampling is from tokens at least so many times as likely as the likeliest.",
        at_least=0,
        at_most=1,
    )
    num_beams: int = setting(1, "Above 1, beam search.", at_least=1)
    length_penalty: float = setting(
        1.0, "A hypothesis of n tokens, its eos counted, scores log p / n**length_penalty."
    )
    early_stopping: bool = setting(
        False,
        "Beam search ends a row with its `num_beams`-th finished hypothesis, also where a running "
        "one could still score higher at its present length.",
    )
    num_return: int = setting(
        1, "How many hypotheses of a beam search are given, best first.", at_least=1
    )
    min_new_tokens: int = setting(0, "No eos before so many tokens.", at_least=0)
    # Keskar et al. 2019, arXiv 1909.05858.
    repetition_penalty: float = setting(
        1.0,
        "Logits of tokens that occurred are divided by it if positive, else multiplied.",
        above=0,
    )
    no_repeat_ngram_size: int = setting(
        0, "No n-gram of that size occurs twice; 0: any may.", at_least=0
    )
    # Both as OpenAI's API has them; what a response continues does not count.
    frequency_penalty: float = setting(
        0.0,
        "Taken off a token's logit for each time that the response has it.",
        at_least=-2,
        at_most=2,
        added=True,
    )
    presence_penalty: float = setting(
        0.0,
        "Taken off the logits of all tokens that the response has.",
        at_least=-2,
        at_most=2,
        added=True,
    )
    # Leviathan et al. 2023, arXiv 2211.17192.
    exact: bool = setting(
        False,
        "L2S drafts tokens and its LLM keeps those that it would have written itself: the text is "
        "the LLM's.",
        added=True,
    )
    draft_tokens: int = setting(
        4, "The most tokens that are drafted before the LLM reads them.", at_least=1, added=True
    )
    draft_tolerance: float = setting(
        0.0,
        "A drafted token also passes where the LLM gives it at least a share 1 - t of its best "
        "token's probability. 0: the text is the LLM's; 1: it is the SLM's.",
        at_least=0,
        at_most=1,
        added=True,
    )
    stop: tuple[str, ...] = setting(
        (),
        "Texts that end a response, and are not part of it.",
        fits=lambda value: all(isinstance(text, str) and text for text in value),
        expected="texts of at least one character",
    )

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        super().__post_init__()

    def conflict(self) -> str:
        """Settings that would not be looked at, or leave nothing to give."""
        if self.num_beams > 1:
            for name in ("temperature", *_ONLY_WITH["temperature"][1]):
                value, unused = getattr(self, name), _DEFAULTS[name]
                if value != unused:
                    return (
                        f"num_beams={self.num_beams} with {name}={value}: expected "
                        f"{name}={unused}, beam search does not sample"
                    )
        if self.num_beams > 1 and self.stop:
            return (
                f"num_beams={self.num_beams} with stop={list(self.stop)}: expected one of them, "
                "stop texts end greedy and sampled responses"
            )
        if self.num_beams > 1 and self.exact:
            return f"num_beams={self.num_beams} with exact=True: expected one of them"
        if self.num_return > self.num_beams:
            return f"num_return={self.num_return}: expected at most num_beams={self.num_beams}"
        for decider, (expected, names) in _ONLY_WITH.items():
            chosen = getattr(self, decider)
            for name in names if chosen == _DEFAULTS[decider] else ():
                value, unused = getattr(self, name), _DEFAULTS[name]
                if value != unused:
                    return (
                        f"{name}={value} with {decider}={chosen}: expected {name}={unused}, "
                        f"or {expected}"
                    )
        return ""

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on the tokens so far, beyond their number."""
        return (
            self.repetition_penalty != 1
            or self.no_repeat_ngram_size > 0
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
        )


@functools.lru_cache(maxsize=64)
def _alone(search: Search) -> Search:
    drafting = ("exact", *_ONLY_WITH["exact"][1])
    return dataclasses.replace(search, **{name: _DEFAULTS[name] for name in drafting})


def alone(search: Search | Mapping[str, Any]) -> Search:
    """The search, or that of these settings, as of a system that drafts nothing."""
    return _alone(search if isinstance(search, Search) else Search(**search))


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(Search)}
# Settings that say nothing where another one has its default.
_ONLY_WITH = {
    "temperature": (
        "a temperature above 0, only sampling looks at it",
        ("top_k", "top_p", "min_p"),
    ),
    "num_beams": (
        "num_beams above 1, only beam search looks at it",
        ("num_return", "length_penalty", "early_stopping"),
    ),
    "exact": ("exact=True, only exact decoding drafts", ("draft_tokens", "draft_tolerance")),
}


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Search:
    """The search of `settings` with these changes.

    Where they turn sampling or beam search off, its own settings go with it.

    Raises:
      ValueError: as of Search, a change that says nothing among them.
    """
    merged = {**settings, **changes}
    for decider, (_, names) in _ONLY_WITH.items():
        if decider in changes and changes[decider] == _DEFAULTS[decider]:
            merged |= {name: _DEFAULTS[name] for name in names if name not in changes}
    return Search(**merged)
