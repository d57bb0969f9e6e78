"""The stage of labels: what the LLM answers to the prompts of the train split."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from l2s_jax import models
from l2s_jax.config import label_tokens
from l2s_jax.data.tasks import Example
from l2s_jax.experiment import label_files
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.experiment.workdir import is_old


class LabelStage(RecordedStage):
    """The train split as SLM and L2S learn it: with the LLM's responses, or the data's own.

    Labels are kept by their prompts. So these are no inputs: the stage grows with the data.
    """

    def __init__(self, context: Context, llm: LlmStage):
        super().__init__(context, "labels", llm)
        self._llm = llm
        self._settings = context.config.labels

    def is_used(self) -> bool:
        """Whether the LLM answers."""
        return self._settings.source == "llm"

    def inputs(self) -> dict[str, Any]:
        """The LLM and how it decodes."""
        config = self.context.config
        return {
            "llm_hash": self._llm.content,
            "models": models.VERSION,
            "tokenizer": self._llm.prompts.tokenizer.identity,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_new_tokens": label_tokens(config),
            "search": self._settings.search.to_dict(),
            **({"truncate": config.task.truncate.to_dict()} if config.task.truncate else {}),
            **({"seed": config.seed} if self._sampled else {}),
        }

    def learnt_inputs(self) -> dict[str, Any]:
        """What the labels mean as inputs of those who learn them."""
        return {"labels": self.inputs() if self.is_used() else "data"}

    def content(self) -> dict[str, Any]:
        """Hashes of the data that is learnt, as `TrainedStage.training_inputs` takes them."""
        return {"train": self.context.content("train", responses=not self.is_used())}

    @property
    def _sampled(self) -> bool:
        return self._settings.search.temperature > 0

    def _keys(self) -> list[str]:
        prompts = [example.prompt for example in self.context.examples("train")]
        return label_files.keys_of(prompts, sampled=self._sampled)

    def _labelled(self) -> tuple[int, int]:
        """(prompts that have a label, prompts)."""
        store, keys = label_files.LabelFiles(self.record.directory), self._keys()
        if is_old(self.record.read() or {}):
            return min(store.count(), len(keys)), len(keys)
        return len(set(keys) & store.keys(store.files())), len(set(keys))

    def is_made(self) -> bool:
        """Whether every prompt has a label."""
        labelled, prompts = self._labelled()
        return labelled == prompts

    def sources(self) -> dict[str, str]:
        """The checkpoints' commits on the hub."""
        return self.context.sources()

    def progress(self) -> str:
        """How many prompts have a label."""
        labelled, prompts = self._labelled()
        return f"{labelled} of {prompts} prompts"

    def adopt(self) -> None:
        """Version 0.1 kept labels by the places of their prompts."""
        label_files.LabelFiles(self.record.directory).give_keys(self._keys())

    def make(self) -> None:
        """Has the LLM answer what is missing."""
        self.examples()

    @functools.cache  # noqa: B019  it lives as long as its process
    def examples(self) -> Sequence[Example]:
        """The train split."""
        examples = self.context.examples("train")
        if not self.is_used():
            return examples
        return label_files.label(
            examples,
            self._generator,
            self.open(),
            seed=self.context.config.seed if self._sampled else None,
            together=self.context.label_mesh.is_multi_process,
        )

    def _generator(self) -> Any:
        from l2s_jax.serving.loading import make_generator

        # In float: what is learnt does not depend on how the result is served. Not `llm.loaded`,
        # which would stay in memory.
        tokenizer, mesh = self._llm.prompts.tokenizer, self.context.label_mesh
        return make_generator(
            self.context.config,
            self._llm.load(mesh, "float"),
            tokenizer,
            tokenizer,
            weights="float",
            search=self._settings.search.to_dict(),
            max_new_tokens=label_tokens(self.context.config),
            batch_size=self._settings.batch_size,
            mesh=mesh,
        )
