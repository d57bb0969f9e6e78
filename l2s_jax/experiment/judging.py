"""What a system says while it trains: its score on the primary metric, and samples for people."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import distributed, sharding
from l2s_jax.data.batches import LengthGroups
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context, Score
from l2s_jax.models.lora import Adapted
from l2s_jax.models.systems import Params, System
from l2s_jax.training.answering import answer
from l2s_jax.training.loop import Judged, Until


def answered(context: Context, train: ConfigDict) -> Sequence[Example]:
    """The examples that a system answers at each validation of its training."""
    settings = context.config.evaluation
    count = settings.samples
    if train.select == "quality":
        count = max(count, train.selection_examples)
    return list(itertools.islice(context.validation(), count))


def make(
    context: Context,
    train: ConfigDict,
    system: System | Adapted,
    data: TokenizedExamples,
    examples: Sequence[Example],
) -> Judge | None:
    """The judge of a training; None where nothing is answered.

    Raises:
      ValueError: responses are to be scored, and nobody has said how.
    """
    if not examples:
        return None
    config, scored, score = context.config, train.selection_examples, context.score
    if train.select == "quality" and not score:
        raise ValueError('train.select="quality": expected Experiment(..., score=...)')
    if train.select != "quality":
        score = None
    return Judge(
        system,
        data,
        examples,
        widths=[prompt_tokens for prompt_tokens, _ in context.buckets],
        most_rows=config.decoding.batch_size,
        max_new_tokens=config.decoding.max_new_tokens,
        mesh=context.mesh,
        samples=config.evaluation.samples,
        # More may be answered, for people to read.
        score=score and (lambda given, said: score(given[:scored], said[:scored])),
    )


class Judge:
    """Decodes a few prompts, greedily, by the parameters that it is called with.

    Every batch has the same rows, so that there is one program for each length of prompts.
    """

    def __init__(
        self,
        system: System | Adapted,
        data: TokenizedExamples,
        examples: Sequence[Example],
        *,
        widths: Sequence[int],
        most_rows: int,
        max_new_tokens: int,
        mesh: Mesh,
        samples: int,
        score: Score | None,
    ):
        """`data` has the tokens of the `examples`' prompts, and H of them where that is kept.

        Args:
          system: whose parameters it is called with.
          data: the prompts.
          examples: with their references.
          widths: tokens that prompts are padded to, ascending.
          most_rows: prompts in a batch, at most, but that the mesh splits it.
          max_new_tokens: where a response is cut.
          mesh: of the parameters.
          samples: how many of the first examples are shown.
          score: what the responses are worth; None: nobody asks.
        """
        self._system, self._data, self._examples = system, data, examples
        self._mesh, self._samples, self._score = mesh, samples, score
        self._capacity = max_new_tokens
        ways = sharding.batch_ways(mesh)
        self._size = -(-min(most_rows, len(examples)) // ways) * ways
        self._groups = LengthGroups(data, np.arange(len(examples)), widths, self._size)
        # On a CPU, to optimize a program for a few samples takes longer than the program.
        quick = score is None and jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": 0} if quick else None
        self._decode = jax.jit(self._decoded, compiler_options=options)

    def __call__(self, params: Params, frozen: Params, until: Until = iter) -> Judged:
        """The scores, and the samples {"prompt", "reference", "response"}.

        `until` is what the batches go through, and where it may end.
        """
        texts = [""] * len(self._examples)
        rows = sharding.batch_rows(self._mesh, self._size)
        for indices, batch in until(self._batches(rows)):
            placed = sharding.put_batch(batch, self._mesh, self._size)
            tokens, lengths = sharding.gather(self._decode(params, frozen, placed))
            for row, index in enumerate(indices):
                if index >= 0:
                    ids = tokens[row, : lengths[row]].tolist()
                    texts[index] = self._data.response_tokenizer.decode(ids)
        scores = {}
        if score := self._score:
            scores["val_quality"] = distributed.on_primary(lambda: score(self._examples, texts))
        shown = zip(self._examples[: self._samples], texts, strict=False)
        return Judged(
            scores,
            [
                {"prompt": e.prompt, "reference": e.references[0], "response": text}
                for e, text in shown
            ],
        )

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """(indices of a whole batch, -1 where it has none; `rows` of it)."""
        for group in range(len(self._groups)):
            indices, width = self._groups[group]
            own = indices[rows]
            ids, mask = self._data.padded_prompts(own, width)
            limits = np.where(own >= 0, self._capacity, 0).astype(np.int32)
            batch = {"ids": ids, "mask": mask, "limits": limits}
            if self._data.hidden is not None:
                batch["hidden"] = self._data.hidden.padded(own, width)
            yield indices, batch

    def _decoded(
        self, params: Params, frozen: Params, batch: Mapping[str, Any]
    ) -> tuple[jax.Array, jax.Array]:
        """(tokens [B, S], their numbers [B])."""
        return answer(
            self._system,
            params,
            frozen,
            batch["ids"],
            batch["mask"],
            batch["limits"],
            hidden=batch.get("hidden"),
            max_new_tokens=self._capacity,
            end_ids=self._data.response_tokenizer.end_ids,
        )
