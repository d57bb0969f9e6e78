"""A comparison's variants: every combination of the values that --vary gives to settings."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from ml_collections import ConfigDict

from l2s_jax.config import settled, wrong_key
from l2s_jax.experiment.training import NO_INPUTS

# Where variants are, below the comparison's folder.
FOLDER = "compare"
# What --vary=seed=0,1,2 sets: the LLM, its labels and the tokenizers are those of config.seed.
SEED, _SET_BY_SEED = "seed", "train_seed"
# What cannot be varied, as patterns over keys, and why.
_NOT_VARIED = {
    **dict.fromkeys(
        (
            *("evaluation", "evaluation.*", "mesh", "mesh.*", "*.mesh.*", "features", "features.*"),
            *("trackers", "task.name", "task.language"),
            *("labels.batch_size", "distillation.batch_size", "decoding.batch_size"),
        ),
        "all variants are measured alike, in the same place",
    ),
    "decoding.search.exact": "L2S answers alone",
    "decoding.search.draft_*": "L2S answers alone",
    **dict.fromkeys(
        (
            *("dtype", "llm.encoder_dtype", "scan_layers", "buckets"),
            *(f"*.train.{name}" for name in NO_INPUTS),
        ),
        "no model is made anew for it, so that all rows would be of the same models",
    ),
}
_LONGEST_NAME = 120
_BRACKETS = {"(": ")", "[": "]", "{": "}"}


@dataclasses.dataclass(frozen=True)
class Axis:
    """The values that one setting takes.

    Attributes:
      key: of the setting, or SEED.
      values: in the order given, no two alike.
    """

    key: str
    values: tuple[Any, ...]

    @property
    def is_seed(self) -> bool:
        """Whether its values are replicates of the same variant."""
        return self.key == SEED


@dataclasses.dataclass(frozen=True)
class Variant:
    """One combination.

    Attributes:
      values: {key: value} of what is varied, but for the seed.
      seed: the seed of what is trained on the SLM's side; None where it is not varied.
      config: of its run.
    """

    values: dict[str, Any]
    seed: int | None
    config: ConfigDict

    @property
    def setting(self) -> str:
        """Its name without the seed."""
        return named(self.values) or "base"

    @property
    def name(self) -> str:
        """KEY=VALUE,...,seed=N, as messages call it."""
        seed = {} if self.seed is None else {SEED: self.seed}
        return named({**self.values, **seed}) or "base"

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        plain = re.sub(r"[^A-Za-z0-9._=,+-]", "_", self.name)
        if plain == self.name and len(plain) <= _LONGEST_NAME:
            return plain
        digest = hashlib.sha256(self.name.encode()).hexdigest()[:8]
        return f"{plain[:_LONGEST_NAME]}-{digest}"


@dataclasses.dataclass(frozen=True)
class Grid:
    """All variants, those of the base first.

    Attributes:
      axes: what is varied.
      base: the values of what is varied, but for the seed, that the config itself has.
      variants: in the order in which they are made.
    """

    axes: tuple[Axis, ...]
    base: dict[str, Any]
    variants: tuple[Variant, ...]

    def directory(self, workdir: str, variant: Variant) -> str:
        """The workdir of a variant."""
        return os.path.join(workdir, FOLDER, variant.folder)

    def settings(self) -> list[list[Variant]]:
        """The variants, those that differ in their seed alone together."""
        groups: dict[str, list[Variant]] = {}
        for variant in self.variants:
            groups.setdefault(variant.setting, []).append(variant)
        return list(groups.values())


def named(values: dict[str, Any]) -> str:
    """KEY=VALUE,KEY=VALUE."""
    return ",".join(f"{key}={shown(value)}" for key, value in values.items())


def shown(value: Any) -> str:
    """A value as it is given on the command line."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value).replace(" ", "")


