"""Which family a model's config belongs to, and its config in our own format."""

from __future__ import annotations

import dataclasses
from typing import Any, get_type_hints

from l2s_jax.checkpoints import gpt2, gpt_neox, llama, t5
from l2s_jax.checkpoints.engine import Family
from l2s_jax.checkpoints.files import listed
from l2s_jax.messages import shown
from l2s_jax.models.family import FamilyConfig
from l2s_jax.models.sizes import check_ids
from l2s_jax.models.vocabulary import without_vocabulary

FORMAT = "l2s_jax"
# Of a model config: how programs compute, which no file says.
RUNTIME_FIELDS = tuple(field.name for field in dataclasses.fields(FamilyConfig))
FAMILIES: tuple[Family, ...] = (t5.FAMILY, gpt2.FAMILY, gpt_neox.FAMILY, llama.FAMILY)


def family_of(config: Any) -> Family:
    """The family of a model config such as T5Config."""
    for family in FAMILIES:
        if isinstance(config, family.config_class):
            return family
    raise ValueError(f"no conversion for a {type(config).__name__}")


def hf_family(fields: dict[str, Any], path: str) -> Family:
    """The family of a config.json of Hugging Face's; `path` is named in errors."""
    model_type = fields.get("model_type")
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(f"{path}: model_type is {shown(model_type)}, expected one of {known}")


def native_family(fields: dict[str, Any], path: str) -> Family:
    """The family of a config.json of ours; `path` is named in errors."""
    if fields.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {shown(fields.get('format'))}, expected {FORMAT!r}")
    for family in FAMILIES:
        if family.name == fields.get("family"):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise ValueError(f"{path}: family is {shown(fields.get('family'))}, expected one of {known}")


def model_config(
    family: Family, fields: dict[str, Any], keys: frozenset[str], path: str, native: bool
) -> Any:
    """The config that a config.json says, beside tensors of these names."""
    try:
        if native:
            return config_from_native(fields, path)
        return family.config_from_hf(fields, keys, path)
    except ValueError as error:
        raise ValueError(str(error) if path in str(error) else f"{path}: {error}") from None


def config_to_native(config: Any) -> dict[str, Any]:
    """A model config as a JSON object: its family and its fields but those of RUNTIME_FIELDS."""
    fields = dataclasses.asdict(without_vocabulary(config))
    for name in RUNTIME_FIELDS:
        del fields[name]
    return {"format": FORMAT, "family": family_of(config).name, **fields}


def config_from_native(fields: dict[str, Any], path: str) -> Any:
    """What `config_to_native` made of a config; `path` is named in errors."""
    family = native_family(fields, path)
    defaults = {f.name: f.default for f in dataclasses.fields(family.config_class)}
    for name in RUNTIME_FIELDS:
        del defaults[name]
    given = {name: value for name, value in fields.items() if name not in ("format", "family")}
    marked = [f"- {name}" for name in sorted(defaults.keys() - given.keys())]
    marked += [f"+ {name}" for name in sorted(given.keys() - defaults.keys())]
    if marked:
        raise ValueError(f"{path}: fields missing (-) or unknown (+): {listed(marked)}")
    for name, value in given.items():
        if dataclasses.is_dataclass(defaults[name]) and isinstance(value, dict):
            given[name] = value = _nested(type(defaults[name]), value, f"{path}: {name}")
        if type(value) is not type(defaults[name]):
            expected = type(defaults[name]).__name__
            raise ValueError(
                f"{path}: {name} is {shown(value)}, expected a value of type {expected}"
            )
    try:
        config = family.config_class(**given)
        check_ids(config)
        return config
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _nested(kind: type, fields: dict[str, Any], where: str) -> Any:
    """A config within a config; a number may be written without its fraction."""
    hints = get_type_hints(kind)
    # Older files lack some that have a default, but no file lacks the kind: others depend on it.
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    needed |= {"kind"} & hints.keys()
    marked = [f"- {name}" for name in sorted(needed - fields.keys())]
    marked += [f"+ {name}" for name in sorted(fields.keys() - hints.keys())]
    if marked:
        raise ValueError(f"{where}: fields missing (-) or unknown (+): {listed(marked)}")
    for name, value in fields.items():
        if type(value) is not hints[name] and (type(value), hints[name]) != (int, float):
            expected = hints[name].__name__
            raise ValueError(
                f"{where}: {name} is {shown(value)}, expected a value of type {expected}"
            )
    try:
        return kind(**{name: hints[name](value) for name, value in fields.items()})
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None
