"""On-policy distillation of an experiment: whose models learn on what they write themselves."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from l2s_jax.experiment.context import Context
from l2s_jax.experiment.llm import LlmStage
from l2s_jax.experiment.stage import Stage, log
from l2s_jax.experiment.tokenizers import TokenizerStage, check_one_tokenizer
from l2s_jax.tokenizers.cut import kept_by, whole_of

if TYPE_CHECKING:
    from l2s_jax.tokenizers import Tokenizer
    from l2s_jax.training.on_policy import OnPolicy


class OwnResponses:
    """The share of batches whose responses a model writes itself, and the LLM that scores them.

    Attributes:
      needs: the stages that a training needs for it.
    """

    def __init__(self, context: Context, llm: LlmStage, slm_tokenizer: TokenizerStage):
        self._context, self._llm, self._slm_tokenizer = context, llm, slm_tokenizer
        self._share = context.config.distillation.on_policy
        self.needs: tuple[Stage, ...] = (llm,) if self._share else ()

    def inputs(self) -> dict[str, Any]:
        """Inputs of the stages that learn from it."""
        if not self._share:
            return {}
        return {"on_policy": {"share": self._share, "llm_hash": self._llm.content}}

    def report(self) -> dict[str, Any]:
        """What the report says of it."""
        return {"on_policy": self._share} if self._share else {}

    def check(self) -> None:
        """Checks that the LLM can score what is written, before anything is trained.

        Raises:
          ValueError: the LLM only encodes, or the SLM's vocabulary is another.
        """
        if self._share:
            check_teacher("on_policy", self._share, self._context, self._llm, self._slm_tokenizer)

    def load(self, responses: Tokenizer, name: str) -> OnPolicy | None:
        """What the training of the stage `name` takes of it; None where nothing is on-policy.

        `responses`: the tokenizer of what is written, by which the LLM's vocabulary is cut.
        """
        if not self._share:
            return None
        from l2s_jax.checkpoints import pretrained
        from l2s_jax.models.families import with_tokens
        from l2s_jax.models.vocabulary import with_vocabulary
        from l2s_jax.training.on_policy import OnPolicy

        context, whole = self._context, whole_of(responses)
        directory = self._llm.directory
        log.info(
            "%s: answers the prompts of %g%% of the batches itself, and the LLM reads what it says",
            name,
            100 * self._share,
        )
        module, params = pretrained.load(
            directory,
            dtype=context.dtypes[0],
            weights="float",
            mesh=context.mesh,
            scan_layers=context.config.scan_layers,
        )
        config = with_tokens(module.config, whole.pad_id, whole.eos_id, directory)
        # Nothing is dropped where it only reads.
        config = dataclasses.replace(config, dropout_rate=0.0)
        return OnPolicy(
            share=self._share,
            llm=with_vocabulary(config, kept_by(responses)),
            params=params,
            most_tokens=context.config.max_response_tokens,
            end_ids=tuple(responses.end_ids),
        )


def check_teacher(
    key: str, value: float, context: Context, llm: LlmStage, slm_tokenizer: TokenizerStage
) -> None:
    """Checks that the SLM can learn the LLM's distributions, as config.distillation.KEY has it.

    Raises:
      ValueError: the LLM only encodes, or the SLM's vocabulary is another.
    """
    name = f"config.distillation.{key}"
    if not llm.answers:
        raise ValueError(
            f"{name}={value:g}: {llm.directory}: the model has no head or decoder, so it has no "
            f"distributions over tokens to learn; expected {name}=0"
        )
    tokenizers = llm.responses.tokenizer, slm_tokenizer.tokenizer
    check_one_tokenizer(context.config, *tokenizers, f"{name}={value:g}", f"{name}=0")
