"""The L2S system of a config as shapes, without a weight or a tokenizer read."""

from __future__ import annotations

import dataclasses
import logging
import os
from typing import Any

import jax
from ml_collections import ConfigDict

from l2s_jax.checkpoints import pretrained
from l2s_jax.config import compute_dtypes, cut_of
from l2s_jax.files import exists
from l2s_jax.hub import cached, is_name
from l2s_jax.models.cutting import cut_as_set
from l2s_jax.models.families import ModelConfig, make_config
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.lora import Adapted, Adapters, Lora
from l2s_jax.models.mix import encoding_layer
from l2s_jax.models.serving import to_serve
from l2s_jax.models.stacking import unstack_layers
from l2s_jax.models.systems import (
    LanguageModel,
    LlmToSlm,
    Params,
    System,
    parameter_count,
)
from l2s_jax.models.tuning import Tuned
from l2s_jax.models.vocabulary import of_size, with_vocabulary
from l2s_jax.tokenizers.tokenizer import load_tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compiled: a system, and ShapeDtypeStructs of its parameters.

    trained and frozen: as decoding takes them. adapted: (system, trained, frozen) as training does,
    which differ with LoRA, and where H comes from a cache.
    """

    system: System
    trained: Params
    frozen: Params
    adapted: tuple[Any, Params, Params]

    @property
    def l2s(self) -> LlmToSlm:
        """The system, of a plan of L2S."""
        assert isinstance(self.system, LlmToSlm)
        return self.system

    def unscanned(self) -> Plan:
        """The same with layers that are not stacked, one by one in every program."""
        system, trained, frozen = self.adapted

        def one_by_one(config: ModelConfig) -> ModelConfig:
            return dataclasses.replace(config, scan_layers=False)

        names = ("config", "llm_config", "slm_config")
        configs = {name: getattr(self.system, name, None) for name in names}
        plain = dataclasses.replace(
            self.system, **{name: one_by_one(config) for name, config in configs.items() if config}
        )
        own = isinstance(system, Adapted)
        adapted = dataclasses.replace(system, system=plain) if own else plain  # pyright: ignore
        return Plan(
            plain,
            self.trained,
            unstack_layers(self.frozen),
            (adapted, trained, unstack_layers(frozen)),
        )

    def description(self) -> dict[str, Any]:
        """For the report."""
        return {
            "llm_parameters": parameter_count(self.frozen),
            "trained_parameters": parameter_count(self.adapted[1]),
            "parameters": parameter_count(self.trained) + parameter_count(self.frozen),
            "shared_vocabulary": self.l2s.shared_vocabulary,
            "dtype": str(self.l2s.slm_config.dtype),
            "encoder_dtype": str(self.l2s.llm_config.dtype),
        }


def make_plan(config: ConfigDict, platform: str) -> Plan:
    """The L2S system that training this config would build on devices of `platform`.

    Of a model on the hub that is no published geometry, its config is downloaded.

    Raises:
      ValueError: a model that is neither a folder, nor a published geometry, nor described.
    """
    dtype, encoder_dtype = compute_dtypes(config.dtype, config.llm.encoder_dtype, platform)
    settings = config.l2s
    llm = _model(config, "llm")
    slm = dataclasses.replace(
        _slm(config, llm),
        dtype=dtype,
        dropout_rate=settings.train.dropout_rate,
        scan_layers=config.scan_layers,
        remat=settings.train.remat,
    )
    layer = encoding_layer(llm, config.llm.layer, settings.layers)
    try:
        encoder, frozen = pretrained.abstract_encoder(
            dataclasses.replace(llm, dtype=encoder_dtype, scan_layers=config.scan_layers),
            layer,
        )
    except ValueError as error:
        raise ValueError(f"config.llm.layer: {error}") from None
    frozen = jax.eval_shape(lambda params: to_serve(params, encoder, "float", encodes=True), frozen)
    system = LlmToSlm(
        llm_config=encoder,
        slm_config=slm,
        projector_width=settings.projector_width or slm.width,
        fusion=settings.fusion,
        shared_vocabulary=_shared_vocabulary(config, llm, slm),
        layers=settings.layers,
        normalize=settings.normalize,
        stack=settings.stack,
    )
    if config.distillation.on_policy:
        log.info("batches that L2S writes itself, and the whole LLM that scores them: not planned")
    trained = jax.eval_shape(system.init, jax.random.key(0))
    beside = frozen
    if config.features.cache:
        beside = {name: frozen[name] for name in system.beside_hidden}
    return Plan(system, trained, frozen, _adapted(system, trained, beside, settings.lora))


def models_of(config: ConfigDict) -> dict[str, ModelConfig]:
    """{"llm", "slm"}: configs of the models; errors as of `make_plan`."""
    llm = _model(config, "llm")
    return {"llm": llm, "slm": _slm(config, llm)}


def alone(config: ConfigDict, name: str, platform: str) -> Plan:
    """The LLM or the SLM, as `name` says, as it is trained and answers by itself.

    Raises:
      ValueError: as of `make_plan`.
    """
    dtype, _ = compute_dtypes(config.dtype, config.llm.encoder_dtype, platform)
    section, model = config[name], _model(config, "llm")
    model = dataclasses.replace(
        _slm(config, model) if name == "slm" else model,
        dtype=dtype,
        dropout_rate=section.train.dropout_rate,
        scan_layers=config.scan_layers,
        remat=section.train.remat,
    )
    system = LanguageModel(name, model)
    trained = jax.eval_shape(system.init, jax.random.key(0))
    return Plan(system, trained, {}, _adapted(system, trained, {}, section.get("lora")))


def tuned(plan: Plan, config: ConfigDict) -> Plan:
    """That of L2S -> the second stage of its training, in which the LLM is adapted too.

    The LLM is held as its checkpoint has it, float32 at the most, and its layers one by one.
    """
    plain = plan.unscanned()
    system, tune = plan.l2s, config.llm.tune
    of_llm = dataclasses.replace(system.llm_config, scan_layers=False, remat=config.l2s.train.remat)
    system = dataclasses.replace(system, llm_config=of_llm)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, "float32"), plain.frozen)
    adapters = Adapters(tune.rank, tune.alpha, tune.pattern, "config.llm.tune.pattern")
    both = Tuned(system, adapters)
    trained, base = jax.eval_shape(both.split, plan.trained, frozen, jax.random.key(0))
    return Plan(system, plan.trained, plain.frozen, (both, trained, base))


def _adapted(
    system: System, trained: Params, frozen: Params, lora: ConfigDict | None
) -> tuple[Any, Params, Params]:
    """(system, trained, frozen) as training has them."""
    if not (lora and lora.rank):
        return system, trained, frozen
    both = Lora(system, **lora.to_dict())
    adapters, base = jax.eval_shape(both.split, trained, jax.random.key(0))
    return both, adapters, {"base": base, "inner": frozen}


def _slm(config: ConfigDict, llm: ModelConfig) -> ModelConfig:
    """The config of the SLM, with what is cut out of a model or left out of its vocabulary."""
    section, cut = config.slm, cut_of(config.slm)
    if cut.is_used:
        slm = cut_as_set(_model(config, "slm") if section.path else llm, cut)
    else:
        slm = _model(config, "slm")
    if not section.vocabulary.isdecimal():
        if section.vocabulary != "all":
            log.info("slm: planned with its whole vocabulary, since no text is read")
        return slm
    size = int(section.vocabulary)
    if size > slm.vocab_size:
        raise ValueError(f"config.slm.vocabulary={size}: expected at most {slm.vocab_size}")
    return with_vocabulary(slm, of_size(slm, size))


def _model(config: ConfigDict, name: str) -> ModelConfig:
    section = config[name]
    if section.path:
        # What a published name stands for is known without asking the hub.
        if exists(section.path) or cached(section.path, "config"):
            return pretrained.read_config(section.path)
        known = os.path.basename(os.path.normpath(section.path)).lower()
        if known not in GEOMETRIES and is_name(section.path):
            return pretrained.read_config(section.path)
        if known not in GEOMETRIES:
            raise ValueError(
                f"config.{name}.path={section.path!r}: neither a folder with a config.json nor the "
                f"name of a published geometry, expected one of {', '.join(GEOMETRIES)}"
            )
        log.info("%s: no folder %s, planned with the published geometry", name, section.path)
        return GEOMETRIES[known]
    vocabulary = section.get("tokenizer", config.tokenizer).train_vocab_size
    vocabulary = vocabulary or config.tokenizer.train_vocab_size
    if not vocabulary:
        vocabulary = 0 if name == "llm" or not config.llm.path else _model(config, "llm").vocab_size
    if not vocabulary:
        raise ValueError(
            f"config.{name}: expected a path (a folder, or a published geometry), or "
            "config.tokenizer.train_vocab_size above 0"
        )
    geometry = section.model.to_dict()
    family = geometry.pop("family")
    return make_config(family, vocab_size=vocabulary, pad_id=0, eos_id=1, **geometry)


def _shared_vocabulary(config: ConfigDict, llm: ModelConfig, slm: ModelConfig) -> bool:
    """Whether both have one tokenizer; without tokenizers, whether their sizes are equal."""
    if config.slm.tokenizer.train_vocab_size:
        return False
    if not config.slm.path:
        return True
    try:
        one, other = load_tokenizer(config.llm.path), load_tokenizer(config.slm.path)
    except (OSError, ValueError):
        return llm.vocab_size == slm.vocab_size
    return one.fingerprint == other.fingerprint