def make_grid(config: ConfigDict, flags: Sequence[str]) -> Grid:
    """The variants of a config.

    Args:
      config: the base, settled.
      flags: KEY=VALUE,VALUE,... of each --vary. A value with commas is in brackets or quotes.

    Raises:
      ValueError: a flag that does not fit the config, or a variant that no run could be.
    """
    if not flags:
        raise ValueError("--mode=compare: expected --vary=KEY=VALUE,VALUE,...")
    axes: list[Axis] = []
    for flag in flags:
        axis = _axis(config, flag)
        if any(axis.key == other.key for other in axes):
            raise ValueError(f"--vary={flag}: {axis.key} is varied twice, expected it once")
        axes.append(axis)
    varied = [axis for axis in axes if not axis.is_seed]
    seeds = next((axis.values for axis in axes if axis.is_seed), (None,))
    base = {axis.key: _value(config, axis.key) for axis in varied}
    combinations = [
        dict(zip(base, values, strict=True))
        for values in itertools.product(*(axis.values for axis in varied))
    ]
    # The base is what all else is compared with, whether it was asked for or not.
    others = [values for values in combinations if values != base]
    variants = tuple(_variant(config, values, seed) for values in (base, *others) for seed in seeds)
    return Grid(tuple(axes), base, variants)


def not_varied(key: str) -> str:
    """Why a setting cannot be varied; "" where it can."""
    return next((why for pattern, why in _NOT_VARIED.items() if fnmatchcase(key, pattern)), "")


def _variant(config: ConfigDict, values: dict[str, Any], seed: int | None) -> Variant:
    changes = {**values, **({} if seed is None else {_SET_BY_SEED: seed})}
    changed = ConfigDict(config.to_dict())
    changed.update_from_flattened_dict(changes)
    variant = Variant(values, seed, config)
    try:
        made = settled(changed, changes)
    except ValueError as error:
        raise ValueError(f"variant {variant.name}: {error}") from None
    return dataclasses.replace(variant, config=made)


def _axis(config: ConfigDict, flag: str) -> Axis:
    key, equals, text = flag.partition("=")
    where = f"--vary={flag}"
    if not equals or not text:
        raise ValueError(f"{where}: expected KEY=VALUE,VALUE,...")
    if wrong := wrong_key(key):
        raise ValueError(f"{where}: {wrong}")
    if why := not_varied(key):
        raise ValueError(
            f"{where}: {key} is not varied: {why}; expected a setting that models or answers are "
            "made by"
        )
    key = SEED if key == _SET_BY_SEED else key
    old = _value(config, _SET_BY_SEED if key == SEED else key)
    if isinstance(old, ConfigDict):
        raise ValueError(f"{where}: {key} is a section, expected one of its settings")
    values = [_parsed(part, old, where) for part in _split(text, where)]
    if key == SEED and not all(0 <= value < 2**32 for value in values):
        raise ValueError(f"{where}: expected seeds from 0 to {2**32 - 1}")
    for place, value in enumerate(values):
        if value in values[:place]:
            raise ValueError(f"{where}: {shown(value)} is given twice, expected it once")
    return Axis(key, tuple(values))


def _value(config: ConfigDict, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if part not in value:
            raise ValueError(
                f"--vary={key}: the config has no such setting; expected one of "
                f"{', '.join(sorted(value))}"
            )
        value = value[part]
    return value


def _split(text: str, where: str) -> list[str]:
    """The parts between commas that are in no brackets and no quotes."""
    parts, closing, quote = [""], [], ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in _BRACKETS:
            closing.append(_BRACKETS[character])
        elif character in _BRACKETS.values():
            if not closing or closing.pop() != character:
                raise ValueError(f"{where}: {character!r} closes nothing")
        elif character == "," and not closing:
            parts.append("")
            continue
        parts[-1] += character
    if closing or quote:
        raise ValueError(f"{where}: expected {quote or closing[-1]!r} at the end")
    return [part.strip() for part in parts]


def _parsed(text: str, old: Any, where: str) -> Any:
    """A value of the same kind as `old`."""
    kinds = {bool: "true or false", int: "an integer", float: "a number", tuple: "a tuple"}
    if isinstance(old, str):
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    kind = next(kind for kind in (*kinds, object) if isinstance(old, kind))
    wrong = f"{where}: {text!r}: expected {kinds.get(kind, 'a value')}"
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(wrong)
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        if kind is object:
            return text
        raise ValueError(wrong) from None
    if kind is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{wrong}, in brackets")
        return _tuples(value)
    if kind is float and type(value) is int:
        return float(value)
    if kind is not object and type(value) is not kind:
        raise ValueError(wrong)
    return value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
