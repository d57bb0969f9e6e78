"""What is trained, decoded and measured side by side: the LLM, the SLM alone, and L2S.

Each system gives the same pure functions of (trained, frozen), two parameter trees:

    scored(trained, frozen, batch, dropout_key) -> Scored             training and scoring
    encode(trained, frozen, ids, mask) -> hidden [B, T, D]            once per prompt
    prefill(trained, frozen, ids, mask, hidden, max_steps) -> (logits [B, V], cache)    likewise
    step(trained, token, cache) -> (logits [B, V], cache)             once per token
    extend(trained, tokens, cache) -> (logits [B, K, V], cache)       K tokens at once, as K steps
    continued(ids, mask) -> (ids, mask)           what a response continues, in its own tokens
    to_serve(trained, frozen, weights) -> (trained, frozen)    what generation passes as them

`trained` is what an optimizer sees; a frozen LLM is only ever in `frozen`. Systems are hashable,
so that they can be static arguments of `jax.jit`.

`trained` holds whole models: where a config has a vocabulary, `scored` and `to_serve` cut it. Its
layers are never stacked: where its config has `scan_layers`, `scored` stacks them in its program.
Those of `frozen` are, where the LLM's config has it.
"""

from __future__ import annotations

from l2s_jax.models.applied import Batch, Params, parameter_count
from l2s_jax.models.language_model import LanguageModel, response_states
from l2s_jax.models.llm_to_slm import LlmToSlm

__all__ = [
    "Batch",
    "LanguageModel",
    "LlmToSlm",
    "Params",
    "System",
    "parameter_count",
    "response_states",
]

System = LanguageModel | LlmToSlm
