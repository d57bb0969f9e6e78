"""The stage of an SLM that is trained alone, on the labels that L2S learns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from l2s_jax.experiment.context import Context
from l2s_jax.experiment.language_model import LanguageModelStage
from l2s_jax.experiment.lessons import Lessons
from l2s_jax.experiment.start import SlmStart
from l2s_jax.experiment.tokenizers import TokenizerStage

if TYPE_CHECKING:
    from l2s_jax.models.families import ModelConfig
    from l2s_jax.models.systems import Params


class SlmStage(LanguageModelStage):
    """The SLM alone."""

    since = (*LanguageModelStage.since, "labels.splits")

    def __init__(
        self, context: Context, start: SlmStart, tokenizer: TokenizerStage, lessons: Lessons
    ):
        super().__init__(
            context,
            "slm",
            *(*start.needs, tokenizer.source, *lessons.needs),
            prompts=tokenizer,
            responses=lessons.vocabulary,
            lessons=lessons,
        )
        self._start = start

    def inputs(self) -> dict[str, Any]:
        """What it starts from, its training, what it learns."""
        return {**self._start.inputs(), **self.training_inputs(), **self.lora_inputs()}

    def starting_point(self) -> tuple[ModelConfig, Params | None]:
        """What L2S starts from too."""
        return self.started(self._start.load(), "slm", self._start.where)
