"""`--mode=plan`: compile a config's programs for a slice, and report; or try many meshes."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster import sharding
from l2s_jax.config import mesh_sizes, naming_mesh, typed
from l2s_jax.experiment.early import check_division, check_models
from l2s_jax.plan import costs, kept, report
from l2s_jax.plan.models import Plan, make_plan, models_of
from l2s_jax.plan.program import Program, shard_bytes
from l2s_jax.plan.programs import PROGRAMS, RUN, Compiler, Compilers
from l2s_jax.plan.slices import Slice, open_slice
from l2s_jax.plan.stages import (
    Run,
    answering_mesh,
    answering_to_evaluate,
    longest,
    meshes_of,
    trainings_of,
)
from l2s_jax.settings import rules
from l2s_jax.training import optim, update

log = logging.getLogger(__name__)

# The programs of each part of what L2S does, which may have meshes of their own.
_PARTS = {"train": PROGRAMS[:1], "generate": PROGRAMS[1:]}


def plan(
    config: ConfigDict,
    workdir: str,
    topology: str,
    *,
    programs: Sequence[str] = (*PROGRAMS, RUN),
    price: float | None = None,
    mfu: float | None = None,
    examples: int | None = None,
    response_tokens: float | None = None,
    sweep: bool = False,
    batch_sizes: Sequence[int] = (),
    compiled: str = "",
) -> str:
    """Compiles `programs` for a slice, writes plan.json and plan.md; gives the latter's text.

    With `sweep`, also for every mesh over the slice and each of `batch_sizes` (those of the config
    if there are none). `price` is in dollars per chip-hour. `mfu` is the share of the chips' FLOPs
    that estimates of the run reckon with. `examples` are those of the train split, which is counted
    where it is at hand and this is None. `response_tokens` are those of a response of the run, on
    average; None: as many as it may have. `compiled` is a folder for the training steps of a run.

    Raises:
      ValueError: no such slice, a mesh that does not divide it, or a config that no run could use.
    """
    every = (*PROGRAMS, RUN)
    if set(programs) - set(every) or not programs:
        raise ValueError(f"--programs={','.join(programs)}: expected some of {','.join(every)}")
    if price is not None and not price > 0:
        raise ValueError(f"--price={price:g}: expected dollars per chip-hour, above 0")
    if mfu is not None and not 0 < mfu <= 1:
        raise ValueError(f"--mfu={mfu:g}: expected a share of the peak, above 0 and at most 1")
    if examples is not None and examples < 1:
        raise ValueError(f"--examples={examples}: expected a number above 0")
    most = longest(config)
    if response_tokens is not None and not 1 <= response_tokens <= most:
        raise ValueError(
            f"--response_tokens={response_tokens:g}: expected a mean from 1 to {most}, the most "
            "that a response may have"
        )
    if any(size < 1 for size in batch_sizes):
        raise ValueError(
            f"--batch_sizes={','.join(map(str, batch_sizes))}: expected numbers above 0"
        )
    rules.check(typed(config))
    if config.decoding.weights != "float":
        raise ValueError(
            f"config.decoding.weights={config.decoding.weights!r}: expected 'float', for which "
            "plans are made"
        )
    for size in batch_sizes:
        with_rows(config, size)
    if compiled:
        kept.check(config)
    where = open_slice(topology)
    mesh = make_mesh(config, where)
    meshes = meshes_of(config, where, mesh, make_mesh)
    known = models_of(config)
    check_models(config, known)
    check_division(config, meshes, known)
    compilers = Compilers(make_plan(config, where.platform, known), config, where)
    parts = [part for part, names in _PARTS.items() if set(programs) & set(names)]
    own = {part: _compiler(compilers, config, _mesh(config, where, part), part) for part in parts}
    run = Run(compilers, meshes, examples, response_tokens) if RUN in programs else None
    stages = list(run.stages()) if run else []
    if compiled:
        log.info("plan: %s", kept.write(compiled, compilers, mesh))
    result = report.describe(where, mesh) | {"model": compilers.plan.description()}
    result["programs"] = {}
    for part, compiler in own.items():
        of_mesh = {"mesh": dict(compiler.mesh.shape)}
        for name, program in compiler.compile(n for n in _PARTS[part] if n in programs):
            result["programs"][name] = costs.program_report(program, where) | of_mesh
            fits = "fits" if program.fits else "does not fit"
            log.info("plan: %s %s, compiled in %.0f s", name, fits, program.compile_s)
    result["throughput"] = report.throughput(result["programs"], config, where.chips, price)
    if run:
        reports = []
        for stage in stages:
            reports.append(costs.stage_report(stage, where, price, mfu))
            log.info("plan: %s", stage.name)
        result["run"] = costs.run_report(reports, run, price, mfu)
    too_large = {name for name, program in result["programs"].items() if not program["fits"]}
    if too_large:
        result["meshes_with_room"] = {
            part: [
                f"{sharding.mesh_name(other)}: {size / 2**30:.2f} GiB"
                for size, other in _with_room(compilers, part)
            ]
            for part, names in _PARTS.items()
            if too_large & set(names)
        }
    if sweep:
        result["sweep"] = _sweep(compilers, parts, run, batch_sizes)
    return report.write(result, workdir)


def _mesh(config: ConfigDict, where: Slice, part: str) -> Mesh:
    """That of one of _PARTS."""
    return make_mesh(config, where, "" if part == "train" else "decoding")


def _compiler(compilers: Compilers, config: ConfigDict, mesh: Mesh, part: str) -> Compiler:
    """Of one of _PARTS; `config` may have other batches than that of the plan."""
    if part == "train":
        work = next(one.work for one in trainings_of(config) if one.system == "l2s")
        return compilers.of("l2s", mesh, work)
    with naming_mesh(config, "decoding"):
        return compilers.of("l2s", mesh, answering_to_evaluate(config))


def make_mesh(config: ConfigDict, where: Slice, section: str = "") -> Mesh:
    """The mesh of training, or of a section with one of its own, over a slice, or over several.

    Raises:
      ValueError: it does not fit them.
    """
    if config.mesh.slices != where.slices:
        raise ValueError(
            f"config.mesh.slices={config.mesh.slices}: --topology={where.topology} has "
            f"{where.slices}; expected the same"
        )
    with naming_mesh(config, section):
        return sharding.make_mesh(mesh_sizes(config, section), where.devices)


def meshes(config: ConfigDict, where: Slice, part: str) -> Iterator[Mesh]:
    """Every mesh over the slice, or over several, of which data goes from one to the next.

    `sequence` is as the part of what a run does, train, generate or labels, has it.
    """
    section = {"train": "", "generate": "decoding"}.get(part, part)
    sequence = mesh_sizes(config, section)["sequence"]
    if sequence == -1:
        sequence = make_mesh(config, where, section).shape["sequence"]
    count = len(where.devices) // sequence
    for data in _divisors(count):
        for fsdp in _divisors(count // data):
            other = copy.deepcopy(config)
            other.mesh.update(data=data, fsdp=fsdp, tensor=count // data // fsdp, sequence=sequence)
            try:
                yield make_mesh(other, where)
            except ValueError:
                continue  # data that the slices do not divide


def with_rows(config: ConfigDict, batch_size: int) -> ConfigDict:
    """A config whose batches, of L2S in training and of all that answers, have so many rows.

    Raises:
      ValueError: no run could have them.
    """
    changed = copy.deepcopy(config)
    changed.l2s.train.batch_size = changed.decoding.batch_size = batch_size
    if changed.labels.source == "llm":
        changed.labels.batch_size = batch_size
    try:
        rules.check(typed(changed))
    except ValueError as error:
        raise ValueError(f"--batch_sizes: {batch_size}: {error}") from None
    return changed


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]


def _weights(models: Plan, config: ConfigDict, mesh: Mesh, part: str) -> int:
    """Bytes on each device of the weights, and of the optimizer's state in training."""
    total, trees = 0, [models.trained, models.frozen]
    if part == "train":
        _, params, frozen = models.adapted
        settings = config.l2s.train
        optimizer = optim.optimizer(settings, params)
        shardings = update.state_shardings(params, optimizer, settings, mesh)
        state = update.abstract_state(params, optimizer, settings, shardings)
        total, trees = sum(map(shard_bytes, jax.tree.leaves(state))), [frozen]
    for tree in trees:
        places = jax.tree.leaves(sharding.parameter_shardings(tree, mesh))
        for leaf, place in zip(jax.tree.leaves(tree), places, strict=True):
            total += math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def _with_room(compilers: Compilers, part: str) -> list[tuple[int, Mesh]]:
    """(bytes of weights, mesh) of the meshes where these fit, least first."""
    found, config, where = [], compilers.config, compilers.slice
    for mesh in meshes(config, where, part):
        try:
            _compiler(compilers, config, mesh, part)
        except ValueError:
            continue  # it does not divide
        size = _weights(compilers.plan, config, mesh, part)
        if size < where.capacity:
            found.append((size, mesh))
    return sorted(found, key=lambda pair: pair[0])


