"""How a system is trained, and which of its parameters."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from l2s_jax.settings import limits
from l2s_jax.settings.declare import Section, setting

# Of inverse_sqrt without a warm-up: of one step, the rate would be down to 3% at step 1,000.
DEFAULT_TIMESCALE = 1000


def _are_patterns(patterns: tuple[Any, ...]) -> bool:
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f"{pattern!r} is no pattern, but a {type(pattern).__name__}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return True


def _are_scales(pairs: tuple[Any, ...]) -> bool:
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        return False
    for pattern, factor in pairs:
        if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise ValueError(f"the factor of {pattern!r} is {factor!r}")
    return _are_patterns(tuple(pattern for pattern, _ in pairs))


@dataclasses.dataclass(frozen=True)
class Train(Section):
    """How one system is trained."""

    steps: int = setting(0, "Updates; 0 leaves an LLM from a directory as it is.", at_least=0)
    batch_size: int = setting(
        64, "Examples per update, over all devices.", at_least=1, at_most=limits.ROWS
    )
    accumulation: int = setting(
        1, "Parts that a batch is taken in, one after another, to save memory.", at_least=1
    )
    optimizer: str = setting("adamw", "The optimizer.", one_of=("adamw", "adafactor"))
    learning_rate: float = setting(1e-2, "Its peak.", above=0)
    parameter_scale: bool = setting(
        True, "The learning rate is relative to each parameter's own size."
    )
    schedule: str = setting(
        "cosine",
        "What the learning rate does after the warm-up: fall to zero at `steps`, fall as "
        "1/sqrt(step), or stay.",
        one_of=("cosine", "inverse_sqrt", "constant"),
    )
    warmup_steps: int = setting(0, "Steps of its linear rise from zero.", at_least=0)
    timescale: int = setting(
        0,
        "Steps after which inverse_sqrt has fallen to 71%, counted from the end of the warm-up; 0: "
        f"as many as `warmup_steps`, or {DEFAULT_TIMESCALE} without a warm-up.",
        at_least=0,
        added=True,
    )
    adam_b2: float = setting(
        0.98, "Decay of AdamW's mean of squared gradients.", at_least=0, below=1
    )
    weight_decay: float = setting(0.0, "Of matrices.", at_least=0)
    clip_norm: float = setting(
        1.0, "Most that the global gradient's norm may be; 0: anything.", at_least=0
    )
    label_smoothing: float = setting(
        0.0, "Share of a target that all tokens have alike.", at_least=0, below=1
    )
    dropout_rate: float = setting(0.1, "Share of what is dropped.", at_least=0, below=1)
    ema_decay: float = setting(
        0.0,
        "Of averaged parameters, which the run then returns; 0: it returns the last ones.",
        at_least=0,
        below=1,
    )
    evaluate_every: int = setting(
        1000, "Steps between validations, each with a checkpoint.", at_least=1
    )
    log_every: int = setting(10, "Steps between lines of metrics.", at_least=1)
    save_minutes: float = setting(
        10.0,
        "Minutes after which a checkpoint is saved besides those of validations, from one to the "
        "next; 0: none.",
        at_least=0,
        added=True,
    )
    max_bad_steps: int = setting(
        0,
        "Steps in a row whose loss or gradient is not finite that are left out; one more ends the "
        "run.",
        at_least=0,
        added=True,
    )
    remat: bool = setting(
        False,
        "Of each layer, only what enters it is kept for the gradient, and the rest is computed "
        "again: less memory, a third more work.",
    )
    select: str = setting(
        "best",
        "The checkpoint that a run returns: best, that of the best accuracy per token on the "
        "validation split; quality, that whose responses to prompts of it score best on the "
        "primary metric; last.",
        one_of=("best", "quality", "last"),
    )
    selection_examples: int = setting(
        200,
        "Examples of the validation split that are answered for it at each validation.",
        at_least=1,
        added=True,
    )
    trainable: tuple[str, ...] = setting(
        (),
        "Regular expressions over whole parameter paths (`slm/decoder/.*`): these are trained; "
        "without any, all are.",
        fits=_are_patterns,
        expected="a tuple of patterns",
    )
    learning_rate_scales: tuple[tuple[str, float], ...] = setting(
        (),
        "Pairs of such an expression and a factor on the learning rate; the first match counts.",
        fits=_are_scales,
        expected="pairs of a pattern and a factor, a positive number",
    )

    def conflict(self) -> str:
        """A batch that cannot be taken in parts."""
        if self.batch_size % self.accumulation:
            return (
                f"batch_size={self.batch_size}: expected a multiple of "
                f"accumulation={self.accumulation}"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class TrainAlways(Train):
    """How a system is trained that no directory holds yet."""

    steps: int = setting(1000, "Updates.", at_least=1)


_PATTERN = ".*(attention|feed_forward)/.*kernel"


# Where the parameters of a change of the LLM are.
TUNED = "llm_lora"


@dataclasses.dataclass(frozen=True)
class Tune(Section):
    """A second stage of L2S's training, in which LoRA changes what encodes of the LLM too."""

    rank: int = setting(0, "Rank of the change of a kernel; 0: the LLM stays frozen.", at_least=0)
    alpha: float = setting(16.0, "The change is multiplied by alpha / rank.", above=0)
    pattern: str = setting(
        _PATTERN,
        "Regular expression over whole paths in the LLM: the kernels that are changed.",
        fits=lambda pattern: _are_patterns((pattern,)),
        expected="a pattern",
    )
    steps: int = setting(
        1000,
        "Updates; all else is as `l2s.train` says, but that the change of the LLM is always "
        "trained, and a warm-up takes half of them at most.",
        at_least=1,
    )
    learning_rate: float = setting(1e-4, "Its peak, of all that is trained then.", above=0)


@dataclasses.dataclass(frozen=True)
class Lora(Section):
    """LoRA: kernels stay as they are, and get a change of low rank (Hu et al. 2021, 2106.09685)."""

    rank: int = setting(0, "Rank of the change of a kernel; 0: kernels are trained.", at_least=0)
    alpha: float = setting(16.0, "The change is multiplied by alpha / rank.", above=0)
    pattern: str = setting(
        _PATTERN,
        "Regular expression over whole paths: the kernels that are changed.",
        fits=lambda pattern: _are_patterns((pattern,)),
        expected="a pattern",
    )

    def conflict_with(self, train: Train) -> str:
        """A training that would change nothing."""
        if self.rank and train.parameter_scale:
            return (
                f"lora.rank={self.rank} with train.parameter_scale=True: expected False, "
                "LoRA's matrices start at zero and updates relative to their size would be none"
            )
        return ""
