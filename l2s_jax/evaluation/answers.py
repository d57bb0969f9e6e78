"""The stage of one system's answers to the examples of a report, in a comparison of runs."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

from l2s_jax import models, sealed
from l2s_jax.evaluation.stage import deciding
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.files import is_file, json_object, read_bytes

_FILE = "predictions.jsonl"


class Answers(NamedTuple):
    """What a system answers.

    responses: one for each example.
    cut_share: share of them that `decoding.max_new_tokens` cut off.
    """

    responses: list[str]
    cut_share: float


class AnswerStage(RecordedStage):
    """DIR/answers_SYSTEM/predictions.jsonl, in the order of the examples."""

    since = ("truncate",)

    def __init__(self, experiment: Experiment, system: TrainedStage):
        super().__init__(experiment.context, f"answers_{system.name}", system)
        self._experiment, self._system = experiment, system

    @property
    def _path(self) -> str:
        return os.path.join(self.record.directory, _FILE)

    def inputs(self) -> dict[str, Any]:
        """The model, the examples, how they are decoded."""
        config, system = self.context.config, self._system
        settings = config.evaluation
        limit = settings.max_examples
        return {
            "model": self.context.checkpoint(system.directory),
            "models": models.VERSION,
            "tokenizer": [system.prompts.tokenizer.identity, system.responses.tokenizer.identity],
            "data": {settings.split: self.context.content(settings.split, limit=limit)},
            "max_prompt_tokens": config.max_prompt_tokens,
            "truncate": config.task.truncate.to_dict(),
            "decoding": deciding(config),
            "dtypes": list(map(str, self.context.dtypes)),
        }

    def is_made(self) -> bool:
        """Whether the answers are there."""
        return is_file(self._path)

    def progress(self) -> str:
        """They are made in one go."""
        return ""

    def make(self) -> None:
        """Has the system answer; the processes of a job share the work."""
        from l2s_jax.cluster import distributed
        from l2s_jax.evaluation.evaluate import write_predictions
        from l2s_jax.evaluation.generators import generator_of
        from l2s_jax.serving.refilled import Refilled

        examples = self._experiment.evaluation_examples()
        outputs = Refilled(generator_of(self._experiment, self._system)).generate(
            [example.prompt for example in examples],
            description=f"evaluating {self._system.name}",
            shared=True,
        )

        def write() -> None:
            with sealed.writing(*os.path.split(self._path)):
                write_predictions(self._path, examples, outputs)

        distributed.on_primary(write)


def read_answers(folder: str) -> Answers:
    """What is in the folder of an AnswerStage that is made.

    Raises:
      ValueError: it is not what was written.
    """
    path = os.path.join(folder, _FILE)
    sealed.check(path)
    responses, cut = [], []
    for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
        record = json_object(line, f"{path}:{number}")
        if not isinstance(record.get("response"), str) or type(record.get("cut")) is not bool:
            raise ValueError(
                f"{path}:{number}: no answer; expected the keys 'response' and 'cut': remove "
                "the file, and the same command makes it again"
            )
        responses.append(record["response"])
        cut.append(record["cut"])
    if not cut:
        raise ValueError(f"{path}: no answers; remove it, and the same command makes it again")
    return Answers(responses, sum(cut) / len(cut))
