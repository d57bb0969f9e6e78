"""Examples as token ids: tokenized once, cut to length, padded to arrays."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from l2s_jax.data import fitting
from l2s_jax.data.ragged import Growing, GrowingRagged, Ragged, numbers
from l2s_jax.data.table import Example, chunks
from l2s_jax.tokenizers.tokenizer import Tokenizer

_AT_ONCE = 8192


class Hidden(Protocol):
    """Where an LLM's representations H of the prompts are read from; `width` is D."""

    width: int

    def padded(self, indices: np.ndarray, prompt_tokens: int) -> np.ndarray:
        """H of prompts `indices` [B], none where -1: [B, prompt_tokens, D], zeros elsewhere."""
        ...


class Teacher(Protocol):
    """Where an LLM's distributions over the tokens of the responses are read from."""

    def padded(self, indices: np.ndarray, response_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32, log-probabilities float32) [B, response_tokens, k] of the likeliest tokens.

        Of responses `indices` [B], none where -1. Ids are -1 where there is none.
        """
        ...


class Loss(NamedTuple):
    """What texts lost because they were too long.

    prompts, responses: how many were cut, of `examples`.
    hopeless: prompts that were too long without any text of their fields.
    fields: of the prompts that were cut, by field: characters lost, and of how many.
    left_out: examples that are not there because their response was cut.
    """

    examples: int
    prompts: int
    responses: int
    hopeless: int
    fields: dict[str, fitting.Loss]
    left_out: int

    def describe(self, most: int) -> list[str]:
        """A line about prompts and one about responses, where some were cut; `most`: tokens."""
        lines = []
        if self.prompts:
            shares = {field: lost / of for field, (lost, of) in self.fields.items() if lost}
            lost = ", ".join(f"{share:.0%} of {field}" for field, share in shares.items())
            lines.append(
                f"{self.prompts} of {self.examples} prompts were longer than {most} tokens and "
                f"lost text: {lost or 'none of a field'}"
            )
        if self.hopeless:
            lines.append(
                f"{self.hopeless} of {self.examples} prompts are longer than {most} tokens even "
                "without their fields: the end of the template is lost"
            )
        if self.responses:
            what = "are left out" if self.left_out else "teach no end"
            lines.append(f"{self.responses} of {self.examples} responses were cut, and {what}")
        return lines


class _Tokens(NamedTuple):
    prompts: Ragged
    responses: Ragged
    places: np.ndarray
    loss: Loss


class TokenizedExamples:
    """Token ids of examples, computed on first use, all at once, and kept as two flat arrays.

    Large arrays lie in files (`ragged.Growing`): ten million examples need no memory for them.
    A prompt over its maximum loses text of its fields (fitting.py). A response over its maximum
    is cut, and one that was cut before stays so: no eos follows it. Once `hidden` or `teacher` is
    set, batches hold what it reads too.

    Args:
      examples: what to tokenize; references are not used.
      prompt_tokenizer: tokenizer of the prompts.
      response_tokenizer: tokenizer of the responses.
      max_prompt_tokens: longest prompt kept, eos included.
      max_response_tokens: longest response kept, eos included.
      keep_cut: whether examples whose response is cut are there.

    Raises:
      ValueError: a maximum is below 1.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        *,
        prompt_tokenizer: Tokenizer,
        response_tokenizer: Tokenizer,
        max_prompt_tokens: int,
        max_response_tokens: int,
        keep_cut: bool = True,
    ):
        for name, value in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_response_tokens", max_response_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._examples = examples
        self.prompt_tokenizer = prompt_tokenizer
        self.response_tokenizer = response_tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.prompt_pad_id = prompt_tokenizer.pad_id
        self.response_pad_id = response_tokenizer.pad_id
        self.hidden: Hidden | None = None
        self.teacher: Teacher | None = None
        self._keep_cut = keep_cut

    def __len__(self) -> int:
        return len(self._examples) - (0 if self._keep_cut else self.loss.left_out)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompt and response `index`, int32 [t] and [s]."""
        index = range(len(self))[index]
        return self._tokens.prompts[index], self._tokens.responses[index]

    @property
    def loss(self) -> Loss:
        """What was lost because it was too long."""
        return self._tokens.loss

    @property
    def places(self) -> np.ndarray:
        """Where each example is among those given, int64 [len(self)]; some may be left out."""
        return self._tokens.places

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt after the cut, int32 [len(self)]."""
        return self._tokens.prompts.lengths

    @functools.cached_property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response after the cut, int32 [len(self)]."""
        return self._tokens.responses.lengths

    @functools.cached_property
    def prompt_keys(self) -> np.ndarray:
        """Half of the SHA-256 of the ids of each prompt, as they are after the cut, V16 [N]."""
        return _array(_key(b"", self._tokens.prompts[i]) for i in range(len(self)))

    @functools.cached_property
    def pair_keys(self) -> np.ndarray:
        """Half of the SHA-256 of the ids of each prompt and response, after the cut, V16 [N]."""
        responses = self._tokens.responses
        return _array(_key(k.tobytes(), responses[i]) for i, k in enumerate(self.prompt_keys))

    def padded_prompts(
        self, indices: np.ndarray, prompt_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool [B, prompt_tokens] of the prompts of `padded`."""
        ids, mask = _pad(self._tokens.prompts, indices, prompt_tokens, self.prompt_pad_id)
        mask[indices < 0, 0] = True
        return ids, mask

    def padded(
        self, indices: np.ndarray, prompt_tokens: int, response_tokens: int, prompt_name: str
    ) -> dict[str, np.ndarray]:
        """The batch of examples `indices` [B], padded to [B, prompt_tokens], [B, response_tokens].

        An index of -1 makes a padding row: its prompt mask has one true token, lest a softmax
        over the prompt be empty, and its response mask none, lest it count in a loss.
        """
        prompt_ids, prompt_mask = self.padded_prompts(indices, prompt_tokens)
        response_ids, response_mask = _pad(
            self._tokens.responses, indices, response_tokens, self.response_pad_id
        )
        batch = {
            f"{prompt_name}_ids": prompt_ids,
            f"{prompt_name}_mask": prompt_mask,
            "response_ids": response_ids,
            "response_mask": response_mask,
        }
        if self.hidden is not None:
            batch[f"{prompt_name}_hidden"] = self.hidden.padded(indices, prompt_tokens)
        if self.teacher is not None:
            ids, log_probs = self.teacher.padded(indices, response_tokens)
            batch |= {"teacher_ids": ids, "teacher_log_probs": log_probs}
        return batch

    @functools.cached_property
    def _tokens(self) -> _Tokens:
        prompts, responses = GrowingRagged(np.int32), GrowingRagged(np.int32)
        places = Growing(np.int64)
        too_long = cut_responses = hopeless = 0
        fields: dict[str, fitting.Loss] = {}
        for start, chunk in enumerate(chunks(self._examples, _AT_ONCE)):
            fitted = fitting.fit(
                [example.prompt for example in chunk], self.prompt_tokenizer, self.max_prompt_tokens
            )
            too_long, hopeless = too_long + fitted.cut, hopeless + fitted.hopeless
            for field, (lost, of) in fitted.losses.items():
                before = fields.get(field, fitting.Loss(0, 0))
                fields[field] = fitting.Loss(before.lost + lost, before.of + of)
            whole = self.response_tokenizer.encode_responses([e.response for e in chunk])
            is_cut = [
                example.cut or len(ids) > self.max_response_tokens
                for example, ids in zip(chunk, whole, strict=True)
            ]
            cut_responses += sum(is_cut)
            kept = [i for i, cut in enumerate(is_cut) if self._keep_cut or not cut]
            places.append(start * _AT_ONCE + np.array(kept, np.int64))
            for side, ids in (
                (prompts, [fitted.ids[i] for i in kept]),
                (responses, [self._cut(whole[i]) if is_cut[i] else whole[i] for i in kept]),
            ):
                side.append(numbers(ids, np.int32), [*map(len, ids)])
        left_out = 0 if self._keep_cut else cut_responses
        loss = Loss(len(self._examples), too_long, cut_responses, hopeless, fields, left_out)
        return _Tokens(prompts.done(), responses.done(), places.array(), loss)

    def _cut(self, response: list[int]) -> list[int]:
        """A response without its end."""
        return response[:-1][: self.max_response_tokens]


def _key(start: bytes, ids: np.ndarray) -> bytes:
    return hashlib.sha256(start + ids.astype("<i4").tobytes()).digest()[:16]


def _array(keys: Iterable[bytes]) -> np.ndarray:
    found = Growing("V16")
    for some in chunks(keys, _AT_ONCE):
        found.append(np.frombuffer(b"".join(some), "V16"))
    return found.array()


def _pad(
    sequences: Ragged, indices: np.ndarray, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    ids = np.full((len(indices), width), pad_id, np.int32)
    mask = np.zeros((len(indices), width), bool)
    for row, index in enumerate(indices):
        if index >= 0:
            sequence = sequences[index]
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = True
    return ids, mask
