"""What the stages that train a model have in common."""

from __future__ import annotations

import abc
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from l2s_jax import models
from l2s_jax.config import training_seed
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.stage import RecordedStage, Stage, log
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.files import MODEL_MARKER, atomic_directory, is_whole, listed_names, rename_folder
from l2s_jax.settings.declare import recorded
from l2s_jax.settings.training import Train
from l2s_jax.tokenizers.cut import kept_by, whole_of
from l2s_jax.training import PRNG

if TYPE_CHECKING:
    from flax import linen as nn
    from jax.sharding import Mesh
    from ml_collections import ConfigDict

    from l2s_jax.experiment.lessons import Lessons
    from l2s_jax.experiment.vocabulary import VocabularyStage
    from l2s_jax.models.families import ModelConfig
    from l2s_jax.models.systems import Params, System
    from l2s_jax.models.tuning import Tuned
    from l2s_jax.training.on_policy import OnPolicy

# How training goes on, which the model does not depend on.
NO_INPUTS = (
    "accumulation", "evaluate_every", "log_every", "max_bad_steps", "remat", "save_minutes",
)  # fmt: skip

# Among the inputs, what draws masks of dropout; and what drew them before it was among the inputs.
_PRNG, _FIRST_PRNG = "prng", "rbg"


class Learnt(NamedTuple):
    """What a training learns from.

    data: the examples, with H and the LLM's distributions where these are learnt from.
    validation: those by which a checkpoint is chosen, with H.
    samples: the prompts of `answered`, which are answered at each validation, with H.
    """

    data: TokenizedExamples
    validation: TokenizedExamples
    samples: TokenizedExamples
    answered: Sequence[Example]


