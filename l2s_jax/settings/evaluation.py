"""What a report is about: the examples, the metrics and what is timed."""

from __future__ import annotations

import dataclasses
import re

from l2s_jax.settings import limits
from l2s_jax.settings.declare import Section, setting

METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "rougeLsum", "exact_match", "comet")
# sacreBLEU's names, but for "auto".
BLEU_TOKENIZERS = (
    *("auto", "13a", "intl", "zh", "ja-mecab", "ko-mecab"),
    *("flores101", "flores200", "spBLEU-1K", "char", "none"),
)
DEFAULT_TOKENIZER = "13a"
# By the first part of a language's code, of two letters or three.
_TOKENIZERS = {
    **dict.fromkeys(("zh", "zho", "chi", "cmn", "yue"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    # No spaces between words, and no tokenizer of their own.
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod"), "flores200"),
}


@dataclasses.dataclass(frozen=True)
class Latency(Section):
    """What is timed, on random prompts."""

    batch_size: int = setting(
        8, "The larger batch, beside batch 1.", at_least=1, at_most=limits.ROWS
    )
    prompt_tokens: int = setting(32, "Tokens of each prompt.", at_least=1, at_most=limits.TOKENS)
    new_tokens: int = setting(32, "Tokens of each response.", at_least=1, at_most=limits.TOKENS)
    repeats: int = setting(20, "How often; the medians are reported.", at_least=1)


@dataclasses.dataclass(frozen=True)
class Evaluation(Section):
    """What the report is about."""

    split: str = setting("test", "Split of the task.", one_of=("train", "validation", "test"))
    max_examples: int = setting(0, "Examples of it; 0: all.", at_least=0)
    validation_examples: int = setting(
        2000, "Of the validation split, while training; 0: all.", at_least=0
    )
    samples: int = setting(
        3, "Of these, whose answers are written down at each validation; 0: none.", at_least=0
    )
    metrics: tuple[str, ...] = setting(
        ("bleu", "chrf"),
        "Measures of quality; the first is the primary one.",
        fits=lambda names: bool(names) and all(name in METRICS for name in names),
        expected=f"some of {METRICS}",
    )
    bleu_tokenizer: str = setting(
        "auto",
        "How BLEU finds words, by sacreBLEU's name; auto: as `task.language` wants it, 13a if that "
        "is not known.",
        one_of=BLEU_TOKENIZERS,
    )
    comet: str = setting("", "Folder of the checkpoint that COMET scores with.", is_path=True)
    dial: tuple[float, ...] = setting(
        (0.0, 0.1, 0.3, 0.5, 0.7, 0.9),
        "Draft tolerances that `--mode=dial` measures.",
        fits=lambda tolerances: bool(tolerances) and all(map(_is_share, tolerances)),
        expected="numbers from 0 to 1",
        added=True,
    )
    dial_requests: int = setting(
        50, "Prompts of the split that it times, one by one.", at_least=1, added=True
    )
    latency: Latency = Latency()

    def conflict(self) -> str:
        """A metric without what it needs."""
        if "comet" in self.metrics and not self.comet:
            return f"comet='' with metrics={self.metrics}: expected the folder of a checkpoint"
        return ""


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def bleu_tokenizer(setting: str, language: str) -> str:
    """sacreBLEU's name of the tokenizer that `evaluation.bleu_tokenizer` asks for.

    "auto" is that of the language of the responses, which is a code such as "ja" or "zh-Hans".
    """
    if setting != "auto":
        return setting
    return _TOKENIZERS.get(re.split("[-_]", language)[0], DEFAULT_TOKENIZER)
