"""How the next token is chosen: the settings of greedy decoding, sampling and beam search."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Search:
    """Settings of one way to decode; the defaults are greedy decoding.

    Their names and meanings are those of transformers' GenerationConfig, except that sampling is
    asked for by a temperature above 0. Without sampling, or without beam search, their settings are
    refused: they would not be looked at.

    temperature: above 0, tokens are sampled at that temperature; 0: the likeliest is taken.
    top_k: sampling is from the k likeliest tokens; 0: from all.
    top_p: sampling is from the fewest likeliest tokens whose probabilities sum to top_p
      (Holtzman et al. 2020, arXiv 1904.09751).
    min_p: sampling is from tokens at least min_p times as likely as the likeliest
      (Nguyen et al. 2024, arXiv 2407.01082).
    num_beams: above 1, beam search.
    length_penalty: a hypothesis of n tokens, its eos counted, scores log p / n**length_penalty.
    early_stopping: beam search ends a row with its num_beams-th finished hypothesis, also where a
      running one could still score higher at its present length.
    num_return: how many hypotheses of a beam search are given, best first.
    min_new_tokens: no eos before so many tokens.
    repetition_penalty: logits of tokens that occurred are divided by it if positive, else
      multiplied (Keskar et al. 2019, arXiv 1909.05858).
    no_repeat_ngram_size: no n-gram of that size occurs twice; 0: any may.
    stop: texts that end a response, and are not part of it.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False
    num_return: int = 1
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        elif isinstance(self.stop, list):
            object.__setattr__(self, "stop", tuple(self.stop))
        for field in dataclasses.fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            fits, expected = _EXPECTED[field.name]
            right_kind = type(value) in ((int, float) if kind is float else (kind,))
            if not right_kind or (kind is float and not math.isfinite(value)) or not fits(value):
                raise ValueError(f"{field.name}={value!r}: expected {expected}")
        if self.num_beams > 1:
            for name in ("temperature", *_ONLY_WITH["temperature"][1]):
                value, unused = getattr(self, name), _DEFAULTS[name]
                if value != unused:
                    raise ValueError(
                        f"num_beams={self.num_beams} with {name}={value}: expected "
                        f"{name}={unused}, beam search does not sample"
                    )
        if self.num_beams > 1 and self.stop:
            raise ValueError(
                f"num_beams={self.num_beams} with stop={list(self.stop)}: expected one of them, "
                "stop texts end greedy and sampled responses"
            )
        if self.num_return > self.num_beams:
            raise ValueError(
                f"num_return={self.num_return}: expected at most num_beams={self.num_beams}"
            )
        for setting, (expected, names) in _ONLY_WITH.items():
            chosen = getattr(self, setting)
            for name in names if chosen == _DEFAULTS[setting] else ():
                value, unused = getattr(self, name), _DEFAULTS[name]
                if value != unused:
                    raise ValueError(
                        f"{name}={value} with {setting}={chosen}: expected {name}={unused}, or "
                        f"{expected}"
                    )

    @property
    def needs_history(self) -> bool:
        """Whether the choice depends on the tokens so far, beyond their number."""
        return self.repetition_penalty != 1 or self.no_repeat_ngram_size > 0


# A float32 logit divided by less may overflow, and by what rounds to 0 become NaN.
_LEAST_TEMPERATURE = 1e-3

_EXPECTED = {
    "temperature": (
        lambda value: value == 0 or value >= _LEAST_TEMPERATURE,
        f"a number >= 0, and at least {_LEAST_TEMPERATURE} if not 0",
    ),
    "top_k": (lambda value: value >= 0, "an integer >= 0"),
    "top_p": (lambda value: 0 < value <= 1, "a number above 0, at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "a number in [0, 1]"),
    "num_beams": (lambda value: value >= 1, "an integer >= 1"),
    "length_penalty": (lambda value: True, "a finite number"),
    "early_stopping": (lambda value: True, "true or false"),
    "num_return": (lambda value: value >= 1, "an integer >= 1"),
    "min_new_tokens": (lambda value: value >= 0, "an integer >= 0"),
    "repetition_penalty": (lambda value: value > 0, "a number above 0"),
    "no_repeat_ngram_size": (lambda value: value >= 0, "an integer >= 0"),
    "stop": (
        lambda value: all(isinstance(text, str) and text for text in value),
        "texts of at least one character",
    ),
}
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
}


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> Search:
    """The search of `settings` with these changes.

    Where they turn sampling or beam search off, its own settings go with it.

    Raises:
      ValueError: as of Search, a change that says nothing among them.
    """
    merged = {**settings, **changes}
    for setting, (_, names) in _ONLY_WITH.items():
        if setting in changes and changes[setting] == _DEFAULTS[setting]:
            merged |= {name: _DEFAULTS[name] for name in names if name not in changes}
    return Search(**merged)
