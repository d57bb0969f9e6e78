"""An experiment: the graph of its stages.

    tokenizer -> LLM -> labels -> vocabulary, logits -> SLM alone
                   \\-> features, labels, vocabulary, logits -> L2S

Each stage leaves its result in a folder of its own, is skipped where the result is there and was
made from the same inputs, and continues where it was interrupted:

    DIR/tokenizer/spiece.model  DIR/slm_tokenizer/spiece.model  (where the SLM has its own)
    DIR/llm/model/  DIR/labels/train-*.jsonl  DIR/vocabulary/  DIR/logits/logits-*.array_record
    DIR/slm/model/  DIR/l2s/model/

Stages that learn share DIR/tokens/: the token ids of what they learn, each made once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context, Score
from l2s_jax.experiment.features import FeatureStage
from l2s_jax.experiment.l2s import L2sStage
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.logits import LogitStage
from l2s_jax.experiment.on_policy import OwnResponses
from l2s_jax.experiment.slm import SlmStage
from l2s_jax.experiment.stage import Stage
from l2s_jax.experiment.start import SlmStart
from l2s_jax.experiment.tokenizers import TokenizerStage, check_one_tokenizer
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.experiment.tuned import TunedStage
from l2s_jax.experiment.vocabulary import VocabularyStage

if TYPE_CHECKING:
    from l2s_jax.models.systems import Params, System
    from l2s_jax.serving.generator import Generator
    from l2s_jax.settings.search import Search


class Experiment:
    """The stages of an experiment in its workdir; every result is made, or found, on first use."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        mode: str = "make",
        score: Score | None = None,
        shared: str = "",
    ):
        """`mode`: "make" makes what is missing; with "find", that is an error; "look" is for
        `Stage.state` alone. `score` is what `train.select` "quality" chooses by. `shared` is the
        folder of a comparison that this is a variant of: stages are links to where it keeps them.

        Raises:
          ValueError: a task that no data could have.
        """
        self.context = context = Context(config, workdir, mode, score, shared)
        self.llm_tokenizer = TokenizerStage(
            context, "tokenizer", config.tokenizer, path=config.llm.path
        )
        self.slm_tokenizer = TokenizerStage(
            context,
            "slm_tokenizer",
            config.slm.tokenizer,
            path=config.slm.path,
            otherwise=self.llm_tokenizer,
        )
        self.llm = LlmStage(context, self.llm_tokenizer)
        self.labels = LabelStage(context, self.llm)
        self.vocabulary = VocabularyStage(context, self.slm_tokenizer, self.labels)
        self.logits = LogitStage(
            context, self.llm, self.labels, self.slm_tokenizer, self.vocabulary
        )
        self.features = FeatureStage(context, self.llm)
        self.own_responses = OwnResponses(context, self.llm, self.slm_tokenizer)
        start = SlmStart(context, self.llm)
        learnt = (self.labels, self.vocabulary, self.logits, self.own_responses)
        self.slm = SlmStage(context, start, self.slm_tokenizer, *learnt)
        is_tuned = bool(config.llm.tune.rank)
        self.frozen = L2sStage(
            context,
            "l2s_frozen" if is_tuned else "l2s",
            self.llm,
            start,
            self.slm_tokenizer,
            *learnt,
            self.features,
        )
        self.l2s = TunedStage(context, self.frozen) if is_tuned else self.frozen
        # In the order in which they are made.
        self.stages: tuple[Stage, ...] = (
            self.llm_tokenizer,
            self.slm_tokenizer,
            self.llm,
            self.labels,
            self.vocabulary,
            self.logits,
            self.features,
            self.slm,
            *((self.frozen,) if is_tuned else ()),
            self.l2s,
        )

    @property
    def systems(self) -> tuple[TrainedStage, ...]:
        """The stages whose models answer prompts."""
        return self.llm, self.slm, self.l2s

    def check(self) -> None:
        """Finds out what no run could use of the config, before any work is done.

        Raises:
          ValueError: one line about a setting.
        """
        # Imported here: a look at a workdir doesn't wait for JAX.
        from l2s_jax.experiment.checks import Meshes, check_config
        from l2s_jax.experiment.early import check_division, check_models

        context = self.context
        meshes = Meshes(
            context.mesh, context.feature_mesh, context.decoding_mesh, context.label_mesh
        )
        check_config(context.config, meshes)
        check_models(context.config)
        check_division(context.config, meshes)

    def make(self, until: str = "") -> None:
        """Makes what is missing of the models and what they need, or of all up to one stage.

        No model stays in memory.

        Raises:
          ValueError: the experiment has no such stage.
        """
        if any(stage.name == until and not stage.is_used() for stage in self.stages):
            used = ", ".join(stage.name for stage in self.stages if stage.is_used())
            raise ValueError(f"--until={until}: the config has no such stage, but {used}")
        if until not in ("tokenizer", "slm_tokenizer"):
            self.check_tokenizers()
        for stage in self.stages:
            # Tokenizers, labels, logits and features are made when a model needs them.
            if stage.is_used() and (stage in self.systems or stage.name == until):
                stage.made()
            if stage is self.llm and until not in ("tokenizer", "slm_tokenizer"):
                # What is wrong with an LLM that was there shows before others train.
                self.llm.check()
            if stage.name == until:
                break

    def check_tokenizers(self) -> None:
        """Finds out what the tokenizers, which may be trained for it, say of the config.

        Raises:
          ValueError: a setting that they don't fit.
        """
        self.vocabulary.check()
        self.logits.check()
        self.own_responses.check()
        self.check_exact()

    def evaluation_examples(self) -> Sequence[Example]:
        """The examples that the report is about."""
        settings = self.context.config.evaluation
        return self.context.first(settings.split, settings.max_examples)

    def check_exact(self) -> None:
        """As `check_drafting`, where the config asks for exact decoding."""
        if self.context.config.decoding.search.exact:
            self.check_drafting("config.decoding.search.exact=True", "exact=False")

    def check_drafting(self, what: str, otherwise: str) -> None:
        """Checks that the LLM can decide on what the SLM drafts, as `what` wants it.

        Raises:
          ValueError: the LLM only encodes, or the SLM's vocabulary is another; `otherwise` is what
            else can be asked for.
        """
        if not self.llm.answers:
            raise ValueError(
                f"{what}: {self.llm.directory}: the model has no head or decoder to decide with"
            )
        tokenizers = (self.llm_tokenizer.tokenizer, self.slm_tokenizer.tokenizer)
        check_one_tokenizer(self.context.config, *tokenizers, what, otherwise)

    def exact_generator(self) -> Generator:
        """As `generator`, of L2S and the LLM in exact decoding."""
        llm, parameters, _ = self.loaded(self.llm)
        # What encodes is a part of the LLM.
        l2s, trained = self.l2s.load_without_llm()
        return self._exact_generator(l2s, llm, trained, parameters["llm"])

    def _exact_generator(
        self, l2s: Any, llm: Any, trained: Params, frozen: Params, **settings: Any
    ) -> Generator:
        from l2s_jax.models.exact import Exact
        from l2s_jax.serving.loading import make_generator

        tokenizer, mesh = self.llm.responses.tokenizer, self.context.decoding_mesh
        loaded = Exact(l2s, llm), trained, frozen
        return make_generator(
            self.context.config, loaded, tokenizer, tokenizer, mesh=mesh, **settings
        )

    def generator(
        self, stage: TrainedStage, loaded: tuple[System, Params, Params] | None = None
    ) -> Generator:
        """Text in, text out, with the model of a stage, which is read unless it is `loaded`."""
        from l2s_jax.serving.loading import make_generator
        from l2s_jax.settings.search import alone

        return make_generator(
            self.context.config,
            loaded or self.loaded(stage),
            stage.prompts.tokenizer,
            stage.responses.tokenizer,
            mesh=self.context.decoding_mesh,
            search=alone(self.context.config.decoding.search.to_dict()),
        )

    def loaded(self, stage: TrainedStage) -> tuple[System, Params, Params]:
        """(system, trained, frozen) of a stage, to generate with; read anew by every call."""
        return stage.load(self.context.decoding_mesh, self.context.config.decoding.weights)

    def side_by_side(self, exact: Search | None = None) -> dict[str, Generator]:
        """Generators of all that answers, by system; `exact` is the search of exact decoding.

        What several of them read is in memory once: a large LLM is most of all there is.
        """
        generators = {}
        if self.llm.answers:
            generators["llm"] = self.generator(self.llm)
        generators["slm"] = self.generator(self.slm)
        loaded = None
        if self._encodes_as_llm():
            from l2s_jax.checkpoints.pretrained import encoder_part

            system, trained = self.l2s.load_without_llm()
            held = generators["llm"].trained["llm"]
            loaded = system, trained, encoder_part(system.llm_config, held)
        l2s = generators["l2s"] = self.generator(self.l2s, loaded)
        if exact:
            llm = generators["llm"]
            generators["exact"] = self._exact_generator(
                l2s.system, llm.system, l2s.trained, llm.trained["llm"], search=exact, served=True
            )
        return generators

    def _encodes_as_llm(self) -> bool:
        """Whether what encodes for L2S is a part of the LLM that answers, as it is held."""
        if not self.llm.answers or self.context.config.llm.tune.rank:
            return False
        dtype, encoder_dtype = self.context.dtypes
        return dtype == encoder_dtype and self.l2s.reads_llm == self.llm.content