def _sweep(
    compilers: Compilers, parts: Sequence[str], run: Run | None, batch_sizes: Sequence[int]
) -> dict[str, list[dict[str, Any]]]:
    """For training, generation and labels, the meshes and batches that fit, fastest first."""
    config, where = compilers.config, compilers.slice
    tries = {part: functools.partial(_tried, compilers, part) for part in parts}
    sizes = {"train": config.l2s.train.batch_size, "generate": config.decoding.batch_size}
    if run and config.labels.source == "llm":
        tries["labels"] = functools.partial(_tried_labels, run, where)
        sizes["labels"] = config.labels.batch_size
    ranked: dict[str, list[dict[str, Any]]] = {}
    for name, tried in tries.items():
        rows = []
        for batch_size in batch_sizes or (sizes[name],):
            for mesh in meshes(config, where, name):
                what = f"{name} with {batch_size} rows on {sharding.mesh_name(mesh)}"
                try:
                    compile_it = tried(mesh, batch_size)
                except ValueError as error:  # it does not divide
                    log.info("plan: no %s: %s", what, error)
                    continue
                compiled, tokens_per_s = compile_it()
                log.info("plan: %s", what)
                if not all(program.fits for program in compiled.values()):
                    continue
                rows.append(
                    {
                        "mesh": dict(mesh.shape),
                        "batch_size": batch_size,
                        "tokens_per_s": tokens_per_s,
                        "peak": max(program.peak or 0 for program in compiled.values()),
                    }
                )
        ranked[name] = sorted(rows, key=lambda row: (-(row["tokens_per_s"] or 0), row["peak"]))
    return ranked


# Compiles the programs of some work on a mesh, and gives them and tokens per second.
Tried = Callable[[], tuple[dict[str, Program], float | None]]


def _tried(compilers: Compilers, part: str, mesh: Mesh, batch_size: int) -> Tried:
    """One of _PARTS; errors as of `_compiler`."""
    config, where = with_rows(compilers.config, batch_size), compilers.slice
    compiler = _compiler(compilers, config, mesh, part)

    def compile_it() -> tuple[dict[str, Program], float | None]:
        compiled = dict(compiler.compile(_PARTS[part]))
        reports = {name: costs.program_report(one, where) for name, one in compiled.items()}
        rate = report.throughput(reports, config, where.chips, None).get(part)
        return compiled, rate and rate["tokens_per_s"]

    return compile_it


def _tried_labels(run: Run, where: Slice, mesh: Mesh, batch_size: int) -> Tried:
    """The LLM's labels, likewise."""
    stage, tokens = run.labels_of_all_rows(answering_mesh(where, mesh), batch_size)

    def compile_it() -> tuple[dict[str, Program], float | None]:
        compiled = stage.compile()
        hours = costs.stage_report(stage, where, None, None)["hours"]
        return compiled, hours and tokens / hours / 3600

    return compile_it
