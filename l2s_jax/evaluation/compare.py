"""`--mode=compare`: trains and measures the variants of a grid beside each other.

DIR/compare/VARIANT/  a workdir of each variant, with links to its stages
DIR/shared/           the stages, each once
DIR/compare.json, compare.md, compare.png, compare.svg
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from l2s_jax.cluster import distributed
from l2s_jax.data.table import Example
from l2s_jax.evaluation import compare_report, evaluate, metrics, significance
from l2s_jax.evaluation.answers import AnswerStage, read_answers
from l2s_jax.evaluation.generators import generator_of
from l2s_jax.experiment import workdir as workdirs
from l2s_jax.experiment.checks import check_examples
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.grid import Grid, Variant, make_grid
from l2s_jax.experiment.room import check_room
from l2s_jax.files import is_bucket, make_folder
from l2s_jax.models.systems import parameter_count
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.rules import SYSTEMS

log = logging.getLogger(__name__)


class _Row(NamedTuple):
    """One line of the table: a system, in all variants in which it is the same.

    variants: the settings that share it, each with its seeds.
    folders: of its answers; several where seeds differ.
    """

    system: str
    variants: list[list[Variant]]
    folders: list[str]


def compare(config: ConfigDict, workdir: str, flags: Sequence[str]) -> dict[str, Any]:
    """Makes what is missing of all variants, measures them, and writes the comparison.

    Args:
      config: the base.
      workdir: DIR. Where an ordinary run of the base lies there, its stages are used.
      flags: of --vary, as `make_grid` takes them.

    Returns:
      What compare.json holds, by process 0; compare_report.py lists its keys.

    Raises:
      ValueError: a flag or a variant that no run could use, found before any work; or what is
        wrong with a variant, whose name it says.
    """
    if is_bucket(workdir):
        raise ValueError(
            f"--workdir={workdir}: --mode=compare expects a folder on a disk, where variants share "
            "stages by links"
        )
    grid = make_grid(config, flags)
    _check(grid, workdir)
    distributed.on_primary(lambda: make_folder(workdir))
    workdirs.check_shared(workdir)
    _check_tokens(grid, workdir)
    for place, variant in enumerate(grid.variants):
        log.info("variant %s (%d of %d)", variant.name, place + 1, len(grid.variants))
        with _named(variant):
            directory = grid.directory(workdir, variant)
            distributed.on_primary(
                functools.partial(workdirs.write_config, directory, variant.config)
            )
            experiment = _experiment(grid, workdir, variant, "make")
            experiment.make()
            for stage in _answers(experiment).values():
                stage.made()
    return _measured(grid, workdir)


def _check(grid: Grid, workdir: str) -> None:
    """Finds out what no run could use, of all variants, before any work is done."""
    references: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for variant in grid.variants:
        with _named(variant):
            experiment = _experiment(grid, workdir, variant, "look")
            experiment.check()
            scoring = evaluate.scoring_of(variant.config)
            names = variant.config.evaluation.metrics
            distributed.on_primary(functools.partial(metrics.check, names, **scoring))
            distributed.on_primary(functools.partial(evaluate.check_selection, variant.config))
            task = str(variant.config.task.to_dict())
            if task not in references:
                references[task] = [e.references for e in experiment.evaluation_examples()]
            if experiment.makes_batches():
                if task not in counts:
                    splits = [experiment.context.examples(s) for s in ("train", "validation")]
                    counts[task], *_ = map(len, splits)  # which reads them
                check_examples(variant.config, counts[task])
            if references[task] != next(iter(references.values())):
                raise ValueError(
                    f"its {variant.config.evaluation.split} split has other references than that "
                    f"of {grid.variants[0].name}; expected the same"
                )
    distributed.on_primary(lambda: check_room(grid, workdir))


def _check_tokens(grid: Grid, workdir: str) -> None:
    """Finds out what tokenizers, which may be trained for it, say of all variants."""
    for variant in grid.variants:
        with _named(variant):
            experiment = _experiment(grid, workdir, variant, "make")
            experiment.check_tokenizers()
            if not experiment.llm.is_used():
                experiment.llm.check()


@contextlib.contextmanager
def _named(variant: Variant) -> Iterator[None]:
    """Has whatever goes wrong inside say in which variant it does."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"variant {variant.name}: {error}") from error
    except Exception:
        log.error("variant %s: failed", variant.name)
        raise


