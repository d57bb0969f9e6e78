"""The stage of L2S: a projector and an SLM that are trained together on the frozen LLM's H."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.data.tasks import Example
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.features import FeatureStage
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.logits import LogitStage
from l2s_jax.experiment.slm import start_inputs
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.training import TrainedStage

if TYPE_CHECKING:
    from l2s_jax.models.systems import LlmToSlm, Params


class L2sStage(TrainedStage):
    """LLM-to-SLM: l2s/model is what `l2s_jax.load` reads."""

    def __init__(
        self,
        context: Context,
        llm: LlmStage,
        tokenizer: TokenizerStage,
        labels: LabelStage,
        logits: LogitStage,
        features: FeatureStage,
    ):
        needs = (llm, tokenizer.source, labels, logits, features)
        super().__init__(context, "l2s", *needs, prompts=llm.prompts, responses=tokenizer)
        self._llm, self._labels, self._features = llm, labels, features
        self._logits = self.teacher = logits

    @property
    def shared_vocabulary(self) -> bool:
        """Whether LLM and SLM have the same tokenizer."""
        return self.prompts.tokenizer.fingerprint == self.responses.tokenizer.fingerprint

    def inputs(self) -> dict[str, Any]:
        """The LLM, what the SLM starts from, what is learnt, how they are joined and trained."""
        return {
            **start_inputs(self.context),
            **self._labels.learnt_inputs(),
            **self._logits.learnt_inputs(),
            **self._features.learnt_inputs(),
            **self.training_inputs(self._labels.content()),
            **self.lora_inputs(),
            "llm_hash": self._llm.content,
            "layer": self._llm.section.layer,
            # (Not the encoder's dtype: H is nearly the same in either.)
            "fusion": self.section.fusion,
            "projector_width": self.section.projector_width,
        }

    def examples(self) -> Sequence[Example]:
        """The labels."""
        return self._labels.examples()

    def make(self) -> None:
        """Trains projector and SLM."""
        from l2s_jax.models.systems import LlmToSlm
        from l2s_jax.serving import bundle
        from l2s_jax.serving.loading import generator_settings

        llm, _ = self._llm.encoder(entries=())
        slm_config, slm_params = self.starting_point("slm")
        system = LlmToSlm(
            llm_config=llm.config,
            slm_config=slm_config,
            projector_width=self.section.projector_width or slm_config.width,
            fusion=self.section.fusion,
            shared_vocabulary=self.shared_vocabulary,
        )
        params = self.random(system)
        if slm_params is not None:
            params = {**params, "slm": {k: slm_params[k] for k in params["slm"]}}
        cached = self._features.is_used()
        _, frozen = self._llm.encoder(entries=system.beside_hidden if cached else None)
        prepare = self._features.put_into if cached else None
        trained = self.fit(system, params, frozen, prepare)
        # A model and an LLM of the same workdir stay together when the workdir is moved.
        inside = os.path.join(os.path.abspath(self.context.workdir), "llm", "model")
        llm_path = self._llm.reference
        self.write_model(
            functools.partial(
                bundle.save,
                system,
                trained,
                llm_path="../../llm/model" if llm_path == inside else llm_path,
                llm_hash=str(self._llm.content),
                layer=self._llm.section.layer,
                llm_tokenizer=self.prompts.tokenizer,
                slm_tokenizer=self.responses.tokenizer,
                generation=generator_settings(self.context.config),
            )
        )

    @functools.cached_property
    def loaded(self) -> tuple[LlmToSlm, Params, Params]:
        """(system, trained parameters, the LLM's frozen ones), to generate with."""
        from l2s_jax.serving import bundle
        from l2s_jax.serving.loading import where_to_read

        config, (dtype, encoder_dtype) = self.context.config, self.context.dtypes
        return bundle.load(
            self.directory,
            dtype=dtype,
            encoder_dtype=encoder_dtype,
            mesh=where_to_read(self.context.decoding_mesh, config.decoding.weights),
            scan_layers=config.scan_layers,
        )
