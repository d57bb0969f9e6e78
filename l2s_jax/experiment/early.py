"""What is wrong with settings of models, found before the first of them is trained.

Only shapes are computed. What a tokenizer says is not known yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.config import cut_of, label_tokens, naming_mesh
from l2s_jax.experiment.checks import Meshes
from l2s_jax.models.cutting import cut_as_set
from l2s_jax.models.families import ModelConfig, check_positions, make_config
from l2s_jax.models.lora import Adapters, Lora
from l2s_jax.models.mix import encoding_layer
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.models.t5 import T5Config
from l2s_jax.training import optim

# Stands for the number of pieces of a tokenizer that is still to be made.
_SOME = 64


def check_models(config: ConfigDict, models: Mapping[str, ModelConfig] | None = None) -> None:
    """Checks positions, layers, and patterns over the names of parameters.

    `models` are as of `models_of`, where somebody knows them otherwise.

    Raises:
      ValueError: a model is not there, or has too few positions, or a layer that is not there is
        asked for, or a pattern matches nothing.
    """
    models = models or models_of(config)
    cut = cut_of(config.slm).is_used
    search, labelled = config.decoding.search, config.labels.source == "llm"
    limits = ["max_prompt_tokens", "max_response_tokens", "decoding.max_new_tokens"]
    limits += ["decoding.search.draft_tokens"] * search.exact
    # What is drafted is read beyond a response's last token.
    written = config.decoding.max_new_tokens + (search.draft_tokens if search.exact else 0)
    for name, model in models.items():
        made = "cut" if name == "slm" and cut else "model"
        labels = label_tokens(config) if name == "llm" and labelled else 0
        responses = max(config.max_response_tokens, written, labels)
        # An LLM that is there may be one that only encodes.
        answers = not config[name].path or config[name].train.steps or search.exact or labels
        check_positions(
            model,
            config.max_prompt_tokens,
            responses if answers else 0,
            where=config[name].path or f"config.{name}.{made}",
            lower=_either([*limits, *["labels.max_new_tokens"] * bool(labels)]),
        )
        if config[name].train.steps:
            _check_patterns(config[name], f"config.{name}", [LanguageModel(name, model)])
    llm, slm = models["llm"], models["slm"]
    layer = encoding_layer(llm, config.llm.layer, config.l2s.layers)
    with naming_layer():
        encoder, _ = pretrained.family_of(llm).encoder_parameters(llm, layer)
    if config.llm.tune.rank:
        tune = config.llm.tune
        _, shapes = pretrained.abstract_encoder(llm, layer)
        adapters = Adapters(tune.rank, tune.alpha, tune.pattern, "config.llm.tune.pattern")
        jax.eval_shape(adapters.init, jax.random.key(0), shapes)
    if config.l2s.fusion == "cross" and not isinstance(slm, T5Config):
        where = "config.slm.path" if config.slm.path else "config.slm.cut" if cut else "the SLM"
        raise ValueError(
            f"config.l2s.fusion='cross': the model of {where} has no cross-attention, expected "
            "'add' or 'replace'"
        )
    if _has_patterns(config.l2s):
        # Which of both L2S will be is a matter of the tokenizers.
        both = [joined(config.l2s, encoder, slm, shared_vocabulary=one) for one in (True, False)]
        _check_patterns(config.l2s, "config.l2s", both)


def _either(keys: Sequence[str]) -> str:
    """ "config.A, config.B or config.C"."""
    *most, last = [f"config.{key}" for key in keys]
    return f"{', '.join(most)} or {last}"


def check_division(
    config: ConfigDict, meshes: Meshes, models: Mapping[str, ModelConfig] | None = None
) -> None:
    """Checks that each mesh divides the parameters of the models that lie on it.

    `models` are as of `check_models`.

    Raises:
      ValueError: one does not.
    """
    splitting = {
        section: mesh
        for section, mesh in meshes.by_section().items()
        if mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    }
    if not splitting:
        return
    models = models or models_of(config)
    llm, slm = models["llm"], models["slm"]
    layer = encoding_layer(llm, config.llm.layer, config.l2s.layers)
    with naming_layer():
        encoder, shapes = pretrained.abstract_encoder(llm, layer)
    used = {"decoding", "features" if config.features.cache else ""}
    if config.llm.train.steps:
        used.add("")
    if config.labels.source == "llm" or config.distillation.weight:
        used.add("labels")
    system = joined(config.l2s, encoder, slm, shared_vocabulary=True)
    trained = jax.eval_shape(system.init, jax.random.key(0))
    held = ((used, shapes), ({"", "decoding"}, trained))
    for section, mesh in splitting.items():
        for used, shapes in held:
            if section in used:
                with naming_mesh(config, section):
                    sharding.parameter_shardings(shapes, mesh)


def joined(
    l2s: ConfigDict, llm: ModelConfig, slm: ModelConfig, *, shared_vocabulary: bool
) -> LlmToSlm:
    """The system of `config.l2s`, of configs of what encodes and of the SLM."""
    return LlmToSlm(
        llm_config=llm,
        slm_config=slm,
        projector_width=l2s.projector_width or slm.width,
        fusion=l2s.fusion,
        shared_vocabulary=shared_vocabulary,
        layers=l2s.layers,
        normalize=l2s.normalize,
        stack=l2s.stack,
    )


def models_of(
    config: ConfigDict,
    read: Callable[[str, str], ModelConfig] = lambda path, _: pretrained.read_config(path),
    vocabulary: Callable[[str, ModelConfig | None], int] = lambda name, llm: _SOME,
) -> dict[str, ModelConfig]:
    """{"llm", "slm"}: configs of the models, the SLM's after a cut.

    Args:
      config: of the experiment.
      read: (path, the setting that has it) -> the config of the model there; by default, of a name
        on the hub that alone is downloaded.
      vocabulary: (name, the LLM's config for that of the SLM) -> pieces of a model that is made
        here; by default some, since its tokenizer is still to be made.

    Raises:
      ValueError: a model is not there, or the cut is not one of its model.
    """

    def model(name: str, llm: ModelConfig | None = None) -> ModelConfig:
        section = config[name]
        if section.path:
            return read(section.path, f"config.{name}.path")
        geometry = section.model.to_dict()
        pieces = vocabulary(name, llm)
        return make_config(
            geometry.pop("family"), vocab_size=pieces, pad_id=0, eos_id=1, **geometry
        )

    llm, cut = model("llm"), cut_of(config.slm)
    slm = llm if cut.is_used and not config.slm.path else model("slm", llm)
    return {"llm": llm, "slm": cut_as_set(slm, cut) if cut.is_used else slm}


@contextlib.contextmanager
def naming_layer() -> Iterator[None]:
    """Has a ValueError about a layer that the LLM does not have say where it is set."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.llm.layer: {error}") from None


def _has_patterns(section: ConfigDict) -> bool:
    lora = section.get("lora")
    train = section.train
    return bool(train.trainable or train.learning_rate_scales or (lora and lora.rank))


def _check_patterns(section: ConfigDict, where: str, systems: Sequence[Any]) -> None:
    """Raises the first error if in none of the systems all patterns match something."""
    if not _has_patterns(section):
        return
    problem = None
    for system in systems:
        key = jax.random.key(0)
        params = jax.eval_shape(system.init, key)
        try:
            if (lora := section.get("lora")) and lora.rank:
                params, _ = jax.eval_shape(Lora(system, **lora.to_dict()).split, params, key)
            optim.optimizer(section.train, params)
            return
        except ValueError as error:
            problem = problem or error
    raise ValueError(f"{where}.{problem}") from problem
