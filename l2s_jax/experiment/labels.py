"""The stage of labels: what the LLM answers to the prompts that are learnt and validated with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from l2s_jax import models
from l2s_jax.config import label_tokens
from l2s_jax.experiment import label_files
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.splits import Split
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.experiment.workdir import Record, holds, is_old

_SPLITS = ("train", "validation")


class LabelStage(RecordedStage):
    """The data as SLM and L2S learn it: with the LLM's responses, or the data's own.

    So are the first examples of the validation split, by which a checkpoint is chosen. Labels are
    kept by their prompts. So these are no inputs: the stage grows with the data.
    """

    since = ("splits",)
    is_by_prompt = True

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
            "splits": _SPLITS,
            **({"truncate": config.task.truncate.to_dict()} if config.task.truncate else {}),
            **({"seed": config.seed} if self._sampled else {}),
        }

    def learnt_inputs(self) -> dict[str, Any]:
        """What the labels mean as inputs of those who learn them."""
        return {"labels": self.as_input() if self.is_used() else "data"}

    def content(self) -> dict[str, Any]:
        """Hashes of the data that is learnt, as `TrainedStage.training_inputs` takes them."""
        return {"train": self.context.content("train", responses=not self.is_used())}

    @property
    def _sampled(self) -> bool:
        return self._settings.search.temperature > 0

    def _unlabelled(self, split: str) -> Split:
        context = self.context
        return context.validation() if split == "validation" else context.examples(split)

    def _keys(self, split: str) -> label_files.Keys:
        prompts = (example.prompt for example in self._unlabelled(split))
        return label_files.Keys(prompts, sampled=self._sampled)

    def _own_splits(self) -> Sequence[str]:
        """Those that the stage makes: a folder of before has the train split alone."""
        return (self.record.read() or {}).get("splits", _SPLITS[:1])

    def _labelled(self) -> tuple[int, int]:
        """(prompts that have a label, prompts)."""
        # Imported here: where the LLM makes no labels, nobody waits for it.
        from l2s_jax.experiment.record_files import distinct

        is_of_version_0_1 = is_old(self.record.read() or {})
        labelled = prompts = 0
        for split in self._own_splits():
            store, keys = label_files.LabelFiles(self.record.directory, split), self._keys(split)
            if is_of_version_0_1:
                return min(store.count(), len(keys)), len(keys)
            of_split = distinct(keys.binary)
            labelled += of_split - len(store.missing(store.files(), keys))
            prompts += of_split
        return labelled, prompts

    def is_made(self) -> bool:
        """Whether every prompt has a label."""
        labelled, prompts = self._labelled()
        return labelled == prompts

    def progress(self) -> str:
        """How many prompts have a label."""
        labelled, prompts = self._labelled()
        return f"{labelled} of {prompts} prompts"

    def adopt(self) -> None:
        """Version 0.1 kept labels by the places of their prompts."""
        label_files.LabelFiles(self.record.directory).give_keys(self._keys("train"))

    def make(self) -> None:
        """Has the LLM answer what is missing."""
        self.examples()

    def examples(self, split: str = "train") -> Split:
        """The train split, or the first examples of the validation split."""
        if not self.is_used():
            return self._unlabelled(split)
        own = self._labelled_splits
        return own[split] if split in own else self._label(split, self._generator)

    def validation_of(self, record: Record) -> Split:
        """The first examples of the validation split, as a stage with this record knows them."""
        from l2s_jax.cluster import distributed

        labelled = distributed.on_primary(lambda: holds(record.read() or {}, "labels.splits"))
        return self.examples("validation") if labelled else self._unlabelled("validation")

    @functools.cached_property
    def _labelled_splits(self) -> dict[str, Split]:
        """Those that the stage makes, by one generator, which does not stay in memory."""
        from l2s_jax.cluster import distributed

        self.open()
        generator = functools.cache(lambda: self._generator())
        splits = distributed.on_primary(self._own_splits)
        if distributed.on_primary(self.is_made):
            return {split: self._split(split) for split in splits}
        with self.telling():
            return {split: self._label(split, generator) for split in splits}

    def _label(self, split: str, make_generator: Callable[[], Any]) -> Split:
        from l2s_jax.serving.refilled import Refilled

        label_files.fill(
            self._unlabelled(split),
            lambda: Refilled(make_generator()),
            self.open(),
            split=split,
            seed=self.context.config.seed if self._sampled else None,
            together=self.context.label_mesh.is_multi_process,
        )
        return self._split(split)

    def _split(self, split: str) -> Split:
        """A split all of whose labels are there."""
        store, context = label_files.LabelFiles(self.open(), split), self.context
        unlabelled = self._unlabelled(split)

        def identity() -> dict[str, Any]:
            limit = context.config.evaluation.validation_examples if split == "validation" else 0
            return {
                **context.identity(split, responses=False, limit=limit),
                "labels": context.files_hash(f"labels of {split}", store.files),
            }

        return Split(identity, lambda: label_files.Labelled(unlabelled, self._keys(split), store))

    def _generator(self) -> Any:
        from l2s_jax.serving.loading import make_generator

        # In float: what is learnt does not depend on how the result is served.
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
