"""Examples as token ids, padded to arrays."""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import numpy as np

from l2s_jax.data.ragged import Growing
from l2s_jax.data.table import Example, chunks
from l2s_jax.data.tokens import AT_ONCE, Loss, Sequences, Tokenization, Tokens, gathered
from l2s_jax.tokenizers.tokenizer import Tokenizer


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


class TokenizedExamples:
    """Token ids of examples, cut to length as `Tokenization` says.

    Once `hidden` or `teacher` is set, batches hold what it reads too.

    Args:
      examples: what to tokenize; references are not used.
      prompt_tokenizer: tokenizer of the prompts.
      response_tokenizer: tokenizer of the responses.
      max_prompt_tokens: longest prompt kept, eos included.
      max_response_tokens: longest response kept, eos included.
      keep_cut: whether examples whose response is cut are there.
      tokens: of the examples, where they are known; None: they are made on first use.

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
        tokens: Tokens | None = None,
    ):
        for name, value in (
            ("max_prompt_tokens", max_prompt_tokens),
            ("max_response_tokens", max_response_tokens),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self._examples, self._given = examples, tokens
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
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids of prompt and response `index`, int32 [t] and [s]."""
        place = int(self._places_of(np.array([range(len(self))[index]]))[0])
        return self._tokens.prompts[place], self._tokens.responses[place]

    @functools.cached_property
    def loss(self) -> Loss:
        """What was lost because it was too long."""
        loss = self._tokens.loss
        return loss._replace(left_out=0 if self._keep_cut else loss.responses)

    @functools.cached_property
    def places(self) -> np.ndarray:
        """Where each example is among those given, int64 [len(self)]; some may be left out."""
        cut = self._tokens.cut
        return np.arange(len(cut)) if self._keep_cut else np.flatnonzero(~cut)

    def _places_of(self, indices: np.ndarray) -> np.ndarray:
        """Where examples are among those given; -1 stays."""
        if self._keep_cut:
            return indices
        return np.where(indices < 0, -1, self.places[indices])

    @functools.cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens of each prompt after the cut, int32 [len(self)]."""
        return self._lengths(self._tokens.prompts)

    @functools.cached_property
    def response_lengths(self) -> np.ndarray:
        """Tokens of each response after the cut, int32 [len(self)]."""
        return self._lengths(self._tokens.responses)

    def _lengths(self, sequences: Sequences) -> np.ndarray:
        return sequences.lengths if self._keep_cut else sequences.lengths[self.places]

    @functools.cached_property
    def prompt_keys(self) -> np.ndarray:
        """Half of the SHA-256 of the ids of each prompt, as they are after the cut, V16 [N]."""
        prompts = self._tokens.prompts
        return key_array(_key(b"", prompts[i]) for i in self._all_places())

    @functools.cached_property
    def pair_keys(self) -> np.ndarray:
        """Half of the SHA-256 of the ids of each prompt and response, after the cut, V16 [N]."""
        responses = self._tokens.responses
        of_prompts = zip(self.prompt_keys, self._all_places(), strict=True)
        return key_array(_key(key.tobytes(), responses[i]) for key, i in of_prompts)

    def _all_places(self) -> Iterable[int]:
        return range(len(self)) if self._keep_cut else map(int, self.places)

    def padded_prompts(
        self, indices: np.ndarray, prompt_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 and mask bool [B, prompt_tokens] of the prompts of `padded`."""
        ids, mask = self._pad("prompts", indices, prompt_tokens, self.prompt_pad_id)
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
        response_ids, response_mask = self._pad(
            "responses", indices, response_tokens, self.response_pad_id
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

    def _pad(
        self, side: Literal["prompts", "responses"], indices: np.ndarray, width: int, pad_id: int
    ) -> tuple[np.ndarray, np.ndarray]:
        sequences: Sequences = getattr(self._tokens, side)
        ids = np.full((len(indices), width), pad_id, np.int32)
        mask = np.zeros((len(indices), width), bool)
        for row, place in enumerate(self._places_of(indices).tolist()):
            if place >= 0:
                sequence = sequences[place]
                ids[row, : len(sequence)] = sequence
                mask[row, : len(sequence)] = True
        return ids, mask

    @functools.cached_property
    def _tokens(self) -> Tokens:
        if self._given is not None:
            return self._given
        how = Tokenization(
            self.prompt_tokenizer,
            self.response_tokenizer,
            self.max_prompt_tokens,
            self.max_response_tokens,
        )
        return gathered(map(how, chunks(self._examples, AT_ONCE)))


def _key(start: bytes, ids: np.ndarray) -> bytes:
    return hashlib.sha256(start + ids.astype("<i4").tobytes()).digest()[:16]


def key_array(keys: Iterable[bytes]) -> np.ndarray:
    """Keys of 16 bytes each as an array, V16 [N]; it lies in a file where they are many."""
    found = Growing("V16")
    for some in chunks(keys, AT_ONCE):
        found.append(np.frombuffer(b"".join(some), "V16"))
    return found.array()
