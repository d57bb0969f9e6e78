"""The main job, stage by stage: tokenizer, LLM, labels, SLM alone, L2S.

Each stage leaves its result in a folder of its own, is skipped where the result is there and was
made from the same settings, and continues from its checkpoint where it was interrupted:

    DIR/tokenizer/spiece.model  DIR/slm_tokenizer/spiece.model  (where the SLM has its own)
    DIR/llm/model/  DIR/labels/train-*.jsonl  DIR/slm/model/  DIR/l2s/model/
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax import bundle, convert, distributed, features, labels, sharding, train
from l2s_jax.checks import check_config
from l2s_jax.config import buckets_of, compute_dtypes, label_mesh, label_tokens
from l2s_jax.convert.files import content_hash
from l2s_jax.data.batches import training_batches, validation_batches
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.tasks import Example, load_task
from l2s_jax.generate import Generator
from l2s_jax.loading import generator_settings, load_alone, make_generator, where_to_read
from l2s_jax.models.families import ModelConfig, check_positions, make_config, with_tokens
from l2s_jax.models.lora import Lora
from l2s_jax.models.systems import LanguageModel, LlmToSlm, Params, System
from l2s_jax.text import Tokenizer, load_tokenizer, train_sentencepiece, warn_if_lossy
from l2s_jax.workdir import atomic_directory, find_stage, fingerprint, open_stage

log = logging.getLogger(__name__)


class Experiment:
    """An experiment in its workdir; every result is made, or found, on first use."""

    def __init__(self, config: ConfigDict, workdir: str, *, train: bool = True):
        """Checks what can be checked before any work is done.

        With `train` false nothing is made: a result that isn't there is an error.

        Raises:
          ValueError: a setting that no run could use.
        """
        self.config = config
        self.workdir = workdir
        self._train = train
        self._told_of_losses = False
        self.dtype, self.encoder_dtype = compute_dtypes(config.dtype, config.llm.encoder_dtype)
        self.task = load_task(config.task)
        self.mesh = sharding.make_mesh(config.mesh)
        self.decoding_mesh = sharding.decoding_mesh(self.mesh)
        self.label_mesh = sharding.decoding_mesh(sharding.make_mesh(label_mesh(config)))
        check_config(config, self.mesh, self.decoding_mesh, self.label_mesh)
        self.buckets = buckets_of(config)

    @functools.cached_property
    def llm_tokenizer(self) -> Tokenizer:
        """The tokenizer of every prompt that the LLM reads."""
        path = self.config.llm.path
        if not self.config.tokenizer.train_vocab_size:
            return load_tokenizer(path)
        tokenizer = self._trained_tokenizer("tokenizer", self.config.tokenizer)
        if path and load_tokenizer(path).fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"config.llm.path={path!r}: its tokenizer differs from the one trained here; "
                "expected config.tokenizer.train_vocab_size=0, or the LLM of the same run"
            )
        return tokenizer

    @functools.cached_property
    def slm_tokenizer(self) -> Tokenizer:
        """The tokenizer of every response of the SLM, and of its prompts where it is alone."""
        section = self.config.slm
        if not section.tokenizer.train_vocab_size:
            return load_tokenizer(section.path) if section.path else self.llm_tokenizer
        return self._trained_tokenizer("slm_tokenizer", section.tokenizer)

    @property
    def shared_vocabulary(self) -> bool:
        """Whether LLM and SLM have the same tokenizer."""
        return self.llm_tokenizer.fingerprint == self.slm_tokenizer.fingerprint

    def tokenizers(self, name: str) -> tuple[Tokenizer, Tokenizer]:
        """(that of the prompts, that of the responses) of system "llm", "slm" or "l2s"."""
        return (
            self.slm_tokenizer if name == "slm" else self.llm_tokenizer,
            self.llm_tokenizer if name == "llm" else self.slm_tokenizer,
        )

    @functools.cached_property
    def llm_directory(self) -> str:
        """Where the LLM lies that all else is built on; trained first where so configured."""
        config = self.config.llm
        if not config.train.steps:
            return os.path.abspath(config.path)
        inputs = {
            "path_hash": content_hash(config.path) if config.path else "",
            "model": None if config.path else config.model.to_dict(),
            **self._training_inputs("llm"),
        }
        return self._train_alone("llm", inputs, lambda: self._examples("train"))

    @functools.cached_property
    def llm(self) -> tuple[LanguageModel, Params, Params]:
        """(system, parameters, nothing frozen) of the LLM."""
        return self._load_alone("llm", self.llm_directory)

    @functools.cached_property
    def slm_directory(self) -> str:
        """Where the SLM lies that was trained alone."""
        inputs = {
            **self._slm_inputs(),
            **self._training_inputs("slm"),
            **self._lora_inputs("slm"),
        }
        return self._train_alone("slm", inputs, lambda: self._labelled)

    @functools.cached_property
    def slm(self) -> tuple[LanguageModel, Params, Params]:
        """(system, parameters, nothing frozen) of the SLM trained alone."""
        return self._load_alone("slm", self.slm_directory)

    @functools.cached_property
    def l2s_directory(self) -> str:
        """Where projector and SLM lie that were trained together."""
        config = self.config.l2s
        cache = self.config.features.cache
        inputs = {
            **self._slm_inputs(),
            **self._training_inputs("l2s"),
            **self._lora_inputs("l2s"),
            "llm_hash": self._llm_hash,
            "layer": self.config.llm.layer,
            # (Not the encoder's dtype: H is nearly the same in either.)
            "fusion": config.fusion,
            "projector_width": config.projector_width,
            **({"features": "bfloat16"} if cache else {}),
        }
        directory = self._open_stage("l2s", inputs)
        model = os.path.join(directory, "model")
        if not distributed.on_primary(lambda: os.path.isdir(model)):
            llm, _ = self._encoder(entries=())
            slm_config, slm_params = self._starting_point("slm", config.train)
            system = LlmToSlm(
                llm_config=llm.config,
                slm_config=slm_config,
                projector_width=config.projector_width or slm_config.width,
                fusion=config.fusion,
                shared_vocabulary=self.shared_vocabulary,
            )
            params = self._init(system)
            if slm_params is not None:
                params = {**params, "slm": {k: slm_params[k] for k in params["slm"]}}
            _, frozen = self._encoder(entries=system.beside_hidden if cache else None)
            trained = self._fit(
                "l2s",
                system,
                params,
                frozen,
                directory,
                inputs,
                self._labelled,
                prepare=functools.partial(self._cache_features, system) if cache else None,
            )
            # A model and an LLM of the same workdir stay together when the workdir is moved.
            inside = os.path.join(os.path.abspath(self.workdir), "llm", "model")
            llm_path = os.path.abspath(self.llm_directory)
            save = functools.partial(
                bundle.save,
                system,
                trained,
                llm_path="../../llm/model" if llm_path == inside else llm_path,
                llm_hash=self._llm_hash,
                layer=self.config.llm.layer,
                llm_tokenizer=self.llm_tokenizer,
                slm_tokenizer=self.slm_tokenizer,
                generation=generator_settings(self.config),
            )
            _write_model(model, save)
        return model

    @functools.cached_property
    def l2s(self) -> tuple[LlmToSlm, Params, Params]:
        """(system, trained parameters, the LLM's frozen ones)."""
        return bundle.load(
            self.l2s_directory,
            dtype=self.dtype,
            encoder_dtype=self.encoder_dtype,
            mesh=where_to_read(self.decoding_mesh, self.config.decoding.weights),
            scan_layers=self.config.scan_layers,
        )

    def make_models(self) -> None:
        """Makes LLM, SLM and L2S, in this order, where they are missing; none stays in memory."""
        # What is wrong with an LLM that was there shows before others train.
        convert.inspect(self.llm_directory)
        self._check_model("llm", self.llm_directory)
        # A model is made when its directory is asked for.
        directories = (self.llm_directory, self.slm_directory, self.l2s_directory)
        log.info("models: %s", ", ".join(directories))

    def evaluation_examples(self) -> Sequence[Example]:
        """The examples that the report is about."""
        settings = self.config.evaluation
        return _first(self._examples(settings.split), settings.max_examples)

    def generator(self, loaded: tuple[System, Params, Params], **settings: Any) -> Generator:
        """Text in, text out, with one of the systems above; settings as of `make_generator`."""
        settings = {"mesh": self.decoding_mesh, **settings}
        return make_generator(self.config, loaded, *self.tokenizers(loaded[0].name), **settings)

    @functools.cached_property
    def _llm_hash(self) -> str:
        return content_hash(self.llm_directory)

    def _encoder(self, entries: Sequence[str] | None) -> tuple[Any, Params]:
        """(module, parameters) of what encodes a prompt, of which only `entries` are read."""
        return convert.load_encoder(
            self.llm_directory,
            layer=self.config.llm.layer,
            dtype=self.encoder_dtype,
            serve=True,
            mesh=self.mesh,
            scan_layers=self.config.scan_layers,
            entries=entries,
        )

    def _cache_features(self, system: LlmToSlm, **splits: TokenizedExamples) -> None:
        """Has the batches of these splits hold H, which is computed once."""
        encoder = functools.cache(
            lambda: features.Encoder(system, self._encoder(entries=None)[1], self.mesh)
        )
        config = self.config.l2s.train
        rows = config.batch_size // config.accumulation
        for split, data in splits.items():
            data.hidden = features.cached(
                data,
                self.config.features.cache,
                {
                    "llm_hash": self._llm_hash,
                    "layer": self.config.llm.layer,
                    "dtype": str(self.encoder_dtype),
                    "task": self.config.task.name,
                    "split": split,
                    "tokenizer": self.llm_tokenizer.fingerprint,
                    "max_prompt_tokens": self.config.max_prompt_tokens,
                },
                encoder,
                width=system.llm_config.width,
                buckets=[prompt_tokens for prompt_tokens, _ in self.buckets],
                batch_size=config.batch_size if rows % sharding.batch_ways(self.mesh) else rows,
            )

    @functools.cached_property
    def _labelled(self) -> Sequence[Example]:
        """The train split as the SLM and L2S learn it."""
        examples = self._examples("train")
        settings = self.config.labels
        if settings.source == "data":
            return examples
        inputs = self._label_inputs()
        directory = self._open_stage("labels", inputs)

        def labeller() -> Generator:
            # In float: what is learnt does not depend on how the result is served. Not `self.llm`,
            # which would stay in memory.
            llm = self._load_alone("llm", self.llm_directory, "float", self.label_mesh)
            return self.generator(
                llm,
                weights="float",
                search=settings.search.to_dict(),
                max_new_tokens=label_tokens(self.config),
                batch_size=settings.batch_size,
                mesh=self.label_mesh,
            )

        return labels.label(
            examples,
            labeller,
            directory,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            together=self.label_mesh.is_multi_process,
        )

    @functools.cache  # noqa: B019  an experiment lives as long as its process
    def _examples(self, split: str) -> Sequence[Example]:
        return self.task.examples(split)

    def _tokenized(self, name: str, examples: Sequence[Example]) -> TokenizedExamples:
        prompt_tokenizer, response_tokenizer = self.tokenizers(name)
        return TokenizedExamples(
            examples,
            prompt_tokenizer=prompt_tokenizer,
            response_tokenizer=response_tokenizer,
            max_prompt_tokens=self.config.max_prompt_tokens,
            max_response_tokens=self.config.max_response_tokens,
        )

    def _open_stage(self, name: str, inputs: dict[str, Any]) -> str:
        opened = open_stage if self._train else find_stage
        return distributed.on_primary(lambda: opened(self.workdir, name, inputs))

    def _trained_tokenizer(self, stage: str, settings: ConfigDict) -> Tokenizer:
        """A tokenizer of the train split's own text."""
        inputs = {"task": self._task_inputs(), "seed": self.config.seed, **settings.to_dict()}
        directory = self._open_stage(stage, inputs)

        def make() -> None:
            if os.path.exists(os.path.join(directory, "spiece.model")):
                return
            log.info("%s: training %d pieces", stage, settings.train_vocab_size)
            train_sentencepiece(
                (text for e in self._examples("train") for text in (e.prompt, e.response)),
                vocab_size=settings.train_vocab_size,
                model_type=settings.model_type,
                directory=directory,
                seed=self.config.seed,
            )

        distributed.on_primary(make)
        return load_tokenizer(directory)

    def _task_inputs(self) -> dict[str, Any]:
        # Where the files lie says nothing about what is in them.
        return {k: v for k, v in self.config.task.to_dict().items() if k != "data_dir"}

    def _training_inputs(self, name: str) -> dict[str, Any]:
        config = self.config
        prompt_tokenizer, response_tokenizer = self.tokenizers(name)
        inputs = {
            "task": self._task_inputs(),
            "tokenizer": response_tokenizer.fingerprint,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_response_tokens": config.max_response_tokens,
            "buckets": self.config.buckets,
            "dtype": str(self.dtype),
            "seed": config.seed,
            # Which of two ways to the same gradient is taken makes no other model.
            "train": {k: v for k, v in config[name].train.to_dict().items() if k != "remat"},
        }
        if prompt_tokenizer.fingerprint != response_tokenizer.fingerprint:
            inputs["prompt_tokenizer"] = prompt_tokenizer.fingerprint
        return inputs

    def _label_inputs(self) -> dict[str, Any]:
        return {
            "llm_hash": self._llm_hash,
            "task": self._task_inputs(),
            "max_prompt_tokens": self.config.max_prompt_tokens,
            "max_new_tokens": label_tokens(self.config),
            "search": self.config.labels.search.to_dict(),
        }

    def _slm_inputs(self) -> dict[str, Any]:
        path = self.config.slm.path
        return {
            "slm": {"path_hash": content_hash(path)} if path else self.config.slm.model.to_dict(),
            "labels": "data" if self.config.labels.source == "data" else self._label_inputs(),
        }

    def _lora_inputs(self, name: str) -> dict[str, Any]:
        lora = self.config[name].lora
        return {"lora": lora.to_dict()} if lora.rank else {}

    def _starting_point(self, name: str, settings: ConfigDict) -> tuple[ModelConfig, Params | None]:
        """Config, and parameters unless they are to be random, of an LLM or SLM to train."""
        section = self.config[name]
        computed = {
            "dropout_rate": settings.dropout_rate,
            "scan_layers": self.config.scan_layers,
            "remat": settings.remat,
        }
        tokenizer = self.tokenizers(name)[1]
        if section.path:
            module, params = convert.load(section.path, dtype=self.dtype)
            config = dataclasses.replace(module.config, **computed)
            return self._fitted(config, tokenizer, section.path), params
        geometry = section.model.to_dict()
        config = make_config(
            geometry.pop("family"),
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            dtype=self.dtype,
            **computed,
            **geometry,
        )
        return self._fitted(config, tokenizer, f"config.{name}.model"), None

    def _fitted(self, config: ModelConfig, tokenizer: Tokenizer, where: str) -> ModelConfig:
        """The config of a model at `where`, once it has been checked against tokenizer and task."""
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{where}: the model's vocabulary has {config.vocab_size} ids, but its tokenizer "
                f"makes ids up to {tokenizer.vocab_size - 1}"
            )
        config = with_tokens(config, tokenizer.pad_id, tokenizer.eos_id, where)
        check_positions(
            config,
            self.config.max_prompt_tokens,
            max(self.config.max_response_tokens, self.config.decoding.max_new_tokens),
            where=where,
            lower="config.max_prompt_tokens, config.max_response_tokens or "
            "config.decoding.max_new_tokens",
        )
        return config

    def _check_model(self, name: str, directory: str) -> None:
        """An error if the LLM or SLM in a directory does not fit its tokenizer and the task."""
        self._fitted(convert.read_config(directory), self.tokenizers(name)[1], directory)

    def _init(self, system: System) -> Params:
        return jax.jit(system.init)(jax.random.key(self.config.seed))

    def _train_alone(
        self, name: str, inputs: dict[str, Any], examples: Callable[[], Sequence[Example]]
    ) -> str:
        """Trains an encoder-decoder on its own; gives the directory of the result."""
        directory = self._open_stage(name, inputs)
        model = os.path.join(directory, "model")
        if not distributed.on_primary(lambda: os.path.isdir(model)):
            config, params = self._starting_point(name, self.config[name].train)
            system = LanguageModel(name, config)
            start = self._init(system) if params is None else {name: params}
            trained = self._fit(name, system, start, {}, directory, inputs, examples())

            def save(directory: str) -> None:
                convert.save_hf(config, trained[name], directory)
                self.tokenizers(name)[1].save(directory)

            _write_model(model, save)
        return model

    def _load_alone(
        self, name: str, directory: str, weights: str | None = None, mesh: Mesh | None = None
    ) -> tuple[LanguageModel, Params, Params]:
        """A model to generate with; `weights` and `mesh` other than the config's."""
        mesh = where_to_read(mesh or self.decoding_mesh, weights or self.config.decoding.weights)
        self._check_model(name, directory)
        tokenizer = self.tokenizers(name)[1]
        return load_alone(name, directory, tokenizer, dtype=self.dtype, mesh=mesh)

    def _fit(
        self,
        name: str,
        system: System,
        params: Params,
        frozen: Params,
        directory: str,
        inputs: dict[str, Any],
        examples: Sequence[Example],
        prepare: Callable[..., None] | None = None,
    ) -> Params:
        if not self._train:
            raise ValueError(f"{directory}: not finished; --mode=train continues it")
        config = self.config[name].train
        data = self._tokenized(name, examples)
        if not self._told_of_losses:
            self._told_of_losses = True
            warn_if_lossy(data.prompt_tokenizer, (e.prompt for e in examples), "prompts")
            warn_if_lossy(data.response_tokenizer, (e.response for e in examples), "responses")
        for what, cut in (
            ("prompts", data.truncated_prompts),
            ("responses", data.truncated_responses),
        ):
            if cut:
                log.warning("%s: %d of %d %s were truncated", name, cut, len(data), what)
        log.info("%s: training on %d examples, %d steps", name, len(data), config.steps)
        adapted = None
        if name != "llm" and self.config[name].lora.rank:
            lora = self.config[name].lora
            adapted = Lora(system, **lora.to_dict())
            params, base = adapted.split(params, jax.random.key(self.config.seed))
            frozen = {"base": base, "inner": frozen}
        limit = self.config.evaluation.validation_examples
        validation = self._tokenized(name, _first(self._examples("validation"), limit))
        settings = {
            "prompt_name": system.prompt_name,
            "buckets": self.buckets,
            "batch_size": config.batch_size,
            "rows": sharding.batch_rows(self.mesh, config.batch_size),
        }
        batches = training_batches(data, seed=self.config.seed, **settings)
        validations = validation_batches(validation, **settings)
        if prepare:
            prepare(train=data, validation=validation)
        trained = train.fit(
            adapted if adapted else system,
            frozen,
            params,
            config,
            batches=batches,
            validation=validations,
            directory=directory,
            fingerprint=fingerprint(inputs),
            seed=self.config.seed,
            mesh=self.mesh,
        )
        return jax.device_get(adapted.merge(trained, base)) if adapted else trained


def _write_model(path: str, save: Callable[..., None]) -> None:
    """`save(directory=PATH)`, by one process for all; PATH appears as a whole."""

    def write() -> None:
        with atomic_directory(path) as temporary:
            save(directory=temporary)

    distributed.on_primary(write)


def _first(examples: Sequence[Example], limit: int) -> Sequence[Example]:
    """The first `limit` examples; all of them where it is 0."""
    return [examples[i] for i in range(min(limit, len(examples)))] if limit else examples
