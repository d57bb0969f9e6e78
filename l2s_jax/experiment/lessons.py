"""What SLM and L2S learn from, alone and together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from l2s_jax.data.table import Example
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.logits import LogitStage
from l2s_jax.experiment.on_policy import OwnResponses
from l2s_jax.experiment.vocabulary import VocabularyStage
from l2s_jax.experiment.workdir import Record


class Lessons:
    """Labels, and the LLM's distributions over their tokens and over what a model writes itself.

    Attributes:
      vocabulary: with which pieces responses are written.
      needs: the stages that all of it is made from.
    """

    def __init__(
        self,
        labels: LabelStage,
        vocabulary: VocabularyStage,
        teacher: LogitStage,
        own_responses: OwnResponses,
    ):
        self.labels, self.vocabulary = labels, vocabulary
        self.teacher, self.own_responses = teacher, own_responses
        self.needs = (labels, vocabulary, teacher, *own_responses.needs)

    def inputs(self) -> dict[str, Any]:
        """Inputs of the stages that learn it, beside the content of the data."""
        return {
            **self.labels.learnt_inputs(),
            **self.teacher.learnt_inputs(),
            **self.own_responses.inputs(),
        }

    def examples(self) -> Sequence[Example]:
        """The labels of the train split."""
        return self.labels.examples()

    def validation(self, record: Record) -> Sequence[Example]:
        """Those by which checkpoints of the stage with this record are compared: labels too."""
        return self.labels.validation_of(record)

    def check(self) -> None:
        """Finds out, before anything is trained, what the tokenizers say of it.

        Raises:
          ValueError: a setting that they don't fit.
        """
        self.vocabulary.check()
        self.teacher.check()
        self.own_responses.check()

    def report(self) -> dict[str, Any]:
        """What the report says of the LLM's distributions."""
        return self.teacher.report() | self.own_responses.report()
