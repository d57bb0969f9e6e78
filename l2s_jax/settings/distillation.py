"""What is learnt of the LLM beside labels: its distribution over the next token."""

from __future__ import annotations

import dataclasses

from l2s_jax.settings import limits
from l2s_jax.settings.declare import Section, setting


@dataclasses.dataclass(frozen=True)
class Distillation(Section):
    """What the SLM alone and L2S learn alike of the LLM's distributions."""

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
        32,
        "Examples that the LLM reads at a time, on the devices of `labels.mesh`.",
        at_least=1,
        at_most=limits.ROWS,
    )
    # Agarwal et al. 2024, arXiv 2306.13649.
    on_policy: float = setting(
        0.0,
        "Share of the batches whose responses the model in training writes itself: on these it "
        "learns nothing but the LLM's distributions over the next token. `weight` is about the "
        "other batches.",
        at_least=0,
        below=1,
        added=True,
    )
