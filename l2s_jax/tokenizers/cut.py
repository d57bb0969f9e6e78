"""A vocabulary cut to a task: responses have the ids of a part of a tokenizer's pieces.

Prompts keep the ids of the whole. This is the one place where the ids of the two meet.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from l2s_jax import sealed
from l2s_jax.files import is_file, read_json, write_json

if TYPE_CHECKING:
    from l2s_jax.tokenizers.tokenizer import Tokenizer

VOCABULARY_FILE = "vocabulary.json"
# A piece that stands for one byte of a character that is no piece.
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class CutTokenizer:
    """A tokenizer whose responses are written with `kept`, some of the pieces of `whole`.

    A piece that is not kept is written as the fewest kept pieces that together are the same text.

    Attributes:
      whole: the tokenizer that it is cut from.
      kept: int32 [V]: for each id of a response, the id that `whole` has for the piece; ascending.
      vocab_size: V.
      pad_id, eos_id, end_ids: among the ids of responses.
      is_chat: that of the whole.
    """

    def __init__(
        self,
        whole: Tokenizer,
        kept: Sequence[int] | np.ndarray,
        *,
        origin: str = "a cut vocabulary",
    ):
        """Raises a ValueError unless `kept` ascends and holds what `essential` gives."""
        self.whole = whole
        self.kept = np.asarray(kept, np.int32)
        if not (
            self.kept.ndim == 1
            and (np.diff(self.kept) > 0).all()
            and set(essential(whole)) <= set(self.kept.tolist())
            and self.kept[-1] < whole.vocab_size
        ):
            raise ValueError(
                f"{origin}: expected ids of the tokenizer's {whole.vocab_size} pieces, ascending, "
                "the special ones and those of single characters among them"
            )
        self.vocab_size = len(self.kept)
        self.is_chat = whole.is_chat
        self._places = {int(id): place for place, id in enumerate(self.kept)}
        self.pad_id, self.eos_id = self._places[whole.pad_id], self._places[whole.eos_id]
        self.end_ids = tuple(self._places[id] for id in whole.end_ids)
        self._split = functools.cache(self._fewest)

    @property
    def pieces(self) -> list[str]:
        """Of each id of a response, its text as the vocabulary has it."""
        return self._pieces

    @functools.cached_property
    def _pieces(self) -> list[str]:
        pieces = self.whole.pieces
        return [pieces[id] for id in self.kept.tolist()]

    @property
    def special_ids(self) -> list[int]:
        """Ids of a response that stand for no text."""
        return [self._places[id] for id in self.whole.special_ids]

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of what decides the ids of a response."""
        return self._hashed(self.whole.fingerprint)

    @property
    def identity(self) -> str:
        """SHA-256, in hex, of all that decides the ids of prompts and responses, and their text."""
        return self._hashed(self.whole.identity)

    def _hashed(self, of_whole: str) -> str:
        return hashlib.sha256(of_whole.encode() + self.kept.astype("<i4").tobytes()).hexdigest()

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text in the whole vocabulary."""
        return self.whole.encode_prompts(texts)

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text in the cut vocabulary, eos last."""
        places = self._places
        return [
            [place for id in ids for place in ((places[id],) if id in places else self._split(id))]
            for ids in self.whole.encode_responses(texts)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` of the cut vocabulary, up to the first that ends a response."""
        there = [int(id) for id in ids if 0 <= id < self.vocab_size]
        return self.whole.decode(self.kept[there].tolist())

    def save(self, directory: str) -> None:
        """Writes the whole tokenizer, and which of its pieces are kept beside it."""
        self.whole.save(directory)
        with sealed.writing(directory, VOCABULARY_FILE):
            write_json(os.path.join(directory, VOCABULARY_FILE), {"kept": self.kept.tolist()})

    def _fewest(self, id: int) -> tuple[int, ...]:
        """The fewest kept pieces that make up the piece of an id of the whole."""
        piece = self.whole.pieces[id]
        # best[i]: what writes the first i characters.
        best: list[tuple[int, ...]] = [()]
        for end in range(1, len(piece) + 1):
            options = [
                (*best[start], self._by_text[piece[start:end]])
                for start in range(end)
                if piece[start:end] in self._by_text
            ]
            options = options or [(*best[end - 1], *self._bytes(piece[end - 1]))]
            best.append(min(options, key=len))
        return best[-1]

    @functools.cached_property
    def _by_text(self) -> dict[str, int]:
        """Ids of the kept pieces that are text."""
        pieces, special = self.whole.pieces, set(self.whole.special_ids)
        return {
            pieces[id]: place
            for place, id in enumerate(self.kept.tolist())
            if pieces[id] and id not in special and not BYTE.fullmatch(pieces[id])
        }

    @functools.cached_property
    def _by_byte(self) -> dict[int, int]:
        """Ids of the kept pieces that stand for a byte."""
        found = ((BYTE.fullmatch(self.whole.pieces[id]), id) for id in self.kept.tolist())
        return {int(match[1], 16): self._places[id] for match, id in found if match}

    def _bytes(self, character: str) -> tuple[int, ...]:
        """What writes a character that is no piece: its bytes, or nothing."""
        found = [self._by_byte.get(byte) for byte in character.replace("▁", " ").encode()]
        return tuple(place for place in found if place is not None) if None not in found else ()


def essential(whole: Tokenizer) -> list[int]:
    """Ids that no cut leaves out: special ones, single characters and bytes, ascending.

    With them any text that the whole vocabulary can write can still be written.
    """
    special = {whole.pad_id, *whole.end_ids, *whole.special_ids}
    single = {
        id for id, piece in enumerate(whole.pieces) if len(piece) == 1 or BYTE.fullmatch(piece)
    }
    return sorted(special | single)


def count(whole: Tokenizer, responses: Iterable[Sequence[int]]) -> np.ndarray:
    """How often each id of a tokenizer is in responses, int64 [vocab_size]."""
    ids = np.fromiter(itertools.chain.from_iterable(responses), np.int64)
    return np.bincount(ids, minlength=whole.vocab_size)


def choose(whole: Tokenizer, uses: np.ndarray, size: int = 0) -> list[int]:
    """Ids to keep for responses that use them so often, ascending.

    Args:
      whole: the tokenizer.
      uses: how often each id is used, as of `count`.
      size: how many ids to keep: the essential ones, then those that are used most, then the
        first of the vocabulary. 0: all that are used, and the essential ones.

    Raises:
      ValueError: the essential ones are more than `size`.
    """
    kept = essential(whole)
    if not size:
        return sorted({*kept, *np.flatnonzero(uses).tolist()})
    if len(kept) > size:
        raise ValueError(
            f"a vocabulary of {size}: expected at least {len(kept)}, the tokenizer has so many "
            "special pieces, single characters and bytes, which any text may need"
        )
    there = set(kept)
    by_use = np.argsort(-uses, kind="stable").tolist()
    more = [id for id in by_use if id not in there and whole.pieces[id]]
    return sorted([*kept, *more[: size - len(kept)]])


def whole_of(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer that one is cut from, or that it is."""
    return tokenizer.whole if isinstance(tokenizer, CutTokenizer) else tokenizer


class _WholeIds:
    """A cut tokenizer whose responses have the ids of the whole."""

    def __init__(self, tokenizer: CutTokenizer):
        self._cut = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cut.whole, name)

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"whole ids of {self._cut.identity}".encode()).hexdigest()

    def encode_responses(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._cut.kept[ids].tolist() for ids in self._cut.encode_responses(texts)]


def as_whole(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer that writes responses with the same pieces, by the ids that the whole has."""
    is_cut = isinstance(tokenizer, CutTokenizer)
    return cast("Tokenizer", _WholeIds(tokenizer)) if is_cut else tokenizer


def kept_by(tokenizer: Tokenizer) -> np.ndarray | None:
    """The ids of the whole, int32 [V], that a tokenizer writes responses with; None: all."""
    return tokenizer.kept if isinstance(tokenizer, CutTokenizer) else None


def read_kept(directory: str) -> np.ndarray | None:
    """Which ids are kept, int32 [V], by the tokenizer in a directory; None: all.

    Raises:
      ValueError: the file that says so is none.
    """
    path = os.path.join(directory, VOCABULARY_FILE)
    if not is_file(path):
        return None
    sealed.check(path)
    kept = read_json(path).get("kept")
    if not (
        isinstance(kept, list) and kept and all(type(id) is int and 0 <= id < 2**31 for id in kept)
    ):
        raise ValueError(f"{path}: expected an object with 'kept', a list of ids")
    return np.array(kept, np.int32)
