"""The LLM's encoding side, trained with the rest of L2S through LoRA: a second stage of training.

The first stage has the LLM frozen, as the paper has it. Here a low-rank change of its kernels is
trained beside projector and SLM. What comes out is an ordinary encoder, so that decoding is as
before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Key

from l2s_jax.models.lora import Adapted, Adapters
from l2s_jax.models.systems import LlmToSlm, Params
from l2s_jax.settings.training import TUNED


@dataclasses.dataclass(frozen=True)
class Tuned(Adapted):
    """An L2S system whose LLM is adapted too, in the trees

        trained   the system's, and {"llm_lora": the adapters}
        frozen    {"base": what encodes of the LLM}

    Layers of the LLM are not stacked.
    """

    system: LlmToSlm
    adapters: Adapters

    def split(
        self, trained: Params, frozen: Params, key: Key[Array, ""]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The system's (trained, frozen) -> those of this, at which `whole` gives them back.

        Raises:
          ValueError: the adapters' pattern matches no kernel of the LLM.
        """
        return {**trained, TUNED: self.adapters.init(key, frozen)}, {"base": frozen}

    def whole(
        self, trained: Params, frozen: Mapping[str, Params], *, merged: bool = True
    ) -> tuple[LlmToSlm, Any, Any]:
        """See `Adapted.whole`; the LLM is what is adapted."""
        rest = {name: tree for name, tree in trained.items() if name != TUNED}
        join = self.adapters.merge if merged else self.adapters.beside
        return self.system, rest, join(trained[TUNED], frozen["base"])
