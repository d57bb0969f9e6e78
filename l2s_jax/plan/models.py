"""The L2S system of a config as shapes, without a weight or a tokenizer read."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.checkpoints import pretrained
from l2s_jax.config import compute_dtypes
from l2s_jax.experiment import early
from l2s_jax.files import exists
from l2s_jax.hub import cached, is_name
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.lora import Adapted, Adapters, Lora
from l2s_jax.models.mix import encoding_layer
from l2s_jax.models.serving import lay_out_all, to_serve
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

    models: the LLM's and the SLM's configs, as of `models_of`. trained and frozen: as decoding
    takes them. adapted: (system, trained, frozen) as training does, which differ with LoRA, and
    where H comes from a cache.
    """

    models: Mapping[str, ModelConfig]
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
        return dataclasses.replace(
            self,
            system=plain,
            frozen=unstack_layers(self.frozen),
            adapted=(adapted, trained, unstack_layers(frozen)),
        )

    def laid_out(self, mesh: Mesh) -> Plan:
        """The same with what encodes as a run on a mesh reads it: see `serving.lay_out`."""

        def held(params: Params) -> Params:
            return jax.eval_shape(functools.partial(lay_out_all, mesh=mesh), params)

        system, trained, frozen = self.adapted
        frozen = {**frozen, "inner": held(frozen["inner"])} if "inner" in frozen else held(frozen)
        return dataclasses.replace(
            self, frozen=held(self.frozen), adapted=(system, trained, frozen)
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


def models_of(config: ConfigDict) -> dict[str, ModelConfig]:
    """{"llm", "slm"}: configs of the models, without a tokenizer or a checkpoint at hand.

    Of a model on the hub that is no published geometry, its config is downloaded.

    Raises:
      ValueError: a model that is neither a folder, nor a published geometry, nor described.
    """

    def vocabulary(name: str, llm: ModelConfig | None) -> int:
        given = config.tokenizer.train_vocab_size
        if size := config[name].get("tokenizer", config.tokenizer).train_vocab_size or given:
            return size
        if llm and config.llm.path:
            return llm.vocab_size
        raise ValueError(
            f"config.{name}: expected a path (a folder, or a published geometry), or "
            "config.tokenizer.train_vocab_size above 0"
        )

    found = early.models_of(config, _read, vocabulary)
    if config.slm.vocabulary.isdecimal():
        size, slm = int(config.slm.vocabulary), found["slm"]
        if size > slm.vocab_size:
            raise ValueError(f"config.slm.vocabulary={size}: expected at most {slm.vocab_size}")
        found["slm"] = with_vocabulary(slm, of_size(slm, size))
    elif config.slm.vocabulary != "all":
        log.info("slm: planned with its whole vocabulary, since no text is read")
    return found


def make_plan(
    config: ConfigDict, platform: str, models: Mapping[str, ModelConfig] | None = None
) -> Plan:
    """The L2S system that training this config would build on devices of `platform`.

    `models` are as of `models_of`, whose errors are this function's too.

    Raises:
      ValueError: the LLM has no such layer.
    """
    models = models or models_of(config)
    llm, slm = models["llm"], models["slm"]
    dtype, encoder_dtype = compute_dtypes(config.dtype, config.llm.encoder_dtype, platform)
    settings = config.l2s
    shared_vocabulary = _shared_vocabulary(config, llm, slm)
    slm = dataclasses.replace(
        slm,
        dtype=dtype,
        dropout_rate=settings.train.dropout_rate,
        scan_layers=config.scan_layers,
        remat=settings.train.remat,
    )
    layer = encoding_layer(llm, config.llm.layer, settings.layers)
    llm = dataclasses.replace(llm, dtype=encoder_dtype, scan_layers=config.scan_layers)
    with early.naming_layer():
        encoder, frozen = pretrained.abstract_encoder(llm, layer)
    frozen = jax.eval_shape(lambda params: to_serve(params, encoder, "float", encodes=True), frozen)
    system = early.joined(settings, encoder, slm, shared_vocabulary=shared_vocabulary)
    if config.distillation.on_policy:
        log.info("batches that L2S writes itself, and the whole LLM that scores them: not planned")
    trained = jax.eval_shape(system.init, jax.random.key(0))
    beside = frozen
    if config.features.cache:
        beside = {name: frozen[name] for name in system.beside_hidden}
    adapted = _adapted(system, trained, beside, settings.lora)
    return Plan(models, system, trained, frozen, adapted)


def plan_of(l2s: Plan, config: ConfigDict, name: str) -> Plan:
    """That of a system: of the LLM or the SLM alone, of L2S, or of L2S with its LLM "tuned"."""
    if name in ("llm", "slm"):
        return _alone(l2s, config, name)
    return _tuned(l2s, config) if name == "tuned" else l2s


def _alone(plan: Plan, config: ConfigDict, name: str) -> Plan:
    """The LLM or the SLM of that of L2S, as `name` says, as it is trained and answers by itself."""
    section = config[name]
    model = dataclasses.replace(
        plan.models[name],
        dtype=plan.l2s.slm_config.dtype,
        dropout_rate=section.train.dropout_rate,
        scan_layers=config.scan_layers,
        remat=section.train.remat,
    )
    system = LanguageModel(name, model)
    trained = jax.eval_shape(system.init, jax.random.key(0))
    adapted = _adapted(system, trained, {}, section.get("lora"))
    return Plan(plan.models, system, trained, {}, adapted)


def _tuned(plan: Plan, config: ConfigDict) -> Plan:
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
    adapted = both, trained, base
    return dataclasses.replace(plain, system=system, trained=plan.trained, adapted=adapted)


def _adapted(
    system: System, trained: Params, frozen: Params, lora: ConfigDict | None
) -> tuple[Any, Params, Params]:
    """(system, trained, frozen) as training has them."""
    if not (lora and lora.rank):
        return system, trained, frozen
    both = Lora(system, **lora.to_dict())
    adapters, base = jax.eval_shape(both.split, trained, jax.random.key(0))
    return both, adapters, {"base": base, "inner": frozen}


def _read(path: str, setting: str) -> ModelConfig:
    """The config of the model in a folder, or that is published or on the hub by that name."""
    # What a published name stands for is known without asking the hub.
    if exists(path) or cached(path, "config"):
        return pretrained.read_config(path)
    known = os.path.basename(os.path.normpath(path)).lower()
    if known not in GEOMETRIES and is_name(path):
        return pretrained.read_config(path)
    if known not in GEOMETRIES:
        raise ValueError(
            f"{setting}={path!r}: neither a folder with a config.json nor the name of a published "
            f"geometry, expected one of {', '.join(GEOMETRIES)}"
        )
    log.info("%s: no folder %s, planned with the published geometry", setting, path)
    return GEOMETRIES[known]


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
