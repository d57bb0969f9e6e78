"""The stage of an SLM that is trained alone, on the labels that L2S learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2s_jax.data.tasks import Example
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.logits import LogitStage
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.training import LanguageModelStage


def start_inputs(context: Context) -> dict[str, Any]:
    """What an SLM starts from."""
    section = context.config.slm
    if section.path:
        return {"slm": {"path_hash": context.checkpoint(section.path)}}
    return {"slm": section.model.to_dict()}


class SlmStage(LanguageModelStage):
    """The SLM alone."""

    def __init__(
        self,
        context: Context,
        tokenizer: TokenizerStage,
        labels: LabelStage,
        logits: LogitStage,
    ):
        needs = (tokenizer.source, labels, logits)
        super().__init__(context, "slm", *needs, prompts=tokenizer, responses=tokenizer)
        self._labels = labels
        self._logits = self.teacher = logits

    def inputs(self) -> dict[str, Any]:
        """What it starts from, what it learns, its training."""
        return {
            **start_inputs(self.context),
            **self._labels.learnt_inputs(),
            **self._logits.learnt_inputs(),
            **self.training_inputs(self._labels.content()),
            **self.lora_inputs(),
        }

    def examples(self) -> Sequence[Example]:
        """The labels."""
        return self._labels.examples()
