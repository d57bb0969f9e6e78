"""The stage of an L2S whose LLM is adapted too, on top of the one whose LLM is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from l2s_jax.config import tuned_l2s
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.l2s import BundleStage, L2sStage
from l2s_jax.experiment.stage import Stage


class TunedStage(BundleStage):
    """L2S goes on with a low-rank change of its LLM; the LLM's part is then in the bundle.

    Adapters are trained at config.llm.tune, and beside them projector and SLM, as config.l2s.train
    says of all but steps and learning rate.
    """

    unnamed = (*BundleStage.unnamed, *(f"frozen.{name}" for name in BundleStage.unnamed))
    since = (*BundleStage.since, *(f"frozen.{name}" for name in L2sStage.since))

    def __init__(self, context: Context, frozen: L2sStage):
        super().__init__(
            context,
            "l2s",
            frozen,
            prompts=frozen.prompts,
            responses=frozen.responses,
            lessons=frozen.lessons,
            section=tuned_l2s(context.config),
        )
        self._frozen, self._tune = frozen, context.config.llm.tune

    def inputs(self) -> dict[str, Any]:
        """What it goes on from, what is adapted, what it learns, its training."""
        return {
            "frozen": self._frozen.as_input(),
            "tune": {name: self._tune[name] for name in ("rank", "alpha", "pattern")},
            **self.training_inputs(),
        }

    def known_by(self) -> Iterator[Stage]:
        """Those of the one that it goes on from, whose inputs are among these."""
        return self._frozen.known_by()

    def make(self) -> None:
        """Trains projector, SLM and the LLM's adapters."""
        import jax

        from l2s_jax.cluster import distributed, sharding
        from l2s_jax.models.families import make_module
        from l2s_jax.models.lora import Adapters
        from l2s_jax.models.tuning import Tuned
        from l2s_jax.models.vocabulary import without_vocabulary
        from l2s_jax.serving import bundle
        from l2s_jax.serving.loading import generator_settings

        learnt = self.learnt()
        directory, (dtype, encoder_dtype) = self._frozen.directory, self.context.dtypes
        distributed.on_primary(lambda: self.record.follow(self._frozen.record))
        system, params, frozen = bundle.load(
            directory, dtype=dtype, encoder_dtype=encoder_dtype, mesh=self.context.mesh
        )
        whole = make_module(without_vocabulary(system.slm_config))
        slm_config, _ = self.started((whole, params["slm"]), "slm", directory)
        llm_config = dataclasses.replace(system.llm_config, remat=self.section.train.remat)
        system = dataclasses.replace(system, llm_config=llm_config, slm_config=slm_config)
        settings = self.inputs()["tune"]
        tuned = Tuned(system, Adapters(**settings, where="config.llm.tune.pattern"))
        trained, base = tuned.split(params, frozen, jax.random.key(self.seed))
        trained = self.fit(tuned, trained, base, learnt, self.policy())
        base = sharding.gather_on_primary(base)

        def save(directory: str) -> None:
            bundle.save_whole(
                *tuned.whole(trained, base),
                directory=directory,
                llm_tokenizer=self.prompts.tokenizer,
                slm_tokenizer=self.responses.tokenizer,
                generation=generator_settings(self.context.config),
            )

        self.write_model(save)
