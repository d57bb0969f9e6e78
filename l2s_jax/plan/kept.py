"""The training steps of a run, compiled and kept in a folder, and found there by the run."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import buckets_of
from l2s_jax.plan.models import make_plan
from l2s_jax.plan.programs import Compiler, Compilers
from l2s_jax.plan.slices import Slice
from l2s_jax.plan.stages import trainings_of
from l2s_jax.training.compiled import CompiledSteps, Writer, bucket_name

log = logging.getLogger(__name__)


def check(config: ConfigDict) -> None:
    """Checks that a plan knows the steps of a run.

    Raises:
      ValueError: they depend on what the run finds in its data.
    """
    if config.slm.vocabulary != "all":
        raise ValueError(
            f"config.slm.vocabulary={config.slm.vocabulary!r}: expected 'all' with --compiled: "
            "which pieces are kept is found in the labels, and is a part of the program"
        )


def write(directory: str, compilers: Compilers, mesh: Mesh) -> str:
    """Compiles every step, one after another, and writes it; gives a line about them.

    Raises:
      ValueError: one does not fit on the slice, or `directory` has a compiled.json of others.
    """
    count = size = 0
    with Writer(directory, mesh) as writer:
        for stage, bucket, compiler in _steps(compilers, mesh):
            name = bucket_name(bucket)
            with _without_cache():
                step, made = compiler.compiled_step(bucket)
            if made.compiled is None:
                raise ValueError(
                    f"--compiled={directory}: the step of {stage} for the bucket {name} does not "
                    f"fit on {compilers.slice.topology}; plan.md of a plan without --compiled says "
                    "where it would"
                )
            size += writer.add(stage, step.facts, name, step.arguments[2], made.compiled)
            count += 1
            log.info("plan: kept %s %s, %.0f s", stage, name, made.seconds)
    return f"{count} training steps in {directory}, {size / 1e6:.1f} MB"


def find(directory: str, config: ConfigDict, devices: Sequence[Any] | None = None) -> CompiledSteps:
    """The steps in a folder, all of which fit a run of this config on devices; None: on all.

    Raises:
      ValueError: one is missing, damaged or of something else.
    """
    check(config)
    devices = jax.devices() if devices is None else devices
    mesh = sharding.make_mesh(config.mesh, devices)
    found = CompiledSteps(directory, mesh)
    # Nothing is compiled, so nothing has to fit.
    where = Slice("", devices, 1 << 62, None, config.mesh.slices)
    compilers = Compilers(make_plan(config, where.platform), config, where)
    for stage, bucket, compiler in _steps(compilers, mesh):
        step = compiler.training_step(bucket)
        found.check(stage, step.facts, bucket_name(bucket), step.arguments[2])
    return found


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    """Has programs compiled that JAX's cache on disk has: of what it gives, XLA writes only a part.

    (On CPUs: the file then loads, and fails when it runs.)
    """
    was = jax.config.jax_enable_compilation_cache  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it remembers whether it is used
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was)
        compilation_cache.reset_cache()


def _steps(compilers: Compilers, mesh: Mesh) -> Iterator[tuple[str, tuple[int, int], Compiler]]:
    """(stage, bucket, what compiles its step) of each that a run compiles."""
    for training in trainings_of(compilers.config):
        compiler = compilers.of(training.system, mesh, training.work)
        for bucket in buckets_of(compilers.config):
            yield training.stage, bucket, compiler
