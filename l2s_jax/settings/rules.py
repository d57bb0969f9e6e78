"""Settings beside each other, over the whole config: which have no effect, which no run could use.

What concerns one section alone is said there (`Section.conflict`).
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

from l2s_jax.settings import limits
from l2s_jax.settings.cut import Cut
from l2s_jax.settings.declare import Section, flat, read
from l2s_jax.settings.search import changed
from l2s_jax.settings.sections import Settings

SYSTEMS = ("llm", "slm", "l2s")


class Idle(NamedTuple):
    """Settings without effect at some values of another; `keys` is a pattern over their keys.

    But for those of `(pattern, key)` in `unless`, where the setting `key` is on.
    """

    keys: str
    by: str
    when: Callable[[Any], bool]
    why: str
    unless: tuple[str, str] | None = None

    def idle(self, values: Mapping[str, Any]) -> list[str]:
        """The keys that have no effect among all values by key."""
        if not self.when(values[self.by]):
            return []
        keys = [key for key in fnmatch.filter(values, self.keys) if key != self.by]
        if self.unless and values[self.unless[1]]:
            keys = [key for key in keys if not fnmatch.fnmatchcase(key, self.unless[0])]
        return keys


def _is_off(value: Any) -> bool:
    return not value


IDLE = (
    Idle(
        "task.tfds_name",
        "task.source",
        lambda source: source not in ("", "tfds"),
        "only tensorflow-datasets have such a name",
    ),
    Idle(
        "mesh.process_is_granule",
        "mesh.slices",
        lambda slices: slices == 1,
        "all devices are of one slice",
    ),
    Idle("task.chat.*", "task.chat.user", _is_off, "there is no chat"),
    *(
        Idle(f"{where}.model_type", f"{where}.train_vocab_size", _is_off, "no tokenizer is trained")
        for where in ("tokenizer", "slm.tokenizer")
    ),
    *(
        Idle(f"{name}.model.*", f"{name}.path", bool, "the directory has a geometry of its own")
        for name in ("llm", "slm")
    ),
    *(
        Idle("slm.model.*", f"slm.cut.{name}", bool, "the SLM is cut out of a checkpoint")
        for name in flat(Cut())
    ),
    Idle("llm.tune.*", "llm.tune.rank", _is_off, "the LLM stays frozen"),
    *(
        Idle(f"llm.{one}.*", "llm.train.steps", _is_off, "the LLM is not trained")
        for one in ("train", "lora")
    ),
    *(
        Idle(
            f"{name}.train.adam_b2",
            f"{name}.train.optimizer",
            lambda optimizer: optimizer != "adamw",
            "only AdamW looks at it",
        )
        for name in SYSTEMS
    ),
    *(
        Idle(
            f"{name}.train.timescale",
            f"{name}.train.schedule",
            lambda schedule: schedule != "inverse_sqrt",
            "only inverse_sqrt has one",
        )
        for name in SYSTEMS
    ),
    *(
        Idle(
            f"{name}.train.selection_examples",
            f"{name}.train.select",
            lambda select: select != "quality",
            "no checkpoint is chosen by its responses",
        )
        for name in SYSTEMS
    ),
    *(Idle(f"{name}.lora.*", f"{name}.lora.rank", _is_off, "there is no LoRA") for name in SYSTEMS),
    Idle(
        "evaluation.bleu_tokenizer",
        "evaluation.metrics",
        lambda metrics: "bleu" not in metrics,
        "there is no BLEU",
    ),
    Idle(
        "evaluation.comet",
        "evaluation.metrics",
        lambda metrics: "comet" not in metrics,
        "there is no COMET",
    ),
    Idle(
        "l2s.zero_start",
        "l2s.fusion",
        lambda fusion: fusion != "add",
        "the SLM would be given nothing but zeros",
    ),
    Idle("features.*", "features.cache", _is_off, "no features are kept"),
    Idle(
        "labels.*",
        "labels.source",
        lambda source: source == "data",
        "the LLM does not answer",
        # There the LLM gives the distributions too.
        unless=("labels.mesh.*", "distillation.weight"),
    ),
    *(
        Idle(
            f"distillation.{name}",
            "distillation.weight",
            _is_off,
            "nothing is learnt of distributions that are kept",
        )
        for name in ("temperature", "top_k", "batch_size")
    ),
    *(
        Idle(
            f"{name}.train.label_smoothing",
            "distillation.weight",
            lambda weight: weight == 1,
            "the labels are no part of the loss",
        )
        for name in ("slm", "l2s")
    ),
)
# Of these, settings/search.py says itself what has no effect.
_SEARCHES = (("decoding", "search"), ("labels", "search"))


def idle_keys(settings: Settings) -> dict[str, Idle]:
    """The keys of all settings that have no effect beside the others, and the rule that says so."""
    values = flat(settings)
    return {key: rule for rule in IDLE for key in rule.idle(values)}


def settle(values: Mapping[str, Any], given: Collection[str] = ()) -> Settings:
    """The settings of a config that somebody has written, which must all have an effect.

    Args:
      values: by section and name.
      given: keys among them that were set last, on top of a config file. What one of these turns
        off takes its own settings with it, as far as they are not given too.

    Raises:
      ValueError: a value that does not fit, or one that has no effect and is not the default.
    """
    values = copy.deepcopy(dict(values))
    for section, name in _SEARCHES:
        prefix = f"{section}.{name}."
        search = values.get(section, {}).get(name, {})
        if changes := {key: search[key] for key in search if f"{prefix}{key}" in given}:
            try:
                values[section][name] = dataclasses.asdict(changed(search, changes))
            except ValueError as error:
                raise ValueError(f"config.{prefix}{error}") from None
    settings = read(Settings, values, "config")
    for key, rule in idle_keys(settings).items():
        if rule.by in given and key not in given:
            *path, name = key.split(".")
            del functools.reduce(operator.getitem, path, values)[name]
    settings = read(Settings, values, "config")
    if message := next(_without_effect(settings), ""):
        raise ValueError(message)
    return settings


def check(settings: Settings) -> None:
    """Checks that a run could use all of these settings.

    Raises:
      ValueError: it could not.
    """
    if message := next(_unusable(settings), ""):
        raise ValueError(message)


def _without_effect(settings: Settings) -> Iterator[str]:
    """One line for each rule that settings other than the defaults meet."""
    values = flat(settings)
    # A geometry has the defaults of its family, which is itself one of the settings.
    defaults = flat(_defaults_of(settings)) | {
        key: value for key, value in flat(Settings()).items() if key in values
    }
    found: dict[Idle, list[str]] = {}
    for key, rule in idle_keys(settings).items():
        if values[key] != defaults[key]:
            found.setdefault(rule, []).append(key)
    for rule, keys in found.items():
        shown = ", ".join(f"config.{key}={values[key]!r}" for key in keys)
        yield (
            f"{shown}: no effect with config.{rule.by}={values[rule.by]!r}, {rule.why}; expected "
            f"{'its default' if len(keys) == 1 else 'their defaults'}, "
            f"{', '.join(repr(defaults[key]) for key in keys)}"
        )


def _defaults_of(section: Section) -> Section:
    """The section with all at its default, but for families of geometries."""
    inner = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    changes = {name: _defaults_of(one) for name, one in inner.items() if isinstance(one, Section)}
    return type(section)(**changes)


def cannot_draft(settings: Settings, what: str) -> Iterator[str]:
    """One line for each way in which the SLM could not draft for the LLM, as `what` wants it."""
    s = settings
    if s.decoding.search.num_beams > 1:
        yield (
            f"{what} with config.decoding.search.num_beams={s.decoding.search.num_beams}: expected "
            "1, the LLM decides on one response, not on several"
        )
    if s.slm.tokenizer.train_vocab_size:
        yield (
            f"{what} with config.slm.tokenizer.train_vocab_size="
            f"{s.slm.tokenizer.train_vocab_size}: the LLM could not read what the SLM drafts; "
            "expected one tokenizer for both"
        )
    if s.llm.tune.rank:
        yield (
            f"{what} with config.llm.tune.rank={s.llm.tune.rank}: the LLM that encodes is "
            "then not the one that decides; expected one of them to be off"
        )
    if s.decoding.search.draft_tokens > s.decoding.max_new_tokens:
        yield (
            f"config.decoding.search.draft_tokens={s.decoding.search.draft_tokens}: expected "
            f"at most config.decoding.max_new_tokens={s.decoding.max_new_tokens}"
        )


def _unusable(settings: Settings) -> Iterator[str]:
    """One line for each way in which no run could use the settings."""
    s = settings
    if not s.llm.path and not s.llm.train.steps:
        yield "config.llm: expected a path (a Hugging Face directory) or train.steps above 0"
    if not s.llm.path and not s.tokenizer.train_vocab_size:
        yield (
            "config.tokenizer.train_vocab_size=0: expected a size, there is no config.llm.path to "
            "take a tokenizer from"
        )
    for name in ("weight", "on_policy"):
        share = getattr(s.distillation, name)
        if share and s.slm.tokenizer.train_vocab_size:
            yield (
                f"config.distillation.{name}={share:g} with config.slm.tokenizer.train_vocab_size="
                f"{s.slm.tokenizer.train_vocab_size}: the SLM's vocabulary is then not the LLM's, "
                "whose distributions it would learn; expected one of them to be 0"
            )
    made = not s.slm.path and not s.slm.cut.is_used
    if s.l2s.fusion == "cross" and made and s.slm.model.family != "t5":
        yield (
            f"config.l2s.fusion='cross' with config.slm.model.family={s.slm.model.family!r}: it "
            "has no cross-attention, expected 'add' or 'replace'"
        )
    if s.labels.search.exact:
        yield "config.labels.search.exact=True: expected False, the LLM makes labels alone"
    if s.decoding.search.exact:
        yield from cannot_draft(s, "config.decoding.search.exact=True")
    if s.l2s.layers and s.llm.layer:
        yield (
            f"config.llm.layer={s.llm.layer:g} with config.l2s.layers={s.l2s.layers}: H is that of "
            "the layers there, expected config.llm.layer=0"
        )
    if s.llm.tune.rank and s.l2s.lora.rank:
        yield (
            f"config.llm.tune.rank={s.llm.tune.rank} with config.l2s.lora.rank={s.l2s.lora.rank}: "
            "the second stage trains the whole SLM; expected one of them to be 0"
        )
    if s.llm.tune.rank and s.l2s.train.parameter_scale:
        yield (
            f"config.llm.tune.rank={s.llm.tune.rank} with config.l2s.train.parameter_scale=True: "
            "expected False, LoRA's matrices start at zero and updates relative to their size "
            "would be none"
        )
    for where, rows, tokens in _batches(s):
        if wrong := limits.too_many(rows, tokens):
            yield f"config.{where}.batch_size={rows}: {wrong}"
    for split in ("train", "validation", s.evaluation.split):
        if split not in s.task.splits:
            yield (
                f"config.task.splits has {', '.join(s.task.splits) or 'none'}: expected {split!r} "
                "too"
            )


def _batches(settings: Settings) -> Iterator[tuple[str, int, int]]:
    """(section, rows, tokens of each row) of the batches of a run."""
    s, prompt = settings, settings.max_prompt_tokens
    for name in ("llm", "slm", "l2s"):
        yield f"{name}.train", getattr(s, name).train.batch_size, prompt + s.max_response_tokens
    labels = s.labels.max_new_tokens or s.max_response_tokens
    yield "labels", s.labels.batch_size, prompt + labels
    yield "distillation", s.distillation.batch_size, prompt + s.max_response_tokens
    yield "decoding", s.decoding.batch_size, prompt + s.decoding.max_new_tokens
