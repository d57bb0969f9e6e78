"""What the SLM starts from, alone and in L2S: the same parameters for both."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from l2s_jax.config import cut_of
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.llm import LlmStage

if TYPE_CHECKING:
    from flax import linen as nn

    from l2s_jax.models.systems import Params


class SlmStart:
    """The SLM before it is trained: a checkpoint, what is cut out of one, or random parameters.

    Attributes:
      needs: the stages that it is made from.
    """

    def __init__(self, context: Context, llm: LlmStage):
        self._context, self._llm = context, llm
        self._section = context.config.slm
        self._cut = cut_of(self._section)
        self.needs = (llm,) if self._cut.is_used and not self._section.path else ()

    @property
    def where(self) -> str:
        """What a message calls it."""
        return self._source if self._has_source else "config.slm.model"

    @property
    def _has_source(self) -> bool:
        return bool(self._section.path) or self._cut.is_used

    @property
    def _source(self) -> str:
        return self._section.path or self._llm.directory

    def inputs(self) -> dict[str, Any]:
        """Inputs of the stages that start from it."""
        if not self._has_source:
            return {"slm": self._section.model.to_dict()}
        inputs: dict[str, Any] = {"path_hash": self._context.checkpoint(self._source)}
        if self._cut.is_used:
            chosen = dataclasses.asdict(self._cut)
            inputs["cut"] = {name: value for name, value in chosen.items() if value}
        return {"slm": inputs}

    def load(self) -> tuple[nn.Module, Params] | None:
        """(module, parameters); None of parameters that are to be random.

        Those of a whole checkpoint lie on the mesh of training, what is cut out of one on the host.
        """
        if not self._has_source:
            return None
        from l2s_jax.checkpoints import cutting, pretrained

        dtype, _ = self._context.dtypes
        if self._cut.is_used:
            return cutting.load_cut(self._source, self._cut, dtype=dtype)
        return pretrained.load(self._source, dtype=dtype, mesh=self._context.mesh)
