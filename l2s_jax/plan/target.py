"""A mesh over a slice, for which programs are compiled: what they take up and cost there.

Nothing here knows which programs.
"""

from __future__ import annotations

import re
import time
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2s_jax.cluster import sharding
from l2s_jax.models.counting import all_at_once
from l2s_jax.plan.hlo import collectives, memory_bytes
from l2s_jax.plan.program import Costs, Program, held_bytes
from l2s_jax.plan.slices import Slice, parse_size


class Made(NamedTuple):
    """What the compiler made of a function and its arguments.

    compiled: None if it is too large. arguments: their bytes on each device. peak: what the
    compiler said that it needs, where it refused. seconds: that it took. beside: bytes on each
    device that others hold while it runs.
    """

    compiled: jax.stages.Compiled | None
    arguments: int
    peak: int | None
    seconds: float
    beside: int = 0


class Target:
    """A mesh over a slice."""

    def __init__(self, where: Slice, mesh: Mesh):
        self.slice, self.mesh = where, mesh
        self.rows = sharding.batch_sharding(mesh)
        self.replicated = NamedSharding(mesh, P())
        # A mesh of one process's devices is in one slice.
        self._per_slice = where.per_slice if mesh.size > where.per_slice else 0

    def array(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        """An abstract array of rows."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.rows)

    def placed(self, params: Any) -> Any:
        """Parameters with the shardings of the rules; errors as of `parameter_shardings`."""
        return _with_shardings(params, sharding.parameter_shardings(params, self.mesh))

    def outputs(self, tree: Any, compiled: jax.stages.Compiled | None, rows: int) -> Any:
        """What a program gives as the next one takes it: where the compiler leaves it.

        Without a program, rows lie where those of its batch do.
        """

        def where(leaf: Any) -> NamedSharding:
            if rows in leaf.shape:
                axes = [None] * leaf.shape.index(rows)
                return NamedSharding(self.mesh, P(*axes, sharding.ROWS))
            return self.replicated

        return _with_shardings(
            tree, compiled.output_shardings if compiled else jax.tree.map(where, tree)
        )

    def compile(self, function: Any, arguments: tuple) -> Made:
        """The program of a jitted function, of abstract arguments that have their shardings."""
        size = held_bytes(arguments)
        if size > self.slice.capacity:
            return Made(None, size, None, 0.0)
        began = time.perf_counter()
        try:
            with jax.set_mesh(self.mesh):
                compiled, peak = function.lower(*arguments).compile(), None
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            compiled, peak = None, _peak_in(str(error))
        return Made(compiled, size, peak, time.perf_counter() - began)

    def program(
        self, function: Any, arguments: tuple, rows: int, steps: int = 1
    ) -> tuple[Program, jax.stages.Compiled | None]:
        """The program, and what it costs.

        Bytes of memory are those of one of the `steps` that it makes in a loop, without what is
        before it.
        """
        made = self.compile(function, arguments)
        return self.measured(made, rows, (function, arguments), steps), made.compiled

    def measured(
        self, made: Made, rows: int, whole: tuple[Any, tuple], steps: int = 1, turn: bool = False
    ) -> Program:
        """What a program costs.

        FLOPs are the compiler's count, which takes a loop's body once, and at least those of
        `whole`, a function and arguments that compute the same without loops over layers. With
        `turn`, bytes and collectives are those of one turn of the longest loop, and FLOPs those of
        `whole`, which computes what such a turn does: the compiler counts branches not taken, too.
        """
        compiled: Any = made.compiled
        if compiled is None:
            peak = made.peak and made.peak + made.beside
            return Program(rows, made.arguments, None, peak, False, None, made.seconds)
        memory = compiled.memory_analysis()
        temporaries = memory.temp_size_in_bytes
        peak = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + temporaries
            + memory.generated_code_size_in_bytes
            + made.beside
        )
        counted, text = compiled.cost_analysis(), compiled.as_text()
        least = self._least_flops(*whole)
        costs = Costs(
            flops=least if turn else max(counted.get("flops", 0.0), least),
            memory_bytes=memory_bytes(text, only_loops=steps > 1, turn=turn) / steps,
            collectives=tuple(collectives(text, self._per_slice, turn=turn)),
        )
        fits = peak <= self.slice.capacity
        arguments = memory.argument_size_in_bytes
        return Program(rows, arguments, temporaries, peak, fits, costs, made.seconds)

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


def _with_shardings(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), tree, shardings
    )


def _peak_in(message: str) -> int | None:
    """Bytes that the compiler found a program to need, from its refusal."""
    if found := re.search(r"(?:Used|\() ?([\d.]+[KMGT]) ?(?:of|\))", message):
        return parse_size(found[1])
    return None
