"""The stage of an SLM that is trained alone, on the labels that L2S learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.language_model import LanguageModelStage
from l2s_jax.experiment.logits import LogitStage
from l2s_jax.experiment.on_policy import OwnResponses
from l2s_jax.experiment.start import SlmStart
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.vocabulary import VocabularyStage

if TYPE_CHECKING:
    from l2s_jax.models.families import ModelConfig
    from l2s_jax.models.systems import Params


class SlmStage(LanguageModelStage):
    """The SLM alone."""

    since = (*LanguageModelStage.since, "labels.splits")
    own_responses: OwnResponses

    def __init__(
        self,
        context: Context,
        start: SlmStart,
        tokenizer: TokenizerStage,
        labels: LabelStage,
        vocabulary: VocabularyStage,
        logits: LogitStage,
        own_responses: OwnResponses,
    ):
        needs = (*start.needs, tokenizer.source, labels, vocabulary, logits, *own_responses.needs)
        super().__init__(context, "slm", *needs, prompts=tokenizer, responses=vocabulary)
        self._start, self._labels, self._logits = start, labels, logits
        self.teacher, self.own_responses = logits, own_responses

    def inputs(self) -> dict[str, Any]:
        """What it starts from, what it learns, its training."""
        return {
            **self._start.inputs(),
            **self._labels.learnt_inputs(),
            **self._logits.learnt_inputs(),
            **self.own_responses.inputs(),
            **self.training_inputs(self._labels.content()),
            **self.lora_inputs(),
        }

    def starting_point(self) -> tuple[ModelConfig, Params | None]:
        """What L2S starts from too."""
        return self.started(self._start.load(), "slm", self._start.where)

    def examples(self) -> Sequence[Example]:
        """The labels."""
        return self._labels.examples()

    def validation(self) -> Sequence[Example]:
        """Labels too."""
        return self._labels.validation_of(self.record)
