"""The programs that training and generation run, compiled for a slice, each of them once."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import buckets_of, check_prompts
from l2s_jax.decoding import engine
from l2s_jax.decoding.loop import CHUNK
from l2s_jax.experiment.feature_cache import encoding
from l2s_jax.experiment.scoring import scoring
from l2s_jax.models.mix import layers_of
from l2s_jax.models.serving import lay_out_all
from l2s_jax.models.systems import LanguageModel
from l2s_jax.plan.hlo import loop_turns
from l2s_jax.plan.models import Plan, plan_of
from l2s_jax.plan.program import Costs, Program, Work
from l2s_jax.plan.refilled import Refilled
from l2s_jax.plan.slices import Slice
from l2s_jax.plan.target import Made, Target
from l2s_jax.settings.search import alone, changed
from l2s_jax.training import optim, update
from l2s_jax.training.compiled import step_facts
from l2s_jax.training.distillation import Distillation

PROGRAMS = ("train", "encode", "prefill", "decode")
RUN = "run"  # beside them, those of all stages of a run


class TrainingStep(NamedTuple):
    """A step of a training before it is compiled.

    whole: a function and arguments that compute the same without loops over layers. facts: what
    `compiled.step_facts` says of it.
    """

    function: Any
    arguments: tuple[Any, Any, dict[str, jax.ShapeDtypeStruct]]
    whole: tuple[Any, tuple]
    facts: dict[str, str]


class Compiler:
    """Compiles the programs of one system for one mesh over a slice, each when it is asked for."""

    def __init__(self, plan: Plan, config: ConfigDict, where: Slice, mesh: Mesh, work: Work):
        """Checks that all divides.

        Raises:
          ValueError: a parameter, a batch or a length that does not divide into the mesh's axes.
        """
        self.plan = plan = plan.laid_out(mesh)
        self.config, self.mesh, self.work = config, mesh, work
        self.target = Target(where, mesh)
        if work.train:
            rows = work.train.batch_size
            sharding.check_rows(rows, mesh, f"config.{work.train_where}.batch_size")
        if work.batch_size:
            sharding.check_rows(work.batch_size, mesh, f"config.{work.decoding_where}.batch_size")
        check_prompts(config, mesh)
        self._flat = plan.unscanned()
        self.target.placed(plan.adapted[1])
        served = jax.eval_shape(
            lambda *params: lay_out_all(plan.system.to_serve(*params), mesh),
            plan.trained,
            plan.frozen,
        )
        self._trained, self._frozen = map(self.target.placed, served)
        self._refilled = Refilled(
            self.target, plan, (self._trained, self._frozen), work, config.max_prompt_tokens
        )
        self._made: dict[str, Program] = {}

    def compile(self, names: Iterable[str]) -> Iterator[tuple[str, Program]]:
        """(name, program) of each of `names`, which are keys of `makers`."""
        makers: dict[str, Callable[[], Program]] = {
            "train": self._train,
            "encode": lambda: self._encode[0],
            "prefill": lambda: self._prefill[0],
            "decode": self._decode,
            "encode_for_cache": self._encode_for_cache,
            "score": self._score,
            "read": self._refilled.read,
            "insert": self._refilled.insert,
            "advance": self._refilled.advance,
        }
        for name in names:
            if name not in self._made:
                self._made[name] = makers[name]()
            yield name, self._made[name]

    def training_step(self, bucket: tuple[int, int]) -> TrainingStep:
        """The step of a batch of that bucket."""
        system, params, frozen = self.plan.adapted
        settings = self.work.train
        assert settings is not None
        optimizer = optim.optimizer(settings, params)
        shardings = update.state_shardings(params, optimizer, settings, self.mesh)
        taught, seed = self.config.distillation, self.work.seed
        is_taught = self.work.distilled
        distillation = Distillation(taught.weight, taught.temperature) if is_taught else None

        def make_step(system: Any) -> Any:
            return update.make_step(system, optimizer, settings, seed, shardings, distillation)

        state = update.abstract_state(params, optimizer, settings, shardings)
        rows = settings.batch_size
        prompt, response = bucket
        batch = self._batch(rows, bucket)
        if self.work.features:
            shape = (rows, prompt, self.plan.l2s.hidden_width)
            batch["llm_hidden"] = self.target.array(shape, jnp.bfloat16)
        if distillation:
            shape = (rows, response, min(taught.top_k, self.plan.system.decoder.vocab_size))
            batch["teacher_ids"] = self.target.array(shape, jnp.int32)
            batch["teacher_log_probs"] = self.target.array(shape, jnp.float32)
        flat, _, flat_frozen = self._flat.adapted
        frozen = self.target.placed(frozen)
        return TrainingStep(
            make_step(system),
            (state, frozen, batch),
            (make_step(flat), (state, flat_frozen, batch)),
            step_facts(system, settings, seed, distillation, state, frozen),
        )

    def compiled_step(self, bucket: tuple[int, int]) -> tuple[TrainingStep, Made]:
        """The step of a batch of that bucket, compiled; that of the largest is "train"."""
        step = self.training_step(bucket)
        made = self.target.compile(step.function, step.arguments)
        if bucket == buckets_of(self.config)[-1]:
            self._made["train"] = self._measured_step(step, made)
        return step, made

    def _train(self) -> Program:
        return self._measured_step(*self.compiled_step(buckets_of(self.config)[-1]))

    def _measured_step(self, step: TrainingStep, made: Made) -> Program:
        settings = self.work.train
        assert settings is not None
        program = self.target.measured(made, settings.batch_size, step.whole)
        if program.costs and settings.accumulation > 1:
            # A loop's body is counted once. The rest of a step is small beside it.
            costs = dataclasses.replace(
                program.costs, flops=program.costs.flops * settings.accumulation
            )
            program = dataclasses.replace(program, costs=costs)
        return program

    @property
    def _prompts(self) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = self.work.batch_size, self.config.max_prompt_tokens
        return self.target.array(shape, jnp.int32), self.target.array(shape, bool)

    @property
    def _settings(self) -> dict[str, Any]:
        """Of decoding, static in its programs."""
        search = changed(dataclasses.asdict(alone(self.work.search)), {"num_beams": 1})
        return {"max_new_tokens": self.work.max_new_tokens, "search": search}

    @functools.cached_property
    def _encode(self) -> tuple[Program, Any]:
        """(the program, what it gives), as of `_prefill`."""
        encode, rows = jax.jit(self.plan.system.encode), self.work.batch_size
        inputs = (self._trained, self._frozen, *self._prompts)
        flat = self._flat
        whole = (jax.jit(flat.system.encode), (self._trained, flat.frozen, *self._prompts))
        made = self.target.compile(encode, inputs)
        hidden = self.target.outputs(jax.eval_shape(encode, *inputs), made.compiled, rows)
        return self.target.measured(made, rows, whole), hidden

    @functools.cached_property
    def _prefill(self) -> tuple[Program, tuple[Any, Any, Any]]:
        system, rows, settings = self.plan.system, self.work.batch_size, self._settings
        start = jax.jit(lambda *arguments: engine.prefill(system, *arguments, **settings))
        inputs = (self._trained, self._frozen, *self._prompts, self._encode[1])
        program, compiled = self.target.program(start, inputs, rows)
        return program, self.target.outputs(jax.eval_shape(start, *inputs), compiled, rows)

    def _decode(self) -> Program:
        """One chunk; its costs are those of one token.

        The compiler counts the operations of a loop's body once, along with those that it moved out
        of the loop. Two bodies in a turn, less one, are one body.
        """
        rows, (logits, cache, history) = self.work.batch_size, self._prefill[1]
        loop = engine.make_loop(self.plan.system, **self._settings)
        limits = jax.ShapeDtypeStruct((rows,), jnp.int32)
        seeds = jax.ShapeDtypeStruct((rows,), jnp.uint32)
        state = jax.eval_shape(loop.start, logits, cache, limits, seeds, history)
        state = self.target.outputs(state, None, rows).replace(cache=cache)

        def chunk(unroll: int) -> Callable[..., Any]:
            return jax.jit(
                lambda trained, state: loop.advance(trained, state, unroll), donate_argnums=1
            )

        arguments = (self._trained, state)
        program, compiled = self.target.program(chunk(1), arguments, rows, steps=CHUNK)
        once = program.costs
        if compiled is None or once is None:
            return program
        twice, _ = self.target.program(chunk(2), arguments, rows)
        more = twice.costs
        if more is None:
            return program
        # The compiler may make several steps of one turn; their collectives are the same ones.
        turns = [n for n in loop_turns(compiled.as_text() or "") if n > 1 and CHUNK % n == 0]
        if len(turns) != 1:  # no telling what a step costs
            return dataclasses.replace(program, costs=None)
        per_token = tuple(
            one._replace(times=one.times // turns[0])
            for one in once.collectives
            if one.times % turns[0] == 0
        )
        costs = Costs(
            flops=more.flops - once.flops,
            memory_bytes=once.memory_bytes,
            collectives=per_token,
        )
        return dataclasses.replace(program, costs=costs)

    def _encode_for_cache(self) -> Program:
        """The LLM's encoding of a batch into the cache of features."""
        program, whole = (
            encoding(system.llm_config, layers_of(system.layers), self.target.rows)
            for system in (self.plan.l2s, self._flat.l2s)
        )
        made = self.target.compile(program, (self._frozen, *self._prompts))
        return self.target.measured(
            made, self.work.batch_size, (whole, (self._flat.frozen, *self._prompts))
        )

    def _score(self) -> Program:
        """The LLM's reading of a batch of responses, for its distributions over their tokens."""
        rows = self.work.batch_size
        batch = self._batch(rows, buckets_of(self.config)[-1])
        taught = self.config.distillation
        top_k = min(taught.top_k, self.plan.system.decoder.vocab_size)
        assert isinstance(self.plan.system, LanguageModel)
        read = scoring(self.plan.system, top_k, taught.temperature, self.target.rows)
        return self.target.program(read, (self._trained, batch), rows)[0]

    def _batch(self, rows: int, bucket: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
        """Prompts and responses."""
        batch = {}
        for name, width in zip((self.plan.system.prompt_name, "response"), bucket, strict=True):
            batch[f"{name}_ids"] = self.target.array((rows, width), jnp.int32)
            batch[f"{name}_mask"] = self.target.array((rows, width), bool)
        return batch


class Compilers:
    """Those of a plan: whoever asks for the same system, mesh and work gets the same one."""

    def __init__(self, plan: Plan, config: ConfigDict, where: Slice):
        """`plan` is that of L2S."""
        self.plan, self.config, self.slice = plan, config, where
        self._known: list[tuple[str, Compiler]] = []
        self._plans: dict[str, Plan] = {}

    def of(self, system: str, mesh: Mesh, work: Work) -> Compiler:
        """That of a system of `plan_of`; errors as of `Compiler`."""
        for name, one in self._known:
            if (name, one.mesh, one.work) == (system, mesh, work):
                return one
        if system not in self._plans:
            self._plans[system] = plan_of(self.plan, self.config, system)
        compiler = Compiler(self._plans[system], self.config, self.slice, mesh, work)
        self._known.append((system, compiler))
        return compiler
