"""What a Generator gives for a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2s_jax.cluster.collecting import collected
from l2s_jax.decoding.beam import Hypotheses
from l2s_jax.decoding.drafted import Drafted
from l2s_jax.decoding.loop import Decoded
from l2s_jax.serving.text import ResponseText
from l2s_jax.tokenizers.tokenizer import Tokenizer


class Drafts(NamedTuple):
    """How a response was drafted.

    Of each place in a block: how often a drafted token there was looked at, and how often it was
    kept. `blocks` is how many the LLM read.
    """

    blocks: int
    tested: tuple[int, ...]
    passed: tuple[int, ...]


def drafts_of(counts: Sequence[Any], row: int) -> Drafts:
    """Those of one row of a batch, whose fields are arrays [B], [B, M] and [B, M]."""
    blocks, tested, passed = (one[row].tolist() for one in counts)
    return Drafts(blocks, tuple(tested), tuple(passed))


class Output(NamedTuple):
    """One generated response; `cut` says that the limit on new tokens ended it.

    `tokens` is how many it has, what ended it included: of a stop text, all up to the one that
    completed it.

    Of a beam search: `score` is log p / length**length_penalty, and `others` are the hypotheses
    after the best, best first. Of exact decoding: `drafts`.
    """

    text: str
    tokens: int
    cut: bool
    score: float | None = None
    others: tuple[Output, ...] = ()
    drafts: Drafts | None = None


def output_of(fields: Sequence[Any]) -> Output:
    """An Output from what JSON made of it."""
    *own, others, drafts = fields
    if drafts is not None:
        blocks, tested, passed = drafts
        drafts = Drafts(blocks, tuple(tested), tuple(passed))
    return Output(*own, others=tuple(map(output_of, others)), drafts=drafts)


def output_of_text(
    text: ResponseText, end_ids: Sequence[int], drafts: Drafts | None = None
) -> Output:
    """The output of a response that has ended."""
    tokens = text.tokens
    cut = not text.stopped and bool(tokens) and tokens[-1] not in end_ids
    return Output(text.text, len(tokens), cut, drafts=drafts)


def in_order(
    answered: Callable[[tuple[int, int]], Iterator[tuple[list[int], list[Output]]]], shared: bool
) -> list[Output]:
    """The outputs of all prompts, of what gives (places, outputs) of a part of them.

    A part is (i, n), the i-th of n. With `shared`, each process of a job answers one; process 0
    gets all outputs, and the others none.
    """
    part = (jax.process_index(), jax.process_count()) if shared else (0, 1)
    outputs: dict[int, Output] = {}
    for places, found in answered(part):
        outputs.update(zip(places, found, strict=True))
    if shared:
        outputs = by_place(outputs)
    return [outputs[place] for place in range(len(outputs))]


def by_place(own: Mapping[int, Output]) -> dict[int, Output]:
    """Outputs that each process of a job has some of: on process 0 all of them, else none."""
    shares = collected(list(own.items()))
    return {place: output_of(fields) for share in shares for place, fields in share}


def outputs_of(decoded: Decoded | Hypotheses, tokenizer: Tokenizer) -> Iterator[Output]:
    """The output of each row of a batch, whose arrays are on the host."""

    def output(tokens: np.ndarray, length: Any, finished: Any, score: Any = None) -> Output:
        text = tokenizer.decode(tokens[:length].tolist())
        score = None if score is None else float(score)
        return Output(text, int(length), not bool(finished), score)

    rows = zip(decoded.tokens, decoded.lengths, decoded.finished, strict=True)
    if isinstance(decoded, Hypotheses):
        for row, scores in zip(rows, decoded.scores, strict=True):
            best, *others = map(output, *row, scores)
            yield best._replace(others=tuple(others))
        return
    for row, fields in enumerate(rows):
        one = output(*fields)
        if isinstance(decoded, Drafted):
            one = one._replace(
                drafts=drafts_of((decoded.blocks, decoded.tested, decoded.passed), row)
            )
        yield one