def _experiment(grid: Grid, workdir: str, variant: Variant, mode: str) -> Experiment:
    score = functools.partial(evaluate.primary_score, variant.config)
    directory = grid.directory(workdir, variant)
    return Experiment(variant.config, directory, mode, score, shared=workdir)


def _answers(experiment: Experiment) -> dict[str, AnswerStage]:
    """Of each system that answers."""
    return {
        stage.name: AnswerStage(experiment, stage)
        for stage in experiment.systems
        if stage is not experiment.llm or experiment.llm.answers
    }


def _measured(grid: Grid, workdir: str) -> dict[str, Any]:
    """The comparison of variants that are all made."""
    experiments = {v.name: _experiment(grid, workdir, v, "make") for v in grid.variants}
    rows = _rows(grid, {name: _answers(one) for name, one in experiments.items()})
    held: dict[Any, Any] = {}
    generators: dict[str, Generator] = {}
    for place, row in enumerate(rows):
        # Seeds take the same time.
        experiment = experiments[row.variants[0][0].name]
        generators[str(place)] = _with_shared(_generator(experiment, row.system), held)
    first = experiments[grid.variants[0].name]
    settings = first.context.config.evaluation.latency

    def latencies() -> dict[str, dict[str, float]]:
        return evaluate.latency(generators, 1, settings)

    together = first.context.decoding_mesh.is_multi_process
    timed = latencies() if together else distributed.on_primary(latencies)
    times = [timed[str(place)] for place in range(len(rows))]

    def written() -> dict[str, Any]:
        sizes = [
            {
                "params": parameter_count((one.trained, one.frozen)),
                "params_read_per_token": evaluate.read_per_token(one),
                "latency": latency,
            }
            for one, latency in zip(generators.values(), times, strict=True)
        ]
        report = _report(grid, first, workdir, rows, sizes)
        compare_report.write(report, workdir)
        log.info("comparison: %s", os.path.join(workdir, "compare.md"))
        return report

    return distributed.on_primary(written)


def _generator(experiment: Experiment, system: str) -> Generator:
    (stage,) = (stage for stage in experiment.systems if stage.name == system)
    return generator_of(experiment, stage)


def _with_shared(generator: Generator, held: dict[Any, Any]) -> Generator:
    """The generator, whose frozen part is that of an earlier one where the two are equal.

    All are in memory at once, and variants have the same LLM.
    """

    def leaf(path: Any, x: Any) -> Any:
        for other in held.setdefault((path, x.shape, x.dtype), []):
            if other.sharding == x.sharding and bool(jax.numpy.array_equal(other, x)):
                return other
        held[path, x.shape, x.dtype].append(x)
        return x

    generator.frozen = jax.tree_util.tree_map_with_path(leaf, generator.frozen)
    return generator


def _rows(grid: Grid, answers: dict[str, dict[str, AnswerStage]]) -> list[_Row]:
    """System by system, and of each the base first."""
    rows: dict[Any, _Row] = {}
    for system in SYSTEMS:
        for seeds in grid.settings():
            stages = [answers[variant.name].get(system) for variant in seeds]
            folders = [os.path.realpath(stage.record.directory) for stage in stages if stage]
            if not folders:
                continue  # an LLM that only encodes
            folders = list(dict.fromkeys(folders))
            row = rows.setdefault((system, *folders), _Row(system, [], folders))
            row.variants.append(seeds)
    return list(rows.values())


