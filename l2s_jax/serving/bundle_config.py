"""The config.json of an L2S model: what it may say, and where that is checked.

Anyone may have written one, and tables and programs are made by its numbers.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from l2s_jax.checkpoints import pretrained
from l2s_jax.files import is_file, read_json
from l2s_jax.messages import shown
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.mix import Groups, encoding_layer
from l2s_jax.models.serving import WEIGHTS
from l2s_jax.settings import limits
from l2s_jax.settings.declare import Section, nearest, read, setting
from l2s_jax.settings.search import Search
from l2s_jax.tokenizers.cut import whole_of
from l2s_jax.tokenizers.tokenizer import Tokenizer

FAMILY = "l2s"
_WIDEST, _LAYERS = 2**20, 10_000
_NEEDED = {
    "": ("fusion", "projector_width", "shared_vocabulary", "slm", "llm", "generation"),
    "llm": ("path", "content_hash", "layer"),
    "generation": ("prompt_lengths", "max_new_tokens", "batch_size"),
}


def _ascend(lengths: tuple[Any, ...]) -> bool:
    return bool(lengths) and all(
        type(length) is int and before < length <= limits.TOKENS
        for before, length in zip((0, *lengths), lengths, strict=False)
    )


def _are_groups(groups: tuple[Any, ...]) -> bool:
    return all(
        isinstance(group, tuple)
        and group
        and all(type(layer) is int and 1 <= layer <= _LAYERS for layer in group)
        for group in groups
    )


@dataclasses.dataclass(frozen=True)
class _Llm(Section):
    path: str = setting("", "Its place.", fits=bool, expected="the place of the LLM")
    content_hash: str = setting(
        "",
        "Of all its files.",
        fits=lambda text: bool(re.fullmatch("[0-9a-f]{64}", text)),
        expected="a SHA-256 in hex",
    )
    layer: float = setting(0.0, "After which H is taken.", at_least=0, at_most=_LAYERS)
    whole: bool = setting(False, "All of it is inside.")


@dataclasses.dataclass(frozen=True)
class Generation(Section):
    """How a `Generator` answers: the settings of its that a model has, and others may replace."""

    prompt_lengths: tuple[int, ...] = setting(
        (),
        "What prompts are padded to.",
        fits=_ascend,
        expected=f"numbers of tokens that ascend, from 1 to {limits.TOKENS}",
    )
    max_new_tokens: int = setting(1, "Where a response is cut.", at_least=1, at_most=limits.TOKENS)
    batch_size: int = setting(1, "Prompts at a time.", at_least=1, at_most=limits.ROWS)
    search: Search = Search()
    weights: str = setting("float", "How kernels are held.", one_of=WEIGHTS)

    def conflict(self) -> str:
        """A batch that no machine holds."""
        tokens = self.prompt_lengths[-1] + self.max_new_tokens
        wrong = limits.too_many(self.batch_size, tokens)
        return f"batch_size={self.batch_size}: {wrong}" if wrong else ""


@dataclasses.dataclass(frozen=True)
class _Bundle(Section):
    fusion: str = setting("add", "How Z comes to the SLM.", one_of=FUSIONS)
    projector_width: int = setting(1, "Its width.", at_least=1, at_most=_WIDEST)
    shared_vocabulary: bool = setting(True, "Both have one tokenizer.")
    layers: Groups = setting(
        (), "Of the LLM.", fits=_are_groups, expected=f"groups of numbers from 1 to {_LAYERS}"
    )
    normalize: bool = setting(False, "A norm over H.")
    stack: int = setting(0, "Layers over Z.", at_least=0, at_most=_LAYERS)
    slm: dict[str, Any] = setting({}, "Its config.", fits=bool, expected="the config of a model")
    llm: _Llm = dataclasses.field(default=_Llm("-", "0" * 64))
    generation: Generation = dataclasses.field(default=Generation((1,)))


def generation_of(
    prompt_lengths: Any = (1,),
    max_new_tokens: Any = 1,
    batch_size: Any = 1,
    search: Any = Search(),
    weights: str = "float",
) -> Generation:
    """Checked settings of generation: numbers may be numpy's, and the search a mapping.

    Raises:
      ValueError: one line that names the setting, its value and what was expected.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return tuple(map(plain, value))
        return plain(value.tolist()) if isinstance(value, np.ndarray | np.generic) else value

    values = {
        "prompt_lengths": plain(prompt_lengths),
        "max_new_tokens": plain(max_new_tokens),
        "batch_size": plain(batch_size),
        "search": dataclasses.asdict(search) if isinstance(search, Search) else search,
        "weights": weights,
    }
    try:
        return read(Generation, values, "given")
    except ValueError as error:
        raise ValueError(str(error).removeprefix("given.")) from None


def check_given(settings: Mapping[str, Any], others: Iterable[str] = ()) -> None:
    """Checks settings of generation that somebody gives by name; `others` are no names of these.

    Raises:
      ValueError: there is no such setting, or as of `generation_of`.
    """
    names = [field.name for field in dataclasses.fields(Generation)]
    for name in settings:
        if name not in names:
            raise ValueError(f"{name}: no such setting{nearest(name, (*names, *others))}")
    generation_of(**settings)


def is_bundle(directory: str) -> bool:
    """Whether an L2S model lies there, as opposed to a model on its own."""
    path = os.path.join(directory, "config.json")
    return is_file(path) and read_json(path).get("family") == FAMILY


def read_fields(directory: str) -> tuple[dict[str, Any], str]:
    """(config.json's object, its path) of an L2S model.

    Raises:
      ValueError: it is that of no L2S model, or holds what does not fit.
    """
    path = os.path.join(directory, "config.json")
    fields = read_json(path)
    for name, expected in (("family", FAMILY), ("format", pretrained.FORMAT)):
        if (found := fields.get(name)) != expected:
            raise ValueError(f"{path}: {name} is {shown(found)}, expected {expected!r}")
    for name, needed in _NEEDED.items():
        part = fields.get(name) if name else fields
        for key in needed if isinstance(part, dict) else ():
            if key not in part:
                raise ValueError(f"{path}: not the config of an L2S model: no {name}.{key}")
    own = {name: value for name, value in fields.items() if name not in ("format", "family")}
    read(_Bundle, own, f"{path}: config")
    return fields, path


def check_tokenizer(directory: str, config: Any, tokenizer: Tokenizer) -> None:
    """Checks that a model has an id for each piece of its tokenizer.

    Args:
      directory: where they lie.
      config: the model's.
      tokenizer: whose pieces it reads or writes.

    Raises:
      ValueError: it has fewer.
    """
    pieces = whole_of(tokenizer).vocab_size
    if pieces > config.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {pieces} pieces, the model only {config.vocab_size} "
            "ids; expected the tokenizer that it was trained with"
        )


def check_layers(path: str, llm: Any, layers: Groups) -> None:
    """Checks that an LLM has the layers that H is of; `path` is named in errors."""
    try:
        encoding_layer(llm, 0.0, layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
