"""The programs that training and generation run, compiled for a slice, and what they cost."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import buckets_of, check_prompts
from l2s_jax.decoding import engine
from l2s_jax.decoding.loop import CHUNK
from l2s_jax.experiment.feature_cache import encoding
from l2s_jax.experiment.scoring import scoring
from l2s_jax.models.counting import all_at_once
from l2s_jax.models.mix import layers_of
from l2s_jax.models.systems import LanguageModel
from l2s_jax.plan.hlo import collectives, loop_turns, memory_bytes
from l2s_jax.plan.models import Plan
from l2s_jax.plan.program import Costs, Program, Work, shard_bytes, work_of_l2s
from l2s_jax.plan.slices import Slice, parse_size
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
    """Compiles the programs of one system for one mesh over a slice."""

    def __init__(
        self,
        plan: Plan,
        config: ConfigDict,
        where: Slice,
        mesh: Mesh,
        work: Work | None = None,
    ):
        """Checks that all divides; `work` is that of L2S, if it is no other.

        Raises:
          ValueError: a parameter, a batch or a length that does not divide into the mesh's axes.
        """
        self.plan, self.config, self.slice, self.mesh = plan, config, where, mesh
        self.work = work = work or work_of_l2s(config)
        if work.train:
            rows = work.train.batch_size
            sharding.check_rows(rows, mesh, f"config.{work.train_where}.batch_size")
        if work.batch_size:
            sharding.check_rows(work.batch_size, mesh, f"config.{work.decoding_where}.batch_size")
        check_prompts(config, mesh)
        # A mesh of one process's devices is in one slice.
        self._per_slice = where.per_slice if mesh.size > where.per_slice else 0
        self._rows = sharding.batch_sharding(mesh)
        self._replicated = NamedSharding(mesh, P())
        self._flat = plan.unscanned()
        self._placed(plan.adapted[1])
        served = jax.eval_shape(plan.system.to_serve, plan.trained, plan.frozen)
        self._trained, self._frozen = map(self._placed, served)

    def compile(self, names: tuple[str, ...] = PROGRAMS) -> Iterator[tuple[str, Program]]:
        """(name, program) of each of `names`, in the order of PROGRAMS."""
        if "train" in names:
            yield "train", self._train()
        if set(names) - {"train"}:
            for name, program in self._generation(names):
                if name in names:
                    yield name, program

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
            batch["llm_hidden"] = self._array(shape, jnp.bfloat16)
        if distillation:
            shape = (rows, response, min(taught.top_k, self.plan.system.decoder.vocab_size))
            batch["teacher_ids"] = self._array(shape, jnp.int32)
            batch["teacher_log_probs"] = self._array(shape, jnp.float32)
        flat, _, flat_frozen = self._flat.adapted
        frozen = self._placed(frozen)
        return TrainingStep(
            make_step(system),
            (state, frozen, batch),
            (make_step(flat), (state, flat_frozen, batch)),
            step_facts(system, settings, seed, distillation, state, frozen),
        )

    def _train(self) -> Program:
        step = self.training_step(buckets_of(self.config)[-1])
        settings = self.work.train
        assert settings is not None
        program, _ = self._program(step.function, step.arguments, settings.batch_size, step.whole)
        if program.costs and settings.accumulation > 1:
            # A loop's body is counted once. The rest of a step is small beside it.
            costs = dataclasses.replace(
                program.costs, flops=program.costs.flops * settings.accumulation
            )
            program = dataclasses.replace(program, costs=costs)
        return program

    def _generation(self, names: tuple[str, ...]) -> Iterator[tuple[str, Program]]:
        system = self.plan.system
        work = self.work
        rows, width = work.batch_size, self.config.max_prompt_tokens
        ids, mask = self._array((rows, width), jnp.int32), self._array((rows, width), bool)
        weights = (self._trained, self._frozen)
        choices = changed(dataclasses.asdict(alone(work.search)), {"num_beams": 1})
        static = {"max_new_tokens": work.max_new_tokens, "search": choices}

        encode = jax.jit(system.encode)
        inputs = (*weights, ids, mask)
        hidden = jax.eval_shape(encode, *inputs)
        if "encode" in names:
            flat = self._flat
            whole = (jax.jit(flat.system.encode), (self._trained, flat.frozen, ids, mask))
            program, compiled = self._program(encode, inputs, rows, whole)
            yield "encode", program
            hidden = self._outputs(hidden, compiled)
        else:
            hidden = self._outputs(hidden, None)
        if not {"prefill", "decode"} & set(names):
            return

        start = jax.jit(lambda *arguments: engine.prefill(system, *arguments, **static))
        inputs = (*inputs, hidden)
        first = jax.eval_shape(start, *inputs)
        program, compiled = self._program(start, inputs, rows)
        yield "prefill", program
        if "decode" not in names:
            return
        logits, cache, history = self._outputs(first, compiled)
        loop = engine.make_loop(system, **static)
        limits = jax.ShapeDtypeStruct((rows,), jnp.int32)
        seeds = jax.ShapeDtypeStruct((rows,), jnp.uint32)
        state = jax.eval_shape(loop.start, logits, cache, limits, seeds, history)
        state = self._outputs(state, None).replace(cache=cache)
        yield "decode", self._decode(loop, state, rows)

    def encode_for_cache(self) -> Program:
        """The LLM's encoding of a batch into the cache of features."""
        rows, width = self.work.batch_size, self.config.max_prompt_tokens
        ids, mask = self._array((rows, width), jnp.int32), self._array((rows, width), bool)
        programs = [
            encoding(system.llm_config, layers_of(system.layers), self._rows)
            for system in (self.plan.l2s, self._flat.l2s)
        ]
        whole = (programs[1], (self._flat.frozen, ids, mask))
        return self._program(programs[0], (self._frozen, ids, mask), rows, whole)[0]

    def score(self) -> Program:
        """The LLM's reading of a batch of responses, for its distributions over their tokens."""
        rows = self.work.batch_size
        batch = self._batch(rows, buckets_of(self.config)[-1])
        taught = self.config.distillation
        top_k = min(taught.top_k, self.plan.system.decoder.vocab_size)
        assert isinstance(self.plan.system, LanguageModel)
        read = scoring(self.plan.system, top_k, taught.temperature, self._rows)
        return self._program(read, (self._trained, batch), rows)[0]

    def _decode(self, loop: Any, state: Any, rows: int) -> Program:
        """One chunk; its costs are those of one token.

        The compiler counts the operations of a loop's body once, along with those that it moved out
        of the loop. Two bodies in a turn, less one, are one body.
        """

        def chunk(unroll: int) -> Callable[..., Any]:
            return jax.jit(
                lambda trained, state: loop.advance(trained, state, unroll), donate_argnums=1
            )

        arguments = (self._trained, state)
        program, compiled = self._program(chunk(1), arguments, rows, steps=CHUNK)
        once = program.costs
        if compiled is None or once is None:
            return program
        twice, _ = self._program(chunk(2), arguments, rows)
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

    def _program(
        self,
        function: Any,
        arguments: tuple,
        rows: int,
        whole: tuple[Any, tuple] | None = None,
        steps: int = 1,
    ) -> tuple[Program, jax.stages.Compiled | None]:
        """The program, and what it costs.

        FLOPs are the compiler's count, which takes a loop's body once, and at least those of
        `whole`, a function and arguments that compute the same without loops over layers. Bytes of
        memory are those of one of the `steps` that it makes in a loop, without what is before it.
        """
        size = sum(shard_bytes(leaf) for leaf in jax.tree.leaves(arguments))
        if size > self.slice.capacity:
            return Program(rows, size, None, None, False, None, 0.0), None
        began = time.perf_counter()
        try:
            with jax.set_mesh(self.mesh):
                compiled = function.lower(*arguments).compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_too_large(error):
                raise
            seconds = time.perf_counter() - began
            peak = _peak_in(str(error))
            return Program(rows, size, None, peak, False, None, seconds), None
        seconds = time.perf_counter() - began
        memory = compiled.memory_analysis()
        temporaries = memory.temp_size_in_bytes
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + temporaries
            + memory.generated_code_size_in_bytes
        )
        counted, text = compiled.cost_analysis(), compiled.as_text()
        least = self._least_flops(*(whole or (function, arguments)))
        costs = Costs(
            flops=max(counted.get("flops", 0.0), least),
            memory_bytes=memory_bytes(text, only_loops=steps > 1) / steps,
            collectives=tuple(collectives(text, self._per_slice)),
        )
        arguments_bytes = memory.argument_size_in_bytes
        fits = peak <= self.slice.capacity
        return (
            Program(rows, arguments_bytes, temporaries, peak, fits, costs, seconds),
            compiled,
        )

    def _least_flops(self, function: Any, arguments: tuple) -> float:
        """A device's part of the program before it is split.

        The compiler may turn a product whose factors it gathers into a loop over their parts, of
        which it counts one; so it does of attention in blocks.
        """
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
        with all_at_once():
            # A function of its own, which JAX has not traced yet.
            whole = jax.jit(lambda *inputs: function.__wrapped__(*inputs))
            counted = whole.lower(*shapes).cost_analysis() or {}
        return counted.get("flops", 0.0) / self.mesh.size

    def _placed(self, params: Any) -> Any:
        """Parameters with the shardings of the rules."""
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            params,
            sharding.parameter_shardings(params, self.mesh),
        )

    def _batch(self, rows: int, bucket: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
        """Prompts and responses."""
        batch = {}
        for name, width in zip((self.plan.system.prompt_name, "response"), bucket, strict=True):
            batch[f"{name}_ids"] = self._array((rows, width), jnp.int32)
            batch[f"{name}_mask"] = self._array((rows, width), bool)
        return batch

    def _array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._rows)

    def _outputs(self, tree: Any, compiled: jax.stages.Compiled | None) -> Any:
        """What a program gives as the next one takes it: where the compiler leaves it.

        Without a program, rows lie where those of its batch do.
        """
        rows = self.work.batch_size

        def where(leaf: Any) -> NamedSharding:
            if rows in leaf.shape:
                axes = [None] * leaf.shape.index(rows)
                return NamedSharding(self.mesh, P(*axes, sharding.ROWS))
            return self._replicated

        shardings = compiled.output_shardings if compiled else jax.tree.map(where, tree)
        return jax.tree.map(
            lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
            tree,
            shardings,
        )


def is_too_large(error: Exception) -> bool:
    """Whether the compiler says that a program does not fit."""
    return "RESOURCE_EXHAUSTED" in str(error)


def _peak_in(message: str) -> int | None:
    """Bytes that the compiler found a program to need, from its refusal."""
    if found := re.search(r"(?:Used|\() ?([\d.]+[KMGT]) ?(?:of|\))", message):
        return parse_size(found[1])
    return None
