"""The stages of models that are trained on their own: LLM and SLM."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING

from l2s_jax.experiment.training import TrainedStage

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from l2s_jax.models.families import ModelConfig
    from l2s_jax.models.systems import LanguageModel, Params


class LanguageModelStage(TrainedStage):
    """A model that is trained on its own: NAME/model is a Hugging Face directory."""

    @abc.abstractmethod
    def starting_point(self) -> tuple[ModelConfig, Params | None]:
        """Config, and parameters unless they are to be random, of what is trained."""

    def make(self) -> None:
        """Trains it."""
        from l2s_jax.checkpoints import pretrained
        from l2s_jax.models.systems import LanguageModel

        learnt = self.learnt()
        config, params = self.starting_point()
        system = LanguageModel(self.name, config)
        start = self.random(system) if params is None else {self.name: params}
        trained = self.fit(system, start, {}, learnt, self.policy())

        def save(directory: str) -> None:
            pretrained.save_hf(config, trained[self.name], directory)
            self.responses.tokenizer.save(directory)

        self.write_model(save)

    def check(self) -> None:
        """An error if the model's files are not whole, or do not fit its tokenizer and the task."""
        from l2s_jax.checkpoints import pretrained

        directory = self.directory
        pretrained.inspect(directory)
        self.fitted(pretrained.read_config(directory), directory)

    def load(self, mesh: Mesh, weights: str) -> tuple[LanguageModel, Params, Params]:
        """(system, parameters, nothing frozen), to generate with on a mesh."""
        from l2s_jax.serving.loading import load_alone

        self.check()
        return load_alone(
            self.name,
            self.directory,
            self.responses.tokenizer,
            dtype=self.context.dtypes[0],
            weights=weights,
            mesh=mesh,
        )
