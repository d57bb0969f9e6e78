"""The training steps of a run, compiled and kept in a folder, and found there by the run."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import buckets_of
from l2s_jax.plan.models import Plan, make_plan
from l2s_jax.plan.programs import Compiler, TrainingStep, is_too_large
from l2s_jax.plan.slices import Slice
from l2s_jax.plan.stages import plan_of, trainings_of
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


def write(directory: str, config: ConfigDict, where: Slice, mesh: Mesh, plan: Plan) -> str:
    """Compiles every step, one after another, and writes it; gives a line about them.

    Raises:
      ValueError: one does not fit on the slice, or `directory` has a compiled.json of others.
    """
    count = size = 0
    with Writer(directory, mesh) as writer:
        for stage, bucket, step in _steps(config, where, mesh, plan):
            name = bucket_name(bucket)
            began = time.perf_counter()
            try:
                with jax.set_mesh(mesh), _without_cache():
                    compiled = step.function.lower(*step.arguments).compile()
            except jax.errors.JaxRuntimeError as error:
                if not is_too_large(error):
                    raise
                raise ValueError(
                    f"--compiled={directory}: the step of {stage} for the bucket {name} does not "
                    f"fit on {where.topology}; plan.md of a plan without --compiled says where it "
                    "would"
                ) from None
            size += writer.add(stage, step.facts, name, step.arguments[2], compiled)
            count += 1
            log.info("plan: kept %s %s, %.0f s", stage, name, time.perf_counter() - began)
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
    plan = make_plan(config, where.platform)
    for stage, bucket, step in _steps(config, where, mesh, plan):
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


def _steps(
    config: ConfigDict, where: Slice, mesh: Mesh, plan: Plan
) -> Iterator[tuple[str, tuple[int, int], TrainingStep]]:
    """(stage, bucket, step) of each that a run compiles."""
    for training in trainings_of(config):
        system = plan_of(plan, config, training.system)
        compiler = Compiler(system, config, where, mesh, training.work)
        for bucket in buckets_of(config):
            yield training.stage, bucket, compiler.training_step(bucket)
