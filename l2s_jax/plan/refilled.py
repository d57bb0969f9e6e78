"""The programs of rows that are refilled, of serving/refilled.py, compiled for a slice."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax.decoding import slots
from l2s_jax.decoding.choices import choices_of
from l2s_jax.decoding.slots import SlotLoop
from l2s_jax.plan.models import Plan
from l2s_jax.plan.program import Program, Work, held_bytes
from l2s_jax.plan.target import Target
from l2s_jax.settings.search import Search, alone


class Refilled:
    """Of one system, for rows of prompts that are `width` tokens long."""

    def __init__(
        self, target: Target, plan: Plan, weights: tuple[Any, Any], work: Work, width: int
    ):
        """`weights` are those that decoding takes, where they lie on the mesh."""
        self._target, self._plan, self._weights = target, plan, weights
        self._rows, self._together, self._width = work.batch_size, work.together, width
        self._capacity, self._search = work.max_new_tokens, alone(work.search)

    @functools.cached_property
    def _read(self) -> tuple[Program, Any, Any]:
        """(the program, the rows that it gives, all rows)."""
        target, count, width = self._target, self._together, self._width
        array = target.array
        choices = choices_of([Search()])
        settings = (
            array((count, width), jnp.int32),
            array((count, width), bool),
            array((count,), jnp.int32),
            array((count,), jnp.uint32),
            jax.tree.map(lambda one: array((count,), one.dtype), choices),
            array((count,), bool),
        )

        def of(plan: Plan, frozen: Any) -> tuple[Any, tuple]:
            read: Any = slots.read
            read = functools.partial(read.__wrapped__, self._loop(plan), prompt_slots=width)
            return jax.jit(lambda *inputs: read(*inputs)), (self._weights[0], frozen, *settings)

        function, arguments = of(self._plan, self._weights[1])
        shapes = jax.eval_shape(function, *arguments)
        made = target.compile(function, arguments)
        new = target.outputs(shapes, made.compiled, count)
        empty: Any = slots.regroup
        places = jax.ShapeDtypeStruct((self._rows,), jnp.int32)
        # All rows lie as those that are read do.
        every = target.outputs(
            jax.eval_shape(empty.__wrapped__, shapes, places), made.compiled, self._rows
        )
        made, flat = made._replace(beside=held_bytes(every)), self._plan.unscanned()
        return target.measured(made, count, of(flat, flat.frozen)), new, every

    def read(self) -> Program:
        """Reads the prompts of the rows that are read for together, while all rows are held."""
        return self._read[0]

    def insert(self) -> Program:
        """Puts what was read into the rows."""
        _, new, every = self._read
        insert: Any = slots.insert
        function = jax.jit(lambda *inputs: insert.__wrapped__(*inputs), donate_argnums=0)
        places = jax.ShapeDtypeStruct(
            (self._together,), jnp.int32, sharding=self._target.replicated
        )
        arguments = (every, new, places)
        made = self._target.compile(function, arguments)
        made = made._replace(beside=held_bytes(self._weights))
        return self._target.measured(made, self._together, (function, arguments))

    def advance(self) -> Program:
        """Decodes until rows have ended; its costs are those of a token of each row."""
        _, _, every = self._read
        advance: Any = slots.advance
        advance = functools.partial(advance.__wrapped__, self._loop(self._plan))
        function = jax.jit(lambda *inputs: advance(*inputs), donate_argnums=2)
        ended = jax.ShapeDtypeStruct((self._rows,), bool, sharding=self._target.replicated)
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=self._target.replicated)
        arguments = (*self._weights, every, ended, number, number)
        made = self._target.compile(function, arguments)
        tokens = jax.ShapeDtypeStruct((self._rows,), jnp.int32)
        step = jax.jit(lambda *inputs: self._plan.system.step(*inputs))
        whole = (step, (self._weights[0], tokens, every.rows.cache))
        return self._target.measured(made, self._rows, whole, turn=True)

    def _loop(self, plan: Plan) -> SlotLoop:
        system = plan.system
        return SlotLoop(system, (system.decoder.eos_id,), self._capacity, self._search)