class _Scored(NamedTuple):
    """The answers of a row, one for each seed: their scores, and those of resampled examples."""

    quality: list[dict[str, float]]
    samples: dict[str, np.ndarray]
    cut_share: float


def _scored_row(config: ConfigDict, examples: Sequence[Example], row: _Row) -> _Scored:
    scoring = evaluate.scoring_of(config)
    sources = evaluate.sources_of(config, [example.prompt for example in examples])
    references = [example.references for example in examples]
    quality, samples, cuts = [], [], []
    for folder in row.folders:
        answers = read_answers(folder)
        measured = metrics.measure(
            config.evaluation.metrics, answers.responses, references, sources=sources, **scoring
        )
        quality.append(measured.quality)
        samples.append(
            significance.resampled(
                answers.responses, measured, references, tokenizer=scoring["tokenizer"]
            )
        )
        cuts.append(answers.cut_share)
    means = {name: np.mean([one[name] for one in samples], axis=0) for name in samples[0]}
    return _Scored(quality, means, statistics.fmean(cuts))


def _report(
    grid: Grid,
    experiment: Experiment,
    workdir: str,
    rows: Sequence[_Row],
    sizes: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What compare.json holds; `experiment` is that of the base, `sizes` parts of the rows."""
    config = experiment.context.config
    examples = experiment.evaluation_examples()
    references = [example.references for example in examples]
    scored = [_scored_row(config, examples, row) for row in rows]
    base = next(
        place
        for place, row in enumerate(rows)
        if row.system == "l2s" and any(grid.variants[0] in seeds for seeds in row.variants)
    )
    found = []
    for place, (row, scores, size) in enumerate(zip(rows, scored, sizes, strict=True)):
        agreed = {
            key: value
            for key, value in row.variants[0][0].values.items()
            if all(seeds[0].values[key] == value for seeds in row.variants)
        }
        quality = {name: _spread([one[name] for one in scores.quality]) for name in scores.samples}
        found.append(
            {
                "system": row.system,
                "is_base": place == base,
                "settings": agreed,
                "variants": [variant.folder for seeds in row.variants for variant in seeds],
                "answers": [os.path.relpath(f, os.path.realpath(workdir)) for f in row.folders],
                "quality": quality,
                "cut_share": scores.cut_share,
                **size,
            }
        )
    for row, scores in zip(found, scored, strict=True):
        row["against_base"] = {
            "request_time": _ratio(row, found[base], "total_ms"),
            "token_time": _ratio(row, found[base], "decode_ms_per_token"),
            "quality": {}
            if row["is_base"]
            else {
                name: significance.tested(
                    row["quality"][name]["mean"] - found[base]["quality"][name]["mean"],
                    samples - scored[base].samples[name],
                )
                for name, samples in scores.samples.items()
            },
        }
    settings, scoring = config.evaluation, evaluate.scoring_of(config)
    return {
        "task": {
            "name": experiment.context.task.name,
            "split": settings.split,
            "examples": len(examples),
            "metric": settings.metrics[0],
            "metric_signatures": metrics.signatures(settings.metrics, references, **scoring),
        },
        "vary": {axis.key: axis.values for axis in grid.axes},
        "base": grid.base,
        "seeds": [variant.seed for variant in grid.settings()[0] if variant.seed is not None],
        "rows": found,
        "environment": evaluate.environment(*experiment.context.dtypes),
    }


def _spread(scores: list[float]) -> dict[str, Any]:
    """Mean and standard deviation (of n - 1) over seeds; no deviation of one."""
    deviation = statistics.stdev(scores) if len(scores) > 1 else None
    return {"mean": statistics.fmean(scores), "sd": deviation, "seeds": scores}


def _ratio(row: dict[str, Any], base: dict[str, Any], name: str) -> float:
    """NaN where the base takes no measurable time."""
    time = base["latency"][name]
    return row["latency"][name] / time if time else math.nan
