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

from ml_collections import ConfigDict

from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context, Score
from l2s_jax.experiment.features import FeatureStage
from l2s_jax.experiment.l2s import L2sStage
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.lessons import Lessons
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
        own_responses = OwnResponses(context, self.llm, self.slm_tokenizer)
        self.lessons = Lessons(self.labels, self.vocabulary, self.logits, own_responses)
        start = SlmStart(context, self.llm)
        self.slm = SlmStage(context, start, self.slm_tokenizer, self.lessons)
        is_tuned = bool(config.llm.tune.rank)
        self.frozen = L2sStage(
            context,
            "l2s_frozen" if is_tuned else "l2s",
            self.llm,
            start,
            self.slm_tokenizer,
            self.lessons,
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

    def check(self, until: str = "") -> None:
        """Finds out what no run could use of the config, before any work is done.

        Raises:
          ValueError: one line about a setting, or there is no stage `until`.
        """
        names = [stage.name for stage in self.stages if stage.is_used()]
        if until and until not in names:
            raise ValueError(
                f"--until={until}: the config has no such stage, but {', '.join(names)}"
            )
        # Imported here: a look at a workdir doesn't wait for JAX.
        from l2s_jax.cluster import distributed
        from l2s_jax.experiment.checks import Meshes, check_config, check_examples
        from l2s_jax.experiment.early import check_division, check_models

        context = self.context
        meshes = Meshes(
            context.mesh, context.feature_mesh, context.decoding_mesh, context.label_mesh
        )
        check_config(context.config, meshes)
        check_models(context.config)
        check_division(context.config, meshes)
        if context.mode == "make" and distributed.on_primary(self.makes_batches):
            check_examples(context.config, context.count("train"))

    def makes_batches(self) -> bool:
        """Whether a model is missing that was trained in batches of the size that is asked for."""

        def is_there(stage: TrainedStage) -> bool:
            found = (stage.record.read() or {}).get("train", {})
            return stage.is_made() and found.get("batch_size") == stage.section.train.batch_size

        return not all(is_there(stage) for stage in self.systems if stage.is_used())

    def make(self, until: str = "") -> None:
        """Makes what is missing of the models and what they need, or of all up to one stage.

        No model stays in memory.
        """
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
          ValueError: there is none, the text does not give one, or a setting does not fit them.
        """
        for stage in (self.llm_tokenizer, self.slm_tokenizer):
            _ = stage.tokenizer
        self.lessons.check()
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
