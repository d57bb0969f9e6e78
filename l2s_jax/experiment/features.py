"""The stage of features: H of every prompt, computed once, in a cache that runs can share."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

from l2s_jax import models
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.stage import Stage, undone
from l2s_jax.files import is_file, listed_names, read_json


class FeatureStage(Stage):
    """The cache of config.features.cache.

    It lies outside the workdir and keeps H by prompt, so it has no inputs to compare: what is not
    there is made.
    """

    is_by_prompt = True

    def __init__(self, context: Context, llm: LlmStage):
        super().__init__(context, "features", llm)
        self._llm = llm
        self.cache: str = context.config.features.cache

    def is_used(self) -> bool:
        """Whether H is kept."""
        return bool(self.cache)

    def learnt_inputs(self) -> dict[str, Any]:
        """What the features mean as inputs of those who learn from them."""
        return {"features": "bfloat16"} if self.is_used() else {}

    def state(self) -> tuple[str, str]:
        """Whether the LLM has a folder there: only prompts say what is missing from it."""
        if waits_for := undone(self.needs):
            return "waiting", f"needs {', '.join(waits_for)}"
        # Imported here: its libraries take a while.
        from l2s_jax.experiment.feature_files import FACTS

        content = self._llm.content
        is_there = content is not None and any(
            read_json(path).get("llm_hash") == content
            for name in listed_names(self.cache)
            if is_file(path := os.path.join(self.cache, name, FACTS))
        )
        return "done" if is_there else "missing", f"kept by prompt in {self.cache}"

    def made(self) -> str:
        """The cache, with H of the prompts that are learnt and validated with."""
        self.put_into(
            train=self._tokenized(self.context.examples("train")),
            validation=self._tokenized(self.context.validation()),
        )
        return self.cache

    def _tokenized(self, examples: Sequence[Example]) -> TokenizedExamples:
        tokenizer = self._llm.prompts.tokenizer
        return self.context.tokenized(examples, tokenizer, tokenizer)

    def put_into(self, **splits: TokenizedExamples) -> None:
        """Has the batches of these splits hold H; what is missing is computed first."""
        from l2s_jax.cluster import sharding
        from l2s_jax.experiment import feature_cache
        from l2s_jax.models.mix import hidden_width, layers_of
        from l2s_jax.training.parts import rows_of

        context, mesh = self.context, self.context.feature_mesh
        llm, _ = self._llm.encoder(entries=())
        layers = layers_of(self._llm.layers)
        encoder = functools.cache(
            lambda: feature_cache.Encoder(
                llm.config, self._llm.encoder(entries=None, mesh=mesh)[1], mesh, layers
            )
        )
        for split, data in splits.items():
            data.hidden = feature_cache.cached(
                data,
                self.cache,
                {
                    "llm_hash": self._llm.content,
                    "models": models.VERSION,
                    "layer": context.config.llm.layer,
                    **({"layers": layers} if layers else {}),
                    "dtype": str(context.dtypes[1]),
                },
                encoder,
                mesh=mesh,
                split=split,
                width=hidden_width(llm.config, self._llm.layers),
                buckets=[prompt_tokens for prompt_tokens, _ in context.buckets],
                batch_size=rows_of(context.config.l2s.train, sharding.batch_ways(mesh)),
            )
