"""On-policy distillation: a model learns from the LLM on responses that it writes itself.

On labels a model sees good beginnings of responses. When it generates, it sees its own, and when it
drafts for the LLM, each draft follows what it has drafted. So in a share of the batches it answers
the prompts by sampling, the whole LLM reads the responses, and the model learns the LLM's
distribution of each next token there (GKD, Agarwal et al. 2024, arXiv 2306.13649; for drafts: Zhou
et al. 2024, arXiv 2310.08461). What was sampled counts as given: it has no gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32, Int, Key, UInt32

from l2s_jax.cluster import sharding
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.families import ModelConfig, make_module
from l2s_jax.models.scored import Scored
from l2s_jax.models.systems import Batch, Params, response_states
from l2s_jax.models.vocabulary import cut
from l2s_jax.settings.search import Search
from l2s_jax.training import chunks
from l2s_jax.training.answering import answer
from l2s_jax.training.parts import in_parts, whole

# As GKD samples. Greedy responses would be the same ones in each epoch, but for what was learnt.
_SAMPLING = Search(temperature=1.0)
# In the place of a logit that the LLM does not have.
_NOTHING = -1e30
# What tells this use of a seed from others.
_TAG = 0x6F6E


class OnPolicy(NamedTuple):
    """How a training is on-policy.

    share: of the batches, in (0, 1).
    llm: config of the whole LLM that scores, with the vocabulary that responses are written with.
    params: its parameters, as its module takes them but for the vocabulary; never trained.
    most_tokens: where a response is cut.
    end_ids: what ends one, among the ids of responses.
    """

    share: float
    llm: ModelConfig
    params: Params
    most_tokens: int
    end_ids: tuple[int, ...]


def is_own(step: int, share: float, seed: int) -> bool:
    """Whether the model writes the responses of the batch of `step`, counted from 1.

    It is so of `share` of all steps, evenly spread: in any N steps in a row their number is within
    one of N * share. Where they begin is a matter of the seed.
    """
    phase = np.random.default_rng((seed, _TAG)).random()
    return math.floor(step * share + phase) > math.floor((step - 1) * share + phase)


def make_writer(system: Any, policy: OnPolicy, seed: int, mesh: Mesh, accumulation: int = 1) -> Any:
    """`write_responses` as it is compiled: (params, frozen, batch, step) -> what replaces the
    batch's responses, which are written in as many parts as a step takes.
    """

    def write(params: Params, frozen: Params, batch: Batch, step: AnyArray) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _TAG), step)
        seeds = jax.random.bits(key, (len(batch["response_ids"]),), jnp.uint32)

        def write_part(part: tuple[Batch, jax.Array]) -> dict[str, jax.Array]:
            return write_responses(system, params, frozen, *part, policy)

        if accumulation == 1:
            return write_part((batch, seeds))
        return whole(jax.lax.map(write_part, in_parts((dict(batch), seeds), accumulation)))

    return jax.jit(write, out_shardings=sharding.batch_sharding(mesh))


def write_responses(
    system: Any,
    params: Params,
    frozen: Params,
    batch: Batch,
    seeds: UInt32[Array, " B"],
    policy: OnPolicy,
) -> dict[str, Array]:
    """{"response_ids", "response_mask"} [B, S] of what the system answers, S as in `batch`.

    Sampled at temperature 1, each row by its seed, without dropout. A response that is cut teaches
    no end.
    """
    name = system.prompt_name
    ids, mask = batch[f"{name}_ids"], batch[f"{name}_mask"]
    rows, width = batch["response_ids"].shape
    tokens, lengths = answer(
        system,
        params,
        frozen,
        ids,
        mask,
        jnp.full(rows, min(width, policy.most_tokens), jnp.int32),
        seeds,
        batch.get(f"{name}_hidden"),
        max_new_tokens=width,
        end_ids=policy.end_ids,
        search=_SAMPLING,
    )
    return {"response_ids": tokens, "response_mask": jnp.arange(width)[None] < lengths[:, None]}


def with_responses(batch: Batch, written: Batch) -> dict[str, AnyArray]:
    """A batch with other responses, and without what was known of its own."""
    return {k: v for k, v in batch.items() if not k.startswith("teacher_")} | dict(written)


def score(
    llm: ModelConfig,
    params: Params,
    ids: Int[AnyArray, "B T"],
    mask: Bool[AnyArray, "B T"],
    response_ids: Int[AnyArray, "B S"],
) -> Scored:
    """Responses as the LLM reads them, over the ids that they are written with.

    No gradient goes to its parameters, or through them.
    """
    params = jax.lax.stop_gradient(cut(params, llm))
    states: Any = make_module(llm).apply(
        {"params": params}, ids, mask, response_ids, method=response_states
    )
    return Scored.by(llm, params, states)


def apart(
    logits: Float32[AnyArray, "B S V"],
    teacher_logits: Float32[AnyArray, "B S W"],
    mask: Bool[AnyArray, "B S"],
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """(sum of KL(LLM || student) in nats, in how many places both find the same token likeliest).

    Over the tokens where `mask` is true. The outcomes are the student's V: those of the LLM's W
    that are more don't count, and its distribution is scaled to a sum of one over the rest.
    """
    vocabulary = logits.shape[-1]
    missing = max(vocabulary - teacher_logits.shape[-1], 0)
    wanted = jnp.pad(
        teacher_logits[..., :vocabulary],
        ((0, 0), (0, 0), (0, missing)),
        constant_values=_NOTHING,
    )
    of_llm, own = jax.nn.log_softmax(wanted), jax.nn.log_softmax(logits)
    divergence = jnp.sum(jnp.exp(of_llm) * (of_llm - own), axis=-1)
    same = jnp.argmax(wanted, axis=-1) == jnp.argmax(logits, axis=-1)
    return jnp.sum(divergence * mask), jnp.sum(same & mask, dtype=jnp.float32)


def own_loss(
    system: Any,
    params: Params,
    frozen: tuple[Params, Params],
    batch: Batch,
    dropout_key: Key[Array, ""] | None,
    llm: ModelConfig,
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, ""]]]:
    """As `update.batch_loss`, of a batch that the system wrote.

    Args:
      system: what is trained.
      params: of it.
      frozen: (what the system has frozen, the LLM's parameters).
      batch: prompts, and the responses that the system wrote.
      dropout_key: of the system; the LLM has no dropout.
      llm: config of the LLM.
    """
    inner, of_llm = frozen
    name = system.prompt_name
    prompt = batch[f"{name}_ids"], batch[f"{name}_mask"]
    teacher = score(llm, of_llm, *prompt, batch["response_ids"])

    def read(logits: jax.Array, head: Params, tokens: Batch) -> tuple[jax.Array, chunks.Sums]:
        mask = tokens["mask"]
        loss, same = apart(logits, teacher.head(head, tokens["teacher_states"]), mask)
        return loss, {"loss": loss, "tokens": jnp.sum(mask, dtype=jnp.float32), "correct": same}

    tokens = {"mask": batch["response_mask"], "teacher_states": teacher.states}
    scored = system.scored(params, inner, batch, dropout_key)
    return chunks.summed(read, scored, tokens, teacher.params, [llm])
