"""The stage of L2S: a projector and an SLM that are trained together on the frozen LLM's H."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

from l2s_jax.experiment.context import Context
from l2s_jax.experiment.features import FeatureStage
from l2s_jax.experiment.lessons import Lessons
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.start import SlmStart
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.files import absolute

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from l2s_jax.models.systems import LlmToSlm, Params


class BundleStage(TrainedStage):
    """A stage of L2S that learns the labels; its model is what `l2s_jax.load` reads."""

    since = (*TrainedStage.since, "labels.splits")

    def load(self, mesh: Mesh, weights: str) -> tuple[LlmToSlm, Params, Params]:
        """(system, trained parameters, the LLM's frozen ones), to generate with on a mesh."""
        from l2s_jax.serving import bundle

        dtype, encoder_dtype = self.context.dtypes
        return bundle.load(
            self.directory,
            dtype=dtype,
            encoder_dtype=encoder_dtype,
            weights=weights,
            mesh=mesh,
            scan_layers=self.context.config.scan_layers,
            llm_hash=self._llm_hash,
        )

    @property
    def _llm_hash(self) -> str | None:
        """The content hash of the LLM that is there: one process of a job reads it, once."""
        from l2s_jax.serving import bundle

        return self.context.checkpoint(bundle.llm_path(self.directory))

    def load_without_llm(self) -> tuple[LlmToSlm, Params]:
        """(system, trained parameters), for an LLM that is in memory, layer by layer."""
        from l2s_jax.serving import bundle

        dtype, _ = self.context.dtypes
        system, trained, _ = bundle.load(
            self.directory, dtype=dtype, entries=(), llm_hash=self._llm_hash
        )
        return system, trained

    @property
    def reads_llm(self) -> str:
        """The content hash of the LLM whose H the model reads."""
        from l2s_jax.serving import bundle

        return bundle.llm_hash(self.directory)


class L2sStage(BundleStage):
    """LLM-to-SLM with a frozen LLM."""

    def __init__(
        self,
        context: Context,
        name: str,
        llm: LlmStage,
        start: SlmStart,
        tokenizer: TokenizerStage,
        lessons: Lessons,
        features: FeatureStage,
    ):
        super().__init__(
            context,
            name,
            *(llm, tokenizer.source, *lessons.needs, features),
            prompts=llm.prompts,
            responses=lessons.vocabulary,
            lessons=lessons,
            section=context.config.l2s,
        )
        self._llm, self._start, self._tokenizer = llm, start, tokenizer
        self._features = features

    @property
    def shared_vocabulary(self) -> bool:
        """Whether LLM and SLM have the same tokenizer, of which responses may have a part."""
        return self.prompts.tokenizer.fingerprint == self._tokenizer.tokenizer.fingerprint

    def inputs(self) -> dict[str, Any]:
        """The LLM, what the SLM starts from, what is learnt, how they are joined and trained."""
        return {
            **self._start.inputs(),
            **self._features.learnt_inputs(),
            **self.training_inputs(),
            **self.lora_inputs(),
            "llm_hash": self._llm.content,
            "layer": self._llm.section.layer,
            # (Not the encoder's dtype: H is nearly the same in either.)
            "fusion": self.section.fusion,
            "projector_width": self.section.projector_width,
            **{name: value for name, value in self._joined().items() if value},
            **({"zero_start": True} if self.section.zero_start else {}),
        }

    def _joined(self) -> dict[str, Any]:
        """How H comes to the SLM, beside fusion and the projector's width."""
        return {name: self.section[name] for name in ("layers", "normalize", "stack")}

    def make(self) -> None:
        """Trains projector and SLM."""
        import jax

        from l2s_jax.models.systems import LanguageModel, LlmToSlm
        from l2s_jax.serving import bundle
        from l2s_jax.serving.loading import generator_settings

        cached = self._features.is_used()
        learnt = self.learnt(self._features.put_into if cached else None)
        llm, _ = self._llm.encoder(entries=())
        slm_config, slm = self.started(self._start.load(), "slm", self._start.where)
        system = LlmToSlm(
            llm_config=llm.config,
            slm_config=slm_config,
            projector_width=self.section.projector_width or slm_config.width,
            fusion=self.section.fusion,
            shared_vocabulary=self.shared_vocabulary,
            **self._joined(),
        )
        if slm is None:
            # The SLM alone starts from the same.
            slm = self.random(LanguageModel("slm", slm_config))["slm"]
        read = jax.eval_shape(system.init, jax.random.key(0))["slm"]
        params = self.random(system, without=["slm"]) | {"slm": {name: slm[name] for name in read}}
        if self.section.zero_start:
            projector = params["projector"]
            projector["outward"] = jax.tree.map(lambda x: 0 * x, projector["outward"])
        del slm  # with fusion "cross", an encoder that nobody reads
        policy = self.policy()
        _, frozen = self._llm.encoder(
            entries=system.beside_hidden if cached else None,
            whole=policy.params if policy else None,
        )
        trained = self.fit(system, params, frozen, learnt, policy)
        del policy, frozen
        # A model and an LLM of the same workdir stay together when the workdir is moved.
        inside = os.path.join(absolute(self.context.workdir), "llm", "model")
        llm_path = self._llm.reference
        self.write_model(
            functools.partial(
                bundle.save,
                system,
                trained,
                llm_path="../../llm/model" if llm_path == inside else llm_path,
                llm_hash=str(self._llm.content),
                layer=self._llm.layer,
                llm_tokenizer=self.prompts.tokenizer,
                slm_tokenizer=self.responses.tokenizer,
                generation=generator_settings(self.context.config),
            )
        )
