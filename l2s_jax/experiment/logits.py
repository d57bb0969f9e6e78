"""The stage of logits: the LLM's distributions over the tokens of the responses that are learnt."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from l2s_jax import models
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.on_policy import check_teacher
from l2s_jax.experiment.stage import RecordedStage, log
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.vocabulary import VocabularyStage
from l2s_jax.experiment.workdir import differences
from l2s_jax.files import is_file, plain, read_json, write_json
from l2s_jax.tokenizers.cut import as_whole, kept_by


class LogitStage(RecordedStage):
    """DIR/logits: what the LLM finds likeliest at each token of the train split's responses.

    It is kept by the ids of prompt and response. So these are no inputs: the stage grows with the
    data. The temperature is one: to divide by another would take the logits of the whole
    vocabulary.
    """

    is_by_prompt = True

    def __init__(
        self,
        context: Context,
        llm: LlmStage,
        labels: LabelStage,
        slm_tokenizer: TokenizerStage,
        vocabulary: VocabularyStage,
    ):
        super().__init__(context, "logits", llm, labels, vocabulary)
        self._llm, self._labels, self._slm_tokenizer = llm, labels, slm_tokenizer
        self._vocabulary = vocabulary
        self._settings = context.config.distillation

    @property
    def _summary(self) -> str:
        """Of which examples all are there, and what top-k leaves out of them."""
        return os.path.join(self.record.directory, "logits.json")

    def is_used(self) -> bool:
        """Whether distributions are learnt."""
        return bool(self._settings.weight)

    def inputs(self) -> dict[str, Any]:
        """The LLM, and what is kept of its distributions."""
        return {
            "llm_hash": self._llm.content,
            "models": models.VERSION,
            "tokenizer": self._llm.prompts.tokenizer.identity,
            "top_k": self._settings.top_k,
            "temperature": self._settings.temperature,
        }

    def learnt_inputs(self) -> dict[str, Any]:
        """What the distributions mean as inputs of those who learn them."""
        if not self.is_used():
            return {}
        return {"distillation": {"weight": self._settings.weight, **self.as_input()}}

    @property
    def _is_cut(self) -> bool:
        return self._vocabulary.is_used()

    def _examples(self) -> dict[str, Any]:
        """What decides the ids of prompts and responses, JSON-able."""
        config = self.context.config
        return plain(
            {
                "data": self._labels.content(),
                **self._labels.learnt_inputs(),
                "max_prompt_tokens": config.max_prompt_tokens,
                "max_response_tokens": config.max_response_tokens,
                "truncate": config.task.truncate.to_dict(),
                "cut_responses": config.task.cut_responses,
                **({"vocabulary": self._vocabulary.tokenizer.identity} if self._is_cut else {}),
            }
        )

    @functools.cache  # noqa: B019  as that of all stages
    def made(self) -> str:
        """As of all; the processes of a job ask together what `is_made` asks."""
        if self.context.mode != "look":
            self._examples()
        return super().made()

    def is_made(self) -> bool:
        """Whether there is a distribution for each token that is learnt."""
        if not is_file(self._summary):
            return False
        return not differences(read_json(self._summary).get("examples"), self._examples())

    def progress(self) -> str:
        """How many responses the LLM has read."""
        # Imported here: without logits, nobody waits for it.
        from l2s_jax.experiment.logit_files import LogitFiles

        store = LogitFiles(self.record.directory)
        return f"{len(store.keys(store.files()))} responses"

    def check(self) -> None:
        """Checks that there is something to learn from, before anything is trained.

        Raises:
          ValueError: the LLM only encodes, or the SLM's vocabulary is another.
        """
        if self.is_used():
            weight = self._settings.weight
            check_teacher("weight", weight, self.context, self._llm, self._slm_tokenizer)

    def make(self) -> None:
        """Has the LLM read what is missing."""
        from l2s_jax.cluster import distributed

        kept = self._kept

        def write() -> None:
            left_out = kept.left_out()
            write_json(self._summary, {"examples": self._examples(), "left_out": left_out})
            log.info(
                "logits: the %d likeliest tokens leave out %.2g%% of the LLM's probability, and "
                "%.2g%% at the 99th percentile",
                self._settings.top_k,
                100 * left_out["mean"],
                100 * left_out["p99"],
            )

        distributed.on_primary(write)

    def put_into(self, data: TokenizedExamples) -> None:
        """Has the batches of the train split hold distributions; what is missing is made first.

        Raises:
          ValueError: the SLM cuts responses into other tokens.
        """
        from l2s_jax.checkpoints import pretrained

        self.made()
        if not np.array_equal(data.response_lengths, self._data.response_lengths):
            raise ValueError(
                "config.distillation: the SLM's responses have other numbers of tokens than the "
                "LLM's; expected one token of the SLM for each of the LLM's"
            )
        kept = kept_by(self._vocabulary.tokenizer)
        if kept is None:
            data.teacher = self._kept
            return
        # The SLM's id of each of the LLM's tokens; what it does not write counts among the others.
        places = np.full(pretrained.read_config(self._llm.directory).vocab_size, -1, np.int32)
        places[kept] = np.arange(len(kept))
        data.teacher = self._kept.placed(places)

    def report(self) -> dict[str, Any]:
        """What the report says of it."""
        if not self.is_used():
            return {}
        # Whoever evaluates may no longer have them.
        found = read_json(self._summary) if is_file(self._summary) else {}
        settings = {name: self._settings[name] for name in ("weight", "temperature", "top_k")}
        return {"distillation": settings | {"left_out": found.get("left_out")}}

    @functools.cached_property
    def _data(self) -> TokenizedExamples:
        """The train split as the LLM reads it: the pieces that the SLM writes, by their ids."""
        tokenizer = self._llm.prompts.tokenizer
        responses = as_whole(self._vocabulary.tokenizer) if self._is_cut else tokenizer
        return self.context.tokenized(self._labels.examples(), tokenizer, responses)

    @functools.cached_property
    def _kept(self) -> Any:
        """The `Logits` of the train split, once all are there."""
        from l2s_jax.checkpoints import pretrained
        from l2s_jax.experiment import scoring

        context, mesh = self.context, self.context.label_mesh
        vocabulary = pretrained.read_config(self._llm.directory).vocab_size
        # A vocabulary may be that small.
        top_k = min(self._settings.top_k, vocabulary)

        def make_scorer() -> scoring.Scorer:
            # In float: as for labels.
            system, params, _ = self._llm.load(mesh, "float")
            settings = {"top_k": top_k, "temperature": self._settings.temperature}
            return scoring.Scorer(system, params, mesh, **settings)

        return scoring.scored(
            self._data,
            self.open(),
            make_scorer,
            top_k=top_k,
            vocabulary=vocabulary,
            buckets=context.buckets,
            batch_size=self._settings.batch_size,
            mesh=mesh,
        )
