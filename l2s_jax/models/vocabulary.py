"""A vocabulary cut to a task: a model writes with some rows of its vocabulary, and reads with all.

The head of a small model is most of what a token reads. A model whose config has a `Vocabulary`
takes and gives the ids of responses among the rows that are kept. Its parameters, trained and
saved, are those of the whole model: `cut` makes of them what its module takes, in a program that
trains and in one that generates. Its logits are those of the whole head at the rows kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.products import Transposed

RESPONSE_TABLE = "response_embedding"
TABLES = "token_embedding", RESPONSE_TABLE
# Fields of configs that are ids of responses.
_SPECIAL = ("pad_id", "eos_id", "decoder_start_id")

C = TypeVar("C")


class Vocabulary:
    """The rows of a vocabulary that responses are written with; hashable, by its content.

    Attributes:
      kept: int32 [V]: the row of the whole vocabulary for each id of a response, ascending.
    """

    def __init__(self, kept: Sequence[int] | np.ndarray):
        self.kept = np.array(kept, np.int32)
        self.kept.setflags(write=False)

    def __len__(self) -> int:
        return len(self.kept)

    @functools.cached_property
    def _content(self) -> bytes:
        return self.kept.tobytes()

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self._content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self._content == other._content

    def __hash__(self) -> int:
        return self._hash

    def place(self, id: int) -> int:
        """The id of a response for an id of the whole vocabulary.

        Raises:
          ValueError: it is not kept.
        """
        place = int(np.searchsorted(self.kept, id))
        if place == len(self.kept) or self.kept[place] != id:
            raise ValueError(f"id {id}: expected one of the {len(self.kept)} ids that are kept")
        return place

    def places(
        self, ids: Int[AnyArray, "B T"], mask: Bool[AnyArray, "B T"]
    ) -> tuple[Int[Array, "B T"], Bool[Array, "B T"]]:
        """(ids of responses for ids of the whole, mask of those that are kept among `mask`)."""
        kept = jnp.asarray(self.kept)
        places = jnp.minimum(jnp.searchsorted(kept, ids), len(self.kept) - 1)
        return places, jnp.logical_and(mask, kept[places] == ids)


def of_size(config: Any, size: int) -> np.ndarray:
    """`size` ids to keep where the text is not known: special ones, then the first that there are.

    int32 [size]; for what only depends on shapes.
    """
    special = {getattr(config, name) for name in _SPECIAL if hasattr(config, name)}
    others = [id for id in range(size) if id not in special]
    return np.array(sorted([*special, *others[: size - len(special)]]), np.int32)


def with_vocabulary(config: C, kept: Sequence[int] | np.ndarray | None) -> C:
    """The config of a model that writes with these rows of its vocabulary; None: with all."""
    if kept is None:
        return config
    vocabulary = Vocabulary(kept)
    names = [name for name in _SPECIAL if hasattr(config, name)]
    changes = {name: vocabulary.place(getattr(config, name)) for name in names}
    return dataclasses.replace(config, vocabulary=vocabulary, **changes)  # type: ignore[type-var]


def without_vocabulary(config: C) -> C:
    """The config of the whole model."""
    vocabulary = config.vocabulary  # type: ignore[attr-defined]
    if vocabulary is None:
        return config
    names = [name for name in _SPECIAL if hasattr(config, name)]
    changes = {name: int(vocabulary.kept[getattr(config, name)]) for name in names}
    return dataclasses.replace(config, vocabulary=None, **changes)  # type: ignore[type-var]


def response_size(config: Any) -> int:
    """How many ids responses are written with."""
    return config.vocab_size if config.vocabulary is None else len(config.vocabulary)


def response_table(config: Any) -> str:
    """The parameter that responses are embedded by, and that a tied head is."""
    return TABLES[config.vocabulary is not None]


def cut(params: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """A whole model's parameters as the module of `config` takes them.

    The table that responses are read from, and a head, have the kept rows and columns alone.
    """
    if config.vocabulary is None:
        return dict(params)
    rows = jnp.asarray(config.vocabulary.kept)

    def take(leaf: Any, axis: int) -> Any:
        # What lies on the host stays there: a large model may not fit on a device.
        if isinstance(leaf, np.ndarray):
            return np.take(leaf, config.vocabulary.kept, axis=axis)
        return jnp.take(leaf, rows, axis=axis)

    def columns(leaf: Any) -> Any:
        if isinstance(leaf, Transposed):
            return Transposed(take(leaf.held, leaf.ndim - 2))
        return take(leaf, leaf.ndim - 1)

    table = params["token_embedding"]["embedding"]
    new = {**params, RESPONSE_TABLE: {"embedding": take(table, 0)}}
    if "head" in params:
        new["head"] = jax.tree.map(
            columns, params["head"], is_leaf=lambda leaf: isinstance(leaf, Transposed)
        )
    return new
