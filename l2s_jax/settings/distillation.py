"""What is learnt of the LLM beside labels: its distribution over the next token."""

from __future__ import annotations

import dataclasses

from l2s_jax.settings.declare import Section, setting


@dataclasses.dataclass(frozen=True)
class Distillation(Section):
    """Logit distillation, of the SLM alone and of L2S alike."""

    weight: float = setting(
        0.0,
        "Share of the loss that is the divergence from the LLM's distributions over the next "
        "token; the rest is cross entropy on the labels. 0: there is none, 1: nothing else.",
        at_least=0,
        at_most=1,
    )
    temperature: float = setting(
        1.0,
        "Both models' logits are divided by it, for the divergence; above 1, unlikely tokens count "
        "more.",
        above=0,
    )
    top_k: int = setting(
        32,
        "The LLM's likeliest tokens that are kept at each token of a response; the others are one "
        "outcome together.",
        at_least=1,
    )
    batch_size: int = setting(
        32, "Examples that the LLM reads at a time, on the devices of `labels.mesh`.", at_least=1
    )
