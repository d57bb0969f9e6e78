"""The stage of the LLM: a directory as it is, one trained further, or one made here."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from l2s_jax.experiment.context import Context
from l2s_jax.experiment.language_model import LanguageModelStage
from l2s_jax.experiment.stage import log
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.files import absolute
from l2s_jax.hub import find, is_name, reference

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from l2s_jax.models.families import ModelConfig
    from l2s_jax.models.mix import Groups
    from l2s_jax.models.systems import Params


class LlmStage(LanguageModelStage):
    """The LLM that all else is built on."""

    def __init__(self, context: Context, tokenizer: TokenizerStage):
        super().__init__(context, "llm", tokenizer, prompts=tokenizer, responses=tokenizer)

    def is_used(self) -> bool:
        """Whether it is trained."""
        return bool(self.section.train.steps)

    @property
    def seed(self) -> int:
        """That of all but the SLM alone and L2S."""
        return self.context.config.seed

    def inputs(self) -> dict[str, Any]:
        """What it starts from, and its training."""
        path = self.section.path
        return {
            "path_hash": self.context.checkpoint(path) if path else "",
            "model": None if path else self.section.model.to_dict(),
            **self.lora_inputs(),
            **self.training_inputs(),
        }

    def starting_point(self) -> tuple[ModelConfig, Params | None]:
        """The model of `path`, or a random one."""
        path = self.section.path
        if not path:
            return self.started(None, "llm", "config.llm.model")
        from l2s_jax.checkpoints import pretrained

        found = pretrained.load(path, dtype=self.context.dtypes[0], mesh=self.context.mesh)
        return self.started(found, "llm", path)

    @property
    def directory(self) -> str:
        """Where the LLM lies; trained first where so configured."""
        if self.is_used():
            return super().directory
        path = self.section.path
        if self.context.mode == "look" and is_name(path):
            return path
        return absolute(find(path))

    @property
    def layers(self) -> Groups:
        """The groups of layers that H is of; () where it is of one."""
        return self.context.config.l2s.layers

    @property
    def layer(self) -> float:
        """How many layers encode, as config.llm.layer says it.

        Raises:
          ValueError: config.l2s.layers has a layer that the LLM does not have.
        """
        if not self.layers:
            return self.section.layer
        from l2s_jax.checkpoints import pretrained
        from l2s_jax.models.mix import encoding_layer

        config = pretrained.read_config(self.directory)
        return encoding_layer(config, self.section.layer, self.layers)

    @property
    def reference(self) -> str:
        """Its directory, or its name and commit on the hub."""
        return absolute(self.directory) if self.is_used() else reference(self.section.path)

    @property
    def content(self) -> str | None:
        """Its content hash."""
        return self.context.checkpoint(self.directory)

    @functools.cached_property
    def answers(self) -> bool:
        """Whether it can answer prompts, beside encoding them.

        Raises:
          ValueError: it can't, and is to be trained or to make the labels.
        """
        if self.is_used():
            return True
        from l2s_jax.checkpoints import pretrained

        if not pretrained.encodes_only(self.directory):
            return True
        if self.context.config.labels.source == "llm":
            raise ValueError(
                f"{self.directory}: the model has no head or decoder to answer with; expected "
                "config.labels.source='data'"
            )
        return False

    def check(self) -> None:
        """As of all; of an LLM that only encodes, that it does."""
        if self.answers:
            super().check()
        elif self.context.is_first("answers"):
            log.info("llm: has no head or decoder, so it only encodes and is not measured itself")

    def encoder(
        self,
        entries: Sequence[str] | None,
        mesh: Mesh | None = None,
        whole: Params | None = None,
    ) -> tuple[Any, Any]:
        """(module, parameters) of what encodes a prompt, of which only `entries` are read.

        They lie on a mesh, by default that of training. What is the same in the `whole` LLM, which
        lies there, is not read again: it is in memory once.
        """
        from l2s_jax.checkpoints import pretrained
        from l2s_jax.checkpoints.sharing import encoder_held

        read = functools.partial(
            pretrained.load_encoder,
            self.directory,
            layer=self.layer,
            dtype=self.context.dtypes[1],
            weights="float",
            mesh=mesh or self.context.mesh,
            scan_layers=self.context.config.scan_layers,
        )
        if whole is None:
            return read(entries=entries)
        module, _ = read(entries=())
        held, left = encoder_held(module.config, whole)
        if entries is not None:
            held = {name: held[name] for name in entries if name in held}
            left = [name for name in entries if name not in held]
        return module, {**held, **read(entries=left)[1]}
