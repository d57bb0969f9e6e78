"""The stage of evaluation: what all systems answer, and the report on it."""

from __future__ import annotations

import os
from typing import Any

from ml_collections import ConfigDict

from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.files import is_file
from l2s_jax.settings.evaluation import DEFAULT_TOKENIZER, bleu_tokenizer


def deciding(config: ConfigDict) -> dict[str, Any]:
    """The settings of decoding that answers depend on; the others say how they are computed."""
    settings = config.decoding.to_dict()
    return {key: value for key, value in settings.items() if key not in ("batch_size", "mesh")}


class EvaluationStage(RecordedStage):
    """DIR/report.json and DIR/predictions/, where the record is.

    It is made anew by every run that asks for it: times are measured, not found.
    """

    since = ("truncate", "comet", "references")

    def __init__(self, experiment: Experiment):
        systems = experiment.systems
        super().__init__(experiment.context, "evaluation", *systems, folder="predictions")
        self._experiment = experiment

    def inputs(self) -> dict[str, Any]:
        """The models, the examples, how they are decoded and scored."""
        config = self.context.config
        settings = config.evaluation
        split, limit = settings.split, settings.max_examples
        tokenizer = bleu_tokenizer(settings.bleu_tokenizer, config.task.language)
        return {
            "models": {
                stage.name: self.context.checkpoint(stage.directory)
                for stage in self._experiment.systems
            },
            "data": {split: self.context.content(split, limit=limit)},
            "references": {split: self.context.references(split, limit=limit)},
            **self._control(split, limit),
            "max_prompt_tokens": config.max_prompt_tokens,
            "truncate": config.task.truncate.to_dict(),
            "decoding": deciding(config),
            "metrics": settings.metrics,
            "comet": settings.comet,
            **({} if tokenizer == DEFAULT_TOKENIZER else {"bleu_tokenizer": tokenizer}),
        }

    def _control(self, split: str, limit: int) -> dict[str, Any]:
        """An input where prompts repeat, which once had H of their own for a control."""
        repeats = self.context.repeats(split, limit=limit)
        return {} if repeats is False else {"control": repeats and "by prompt"}

    def is_made(self) -> bool:
        """Whether there is a report."""
        return is_file(os.path.join(self.context.workdir, "report.json"))

    def progress(self) -> str:
        """A report is made in one go."""
        return ""

    def remake(self) -> None:
        """Makes it, whether or not there is one."""
        with self.telling("evaluating", anew=True):
            self.make()

    def make(self) -> None:
        """Measures all systems and writes the report."""
        from l2s_jax.cluster import distributed
        from l2s_jax.evaluation.evaluate import evaluate

        evaluate(self._experiment)
        inputs = self.inputs()
        distributed.on_primary(lambda: self.record.write(inputs, self.version))