class TrainedStage(RecordedStage):
    """A model that training makes: NAME/checkpoints while it trains, then NAME/model.

    Attributes:
      prompts, responses: whose tokens the prompts and the responses are.
      lessons: what it learns; None: the data's own responses.
    """

    unnamed = ("selection.references", "selection.comet")
    since = (_PRNG, "truncate", "cut_responses", *unnamed)

    def __init__(
        self,
        context: Context,
        name: str,
        *needs: Stage,
        prompts: TokenizerStage,
        responses: TokenizerStage | VocabularyStage,
        lessons: Lessons | None = None,
        section: ConfigDict | None = None,
    ):
        super().__init__(context, name, *needs)
        self.prompts, self.responses, self.lessons = prompts, responses, lessons
        self.section = context.config[name] if section is None else section

    @property
    def directory(self) -> str:
        """Where the model lies, which is made if it is missing."""
        return os.path.join(self.made(), "model")

    @property
    def seed(self) -> int:
        """Of what is random in its training."""
        return training_seed(self.context.config)

    @abc.abstractmethod
    def load(self, mesh: Mesh, weights: str) -> tuple[System, Params, Params]:
        """(system, trained, frozen), to generate with on a mesh; read anew by every call."""

    def examples(self) -> Sequence[Example]:
        """What it learns."""
        return self.lessons.examples() if self.lessons else self.context.examples("train")

    def validation(self) -> Sequence[Example]:
        """By what its checkpoints are compared."""
        return self.lessons.validation(self.record) if self.lessons else self.context.validation()

    def is_made(self) -> bool:
        """Whether the model is there."""
        return is_whole(os.path.join(self.record.directory, "model"))

    def progress(self) -> str:
        """The step of the newest checkpoint."""
        folder = os.path.join(self.record.directory, "checkpoints")
        names = listed_names(folder)
        step = max((int(name) for name in names if name.isdigit()), default=0)
        return f"step {step} of {self.section.train.steps}"

    def reopen(self, steps: int) -> None:
        """Keeps the model of so many steps as NAME/model.STEPS."""
        model = os.path.join(self.record.directory, "model")
        if is_whole(model):
            rename_folder(model, f"{model}.{steps}", MODEL_MARKER)

    def training_inputs(self) -> dict[str, Any]:
        """Inputs of any training."""
        config, lessons = self.context.config, self.lessons
        data = lessons.labels.content() if lessons else {"train": self.context.content("train")}
        prompts, responses = self.prompts.tokenizer, self.responses.tokenizer
        limit = config.evaluation.validation_examples
        settings = recorded(Train, self.section.train.to_dict())
        inputs = {
            **(lessons.inputs() if lessons else {}),
            "data": {**data, "validation": self.context.content("validation", limit=limit)},
            "models": models.VERSION,
            "tokenizer": responses.identity,
            "max_prompt_tokens": config.max_prompt_tokens,
            "max_response_tokens": config.max_response_tokens,
            "truncate": config.task.truncate.to_dict(),
            "cut_responses": config.task.cut_responses,
            "seed": self.seed,
            _PRNG: PRNG,
            "train": {k: v for k, v in settings.items() if k not in NO_INPUTS},
        }
        if prompts.identity != responses.identity:
            inputs["prompt_tokenizer"] = prompts.identity
        return inputs | self.context.selection(self.section.train)

    def started(
        self, found: tuple[nn.Module, Params] | None, model: str, where: str
    ) -> tuple[ModelConfig, Params | None]:
        """Config, and parameters unless they are to be random, of a model to train.

        Args:
          found: (module, parameters) of what it starts from.
          model: "llm" or "slm", whose geometry it has where nothing is found.
          where: what a message calls it.
        """
        from l2s_jax.models.families import make_config

        train = self.section.train
        computed = {
            "dropout_rate": train.dropout_rate,
            "scan_layers": self.context.config.scan_layers,
            "remat": train.remat,
        }
        if found:
            module, params = found
            return self.fitted(dataclasses.replace(module.config, **computed), where), params
        tokenizer = whole_of(self.responses.tokenizer)
        geometry = self.context.config[model].model.to_dict()
        config = make_config(
            geometry.pop("family"),
            vocab_size=tokenizer.vocab_size,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            dtype=self.context.dtypes[0],
            **computed,
            **geometry,
        )
        return self.fitted(config, where), None

    def fitted(self, config: ModelConfig, where: str) -> ModelConfig:
        """The config of a model at `where`, once it has been checked against tokenizer and task."""
        from l2s_jax.models.families import check_positions, with_tokens
        from l2s_jax.models.vocabulary import with_vocabulary

        settings, tokenizer = self.context.config, whole_of(self.responses.tokenizer)
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{where}: the model's vocabulary has {config.vocab_size} ids, but its tokenizer "
                f"makes ids up to {tokenizer.vocab_size - 1}"
            )
        config = with_tokens(config, tokenizer.pad_id, tokenizer.eos_id, where)
        check_positions(
            config,
            settings.max_prompt_tokens,
            max(settings.max_response_tokens, settings.decoding.max_new_tokens),
            where=where,
            lower="config.max_prompt_tokens, config.max_response_tokens or "
            "config.decoding.max_new_tokens",
        )
        return with_vocabulary(config, kept_by(self.responses.tokenizer))

    def random(self, system: System, *, without: Sequence[str] = ()) -> dict[str, Any]:
        """Parameters to start from where there are none; `without` some entries.

        Each device of the mesh makes its own part, and holds it: all may be more than a device or a
        host can hold.
        """
        import jax

        from l2s_jax.cluster import sharding

        def init(key: jax.Array) -> dict[str, Any]:
            params = system.init(key)
            return {name: params[name] for name in params if name not in without}

        key = jax.random.key(self.seed)
        where = sharding.parameter_shardings(jax.eval_shape(init, key), self.context.mesh)
        # On a CPU, to optimize a program that runs once takes longer than the program.
        quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(init, out_shardings=where, compiler_options=quick)(key)

    def learnt(self, prepare: Callable[..., None] | None = None) -> Learnt:
        """What the training learns from; where the LLM has to make it, that is done first.

        So it comes before the models to train: the LLM needs their room. `prepare(train=...,
        validation=...)` is called with the tokenized splits.
        """
        from l2s_jax.experiment import judging
        from l2s_jax.experiment.checks import check_batch

        examples = self.examples()
        data = self._tokenized(examples)
        self.context.tell_of_losses(self.name, data, examples)
        # Some may have been left out, as they were too long.
        check_batch(self.name.removesuffix("_frozen"), self.section.train, len(data))
        validation = self._tokenized(self.validation())
        answered = judging.answered(self.context, self.section.train)
        samples = self._tokenized([Example(example.prompt, "", ()) for example in answered])
        if prepare:
            prepare(train=data, validation=validation, **({"samples": samples} if answered else {}))
        if self.lessons and self.lessons.teacher.is_used():
            self.lessons.teacher.put_into(data)
        return Learnt(data, validation, samples, answered)

    def policy(self) -> OnPolicy | None:
        """The LLM that scores what the model writes itself, if it does; read anew by each call."""
        if not self.lessons:
            return None
        return self.lessons.own_responses.load(self.responses.tokenizer, self.name)

    def fit(
        self,
        system: System | Tuned,
        params: Params,
        frozen: Params,
        learnt: Learnt,
        policy: OnPolicy | None,
    ) -> Params:
        """Trains, from the newest checkpoint on; gives the parameters, as `loop.fit` does."""
        import jax

        from l2s_jax.cluster import distributed, sharding
        from l2s_jax.data.batches import examples_of, training_batches, validation_batches
        from l2s_jax.experiment import judging
        from l2s_jax.models.lora import Lora
        from l2s_jax.training import loop
        from l2s_jax.training.distillation import Distillation
        from l2s_jax.training.parts import rows_of

        context, train = self.context, self.section.train
        data, validation, samples, answered = learnt
        log.info("%s: training on %d examples, %d steps", self.name, len(data), train.steps)
        adapted = None
        if lora := self._lora():
            adapted = Lora(cast("System", system), **lora)
            params, base = adapted.split(params, jax.random.key(self.seed))
            frozen = {"base": base, "inner": frozen}
        settings = {
            "prompt_name": system.prompt_name,
            "buckets": context.buckets,
            "batch_size": train.batch_size,
            "rows": sharding.batch_rows(context.mesh, train.batch_size),
        }
        at_a_time = rows_of(train, sharding.batch_ways(context.mesh))
        scored = {
            **settings,
            "batch_size": at_a_time,
            "rows": sharding.batch_rows(context.mesh, at_a_time),
        }
        order = {"seed": self.seed, "buckets": context.buckets, "batch_size": train.batch_size}
        distillation = None
        if data.teacher is not None:
            taught = context.config.distillation
            distillation = Distillation(taught.weight, taught.temperature)
        trained = loop.fit(
            adapted if adapted else system,
            frozen,
            params,
            train,
            batches=training_batches(data, seed=self.seed, **settings),
            validation=validation_batches(validation, **scored),
            directory=self.record.directory,
            fingerprint=distributed.on_primary(lambda: self.record.run),
            seed=self.seed,
            mesh=context.mesh,
            prng=distributed.on_primary(self._prng),
            judge=judging.make(context, train, adapted or system, samples, answered),
            distillation=distillation,
            policy=policy,
            examples=lambda step: examples_of(data, step, **order),
            trackers=context.trackers,
            compiled=context.compiled,
        )
        if not adapted:
            return trained
        base = sharding.gather_on_primary(base)
        return adapted.merge(trained, base) if distributed.is_primary() else trained

    def write_model(self, save: Callable[..., None]) -> None:
        """`save(directory=NAME/model)`, by one process for all; it appears as a whole."""
        from l2s_jax.cluster import distributed

        def write() -> None:
            with atomic_directory(os.path.join(self.record.directory, "model")) as temporary:
                save(directory=temporary)

        distributed.on_primary(write)

    def lora_inputs(self) -> dict[str, Any]:
        """Inputs where only a low-rank change is trained."""
        lora = self._lora()
        return {"lora": lora} if lora else {}

    def _lora(self) -> dict[str, Any] | None:
        lora = self.section.get("lora")
        return lora.to_dict() if lora and lora.rank else None

    def _prng(self) -> str:
        """What draws its masks of dropout: that which did when it was begun."""
        return (self.record.read() or {}).get(_PRNG, _FIRST_PRNG)

    def _tokenized(self, examples: Sequence[Example]) -> TokenizedExamples:
        tokenizers = self.prompts.tokenizer, self.responses.tokenizer
        return self.context.tokenized(examples, *tokenizers)
