"""What is wrong with settings of models, found before the first of them is trained.

Only shapes are computed. What a tokenizer says is not known yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.config import cut_of, naming_mesh
from l2s_jax.experiment.checks import Meshes
from l2s_jax.files import is_folder
from l2s_jax.models.cutting import cut_as_set
from l2s_jax.models.families import ModelConfig, check_positions, make_config
from l2s_jax.models.lora import Adapters, Lora
from l2s_jax.models.mix import encoding_layer
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.training import optim

# Stands for the number of pieces of a tokenizer that is still to be made.
_SOME = 64


def check_models(config: ConfigDict) -> None:
    """Checks positions, and patterns over the names of parameters, of all that is to be trained.

    Raises:
      ValueError: a model has too few positions, or a pattern matches nothing.
    """
    models = models_of(config)
    cut = cut_of(config.slm).is_used
    for name, model in models.items():
        if model and not config[name].path and not (name == "slm" and cut):
            check_positions(
                model,
                config.max_prompt_tokens,
                max(config.max_response_tokens, config.decoding.max_new_tokens),
                where=f"config.{name}.model",
                lower="config.max_prompt_tokens, config.max_response_tokens or "
                "config.decoding.max_new_tokens",
            )
        if model and config[name].train.steps:
            _check_patterns(config[name], f"config.{name}", {"": LanguageModel(name, model)})
    llm, slm = models["llm"], models["slm"]
    layer = encoding_layer(llm, config.llm.layer, config.l2s.layers) if llm else 0
    if llm and config.llm.tune.rank:
        tune = config.llm.tune
        adapters = Adapters(tune.rank, tune.alpha, tune.pattern, "config.llm.tune.pattern")
        _, shapes = _encoder(llm, layer)
        jax.eval_shape(adapters.init, jax.random.key(0), shapes)
    if llm and slm and _has_patterns(config.l2s):
        encoder, _ = _encoder(llm, layer)
        _check_patterns(config.l2s, "config.l2s", _joined(config.l2s, encoder, slm))


def check_division(config: ConfigDict, meshes: Meshes) -> None:
    """Checks that each mesh divides the parameters of the models that lie on it.

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
    models = models_of(config)
    llm, slm = models["llm"], models["slm"]
    system: LanguageModel | LlmToSlm | None = slm and LanguageModel("slm", slm)
    held: list[tuple[set[str], Any]] = []
    if llm:
        encoder, shapes = _encoder(llm, encoding_layer(llm, config.llm.layer, config.l2s.layers))
        used = {"decoding", "features" if config.features.cache else ""}
        if config.llm.train.steps:
            used.add("")
        if config.labels.source == "llm" or config.distillation.weight:
            used.add("labels")
        held.append((used, shapes))
        if slm:
            system = _joined(config.l2s, encoder, slm)["shared"]
    if system:
        held.append(({"", "decoding"}, jax.eval_shape(system.init, jax.random.key(0))))
    for section, mesh in splitting.items():
        for used, shapes in held:
            if section in used:
                with naming_mesh(config, section):
                    sharding.parameter_shardings(shapes, mesh)


def _joined(l2s: ConfigDict, llm: ModelConfig, slm: ModelConfig) -> dict[str, LlmToSlm]:
    """Both of what L2S may be: which it will be is a matter of the tokenizers."""
    return {
        vocabulary: LlmToSlm(
            llm_config=llm,
            slm_config=slm,
            projector_width=l2s.projector_width or slm.width,
            fusion=l2s.fusion,
            shared_vocabulary=vocabulary == "shared",
            layers=l2s.layers,
            normalize=l2s.normalize,
            stack=l2s.stack,
        )
        for vocabulary in ("shared", "own")
    }


def models_of(config: ConfigDict) -> dict[str, ModelConfig | None]:
    """{"llm", "slm"}: configs of the models; None of one that lies elsewhere than in a folder.

    Those that are made here have a vocabulary of some size: their tokenizer is still to be made.
    """
    llm = _model(config.llm)
    return {"llm": llm, "slm": _slm(config, llm)}


def _model(section: ConfigDict) -> ModelConfig | None:
    """The config of a model; None of one that lies elsewhere than in a folder."""
    if section.path:
        return pretrained.read_config(section.path) if is_folder(section.path) else None
    geometry = section.model.to_dict()
    return make_config(geometry.pop("family"), vocab_size=_SOME, pad_id=0, eos_id=1, **geometry)


def _encoder(llm: ModelConfig, layer: float) -> tuple[ModelConfig, Any]:
    """(config, shapes) of what encodes of an LLM."""
    try:
        return pretrained.abstract_encoder(llm, layer)
    except ValueError as error:
        raise ValueError(f"config.llm.layer: {error}") from None


def _slm(config: ConfigDict, llm: ModelConfig | None) -> ModelConfig | None:
    """The config of the SLM, which may be cut out of its path's model, or out of the LLM."""
    cut = cut_of(config.slm)
    if not cut.is_used:
        return _model(config.slm)
    source = _model(config.slm) if config.slm.path else llm
    return source and cut_as_set(source, cut)


def _has_patterns(section: ConfigDict) -> bool:
    lora = section.get("lora")
    train = section.train
    return bool(train.trainable or train.learning_rate_scales or (lora and lora.rank))


def _check_patterns(section: ConfigDict, where: str, systems: Mapping[str, Any]) -> None:
    """Raises the first error if in none of the systems all patterns match something."""
    if not _has_patterns(section):
        return
    problem = None
    for system in systems.values():
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
