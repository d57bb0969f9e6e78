"""Quality and latency of the LLM, the SLM alone, L2S and its control, into one report."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from l2s_jax.cluster import distributed
from l2s_jax.data.table import Example
from l2s_jax.data.tasks import load_task
from l2s_jax.evaluation import (
    comet,
    dial_report,
    exactness,
    followed,
    metrics,
    report,
    significance,
)
from l2s_jax.evaluation.card import write_card
from l2s_jax.evaluation.control import Control
from l2s_jax.evaluation.generators import exact_generator, generator_of, load, side_by_side
from l2s_jax.evaluation.latency import Stopwatch
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.files import make_folder, write_json_lines
from l2s_jax.models.exact import Exact
from l2s_jax.models.systems import LlmToSlm, Params, parameter_count
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.output import Output
from l2s_jax.serving.refilled import Refilled
from l2s_jax.settings.evaluation import bleu_tokenizer
from l2s_jax.settings.rules import SYSTEMS
from l2s_jax.settings.search import Search

log = logging.getLogger(__name__)

DESCRIPTIONS = {
    "llm": "the large model on its own",
    "slm": "the small model on its own, trained on the same labels as L2S",
    "l2s": "the large model encodes, the small model decodes",
    "l2s_mismatched": "control: L2S fed the large model's representations of another prompt",
    "exact": "L2S drafts, the large model keeps what it would have written itself",
}


def evaluate(experiment: Experiment) -> dict[str, Any]:
    """Makes what is missing, measures, and writes the report and the outputs to the workdir.

    The processes of a job share the work on the outputs. Process 0 writes, and measures alone where
    it can decode alone. Outputs go to DIR/predictions/SYSTEM.jsonl, in the order of the examples.
    """
    context = experiment.context
    settings = context.config.evaluation
    scoring = scoring_of(context.config)
    # First, so that what is wrong with them shows before hours of training.
    distributed.on_primary(lambda: metrics.check(settings.metrics, **scoring))
    examples = experiment.evaluation_examples()
    prompts = [example.prompt for example in examples]
    sources = sources_of(context.config, prompts)
    # All of them before the first is read, which would take up memory while others train.
    experiment.make()
    dial_report.models_of(experiment)  # by all processes, before one of them writes the report
    search = Search(**context.config.decoding.search.to_dict())
    is_exact = search.exact
    references = [example.references for example in examples]
    if "bleu" in settings.metrics and distributed.is_primary():
        metrics.warn_of_spaces(references, scoring["tokenizer"])

    systems: dict[str, dict[str, Any]] = {}
    texts: dict[str, list[str]] = {}
    measured: dict[str, metrics.Measured] = {}
    drafts: dict[str, Any] = {}

    def told(name: str, generator: Generator) -> list[Output]:
        """What a system answers, as of `Generator.generate`, which goes into the results."""
        answering = Control if name.endswith("_mismatched") else Refilled
        outputs = answering(generator).generate(
            prompts, description=f"evaluating {name}", shared=True
        )
        if not distributed.is_primary():
            return outputs
        path = os.path.join(context.workdir, "predictions", f"{name}.jsonl")
        write_predictions(path, examples, outputs)
        texts[name] = [output.text for output in outputs]
        measured[name] = metrics.measure(
            settings.metrics, texts[name], references, sources=sources, **scoring
        )
        systems[name] = {
            "description": DESCRIPTIONS[name],
            "params": parameter_count((generator.trained, generator.frozen)),
            "params_read_per_token": read_per_token(generator, outputs),
            "quality": measured[name].quality,
            "cut_share": float(np.mean([output.cut for output in outputs])),
        }
        return outputs

    # One after the other: no two of them need to be in memory. (A name would keep one there.)
    by_llm: list[Output] = []
    if experiment.llm.answers:
        by_llm = told("llm", generator_of(experiment, experiment.llm))
    told("slm", generator_of(experiment, experiment.slm))
    shapes = _told_of_l2s(experiment, told)
    if is_exact:
        drafts = _told_of_exact(experiment, told, prompts, by_llm)

    def latencies() -> dict[str, dict[str, dict[str, float]]]:
        # In turns, so all of them.
        generators = side_by_side(experiment, exact=search if is_exact else None)
        measured = _latencies(generators, settings.latency, drafts.get("acceptance"))
        if drafts:
            drafts["times"] = exactness.times(generators["exact"], drafts, measured["latency"])
        return measured

    together = context.decoding_mesh.is_multi_process
    timed = latencies() if together else distributed.on_primary(latencies)

    def written() -> dict[str, Any]:
        if drafts:
            systems["exact"]["drafts"] = drafts
        differences = significance.compare(
            texts, measured, references, tokenizer=scoring["tokenizer"]
        )
        return _written(experiment, systems, timed, references, differences, shapes)

    return distributed.on_primary(written)


def _told_of_l2s(
    experiment: Experiment, told: Callable[[str, Generator], Any]
) -> tuple[Any, Params, Params]:
    """Has L2S answer, on its own H and on another's; its system, and shapes of its parameters."""
    system, *params = loaded = load(experiment, experiment.l2s)
    trained, frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params
    )
    generator = generator_of(experiment, experiment.l2s, loaded)
    del params, loaded
    for name in ("l2s", "l2s_mismatched"):
        told(name, generator)
    return system, trained, frozen


def _told_of_exact(
    experiment: Experiment,
    told: Callable[[str, Generator], list[Output]],
    prompts: Sequence[str],
    by_llm: Sequence[Output],
) -> dict[str, Any]:
    """Has both decode exactly; what became of drafts, where this process has the outputs."""
    generator = exact_generator(experiment)
    outputs = told("exact", generator)
    if not outputs:  # process 0 has them
        return {}
    drafts = exactness.drafting(outputs)
    drafts["against_llm"] = exactness.against_llm(prompts, outputs, by_llm, generator)
    return drafts


def read_per_token(generator: Generator, outputs: Sequence[Output] = ()) -> int:
    """Numbers that a token reads; of exact decoding an LLM's share, as it is read once a block."""
    system = generator.system
    if not isinstance(system, Exact):
        return system.parameters_read_per_token(generator.trained)
    of_llm = system.llm.parameters_read_per_token({"llm": generator.frozen})
    share = of_llm / exactness.drafting(outputs)["tokens_per_block"]
    return system.l2s.parameters_read_per_token(generator.trained) + round(share)


def scoring_of(config: ConfigDict) -> dict[str, str]:
    """What the functions of `metrics` need to know of a config."""
    settings = config.evaluation
    return {
        "tokenizer": bleu_tokenizer(settings.bleu_tokenizer, config.task.language),
        "comet_folder": settings.comet,
    }


def check_selection(config: ConfigDict) -> None:
    """Finds out, before any work, whether checkpoints can be chosen by quality where they are to.

    Raises:
      ValueError: something is missing that the primary metric needs.
    """
    if any(config[name].train.select == "quality" for name in SYSTEMS):
        metrics.check(config.evaluation.metrics[:1], **scoring_of(config))
        sources_of(config, [])


def primary_score(
    config: ConfigDict, examples: Sequence[Example], responses: Sequence[str]
) -> float:
    """The score of responses to examples on the primary metric, 0 to 100."""
    name = config.evaluation.metrics[0]
    scores = metrics.measure(
        [name],
        responses,
        [example.references for example in examples],
        sources=sources_of(config, [example.prompt for example in examples]),
        **scoring_of(config),
    )
    return scores.quality[name]


def sources_of(config: ConfigDict, prompts: Sequence[str]) -> Sequence[str]:
    """What was translated, where COMET is asked for."""
    if not config.evaluation.comet:
        return ()
    return comet.sources_of(load_task(config.task).prompt_fields, prompts)


def _written(
    experiment: Experiment,
    systems: dict[str, dict[str, Any]],
    latencies: Mapping[str, Mapping[str, dict[str, float]]],
    references: list[tuple[str, ...]],
    differences: dict[str, Any],
    shapes: tuple[LlmToSlm, Params, Params],
) -> dict[str, Any]:
    """The report, which it writes; `shapes` is L2S, with shapes in the place of parameters."""
    context = experiment.context
    settings = context.config.evaluation
    for key, measured in latencies.items():
        # The control runs the same program as L2S.
        for name in systems:
            systems[name][key] = measured[name.removesuffix("_mismatched")]
    result = {
        "task": {
            "name": context.task.name,
            "split": settings.split,
            "examples": len(references),
            "metric": settings.metrics[0],
            "metric_signatures": metrics.signatures(
                settings.metrics, references, **scoring_of(context.config)
            ),
            "labels": context.config.labels.source,
            **experiment.lessons.report(),
        },
        "systems": systems,
        "l2s_vs_llm": report.compare(systems, settings.metrics[0]),
        "significance": differences,
        "environment": environment(*context.dtypes),
    }
    if times := followed.times(experiment):
        result["time"] = times
    if conclusion := dial_report.found(experiment):
        result["dial"] = conclusion
    report.write_report(result, context.workdir)
    context.trackers.results(followed.results(result))
    directory = os.path.join(context.workdir, "l2s", "model")
    write_card(directory, context.config, result, shapes)
    log.info("report: %s", os.path.join(context.workdir, "report.md"))
    return result


def _latencies(
    generators: Mapping[str, Generator], settings: ConfigDict, acceptance: float | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Of one prompt and of a batch of them, by their key in the report and by system.

    `acceptance` is the share of drafts that passed on the task, where something was drafted.
    """
    sizes = {"latency": 1, "latency_batch": settings.batch_size}
    found = {rows: latency(generators, rows, settings, acceptance) for rows in {*sizes.values()}}
    return {key: found[rows] for key, rows in sizes.items()}


def latency(
    generators: Mapping[str, Generator],
    batch_size: int,
    settings: ConfigDict,
    acceptance: float | None = None,
) -> dict[str, dict[str, float]]:
    """Medians for a whole batch of random prompts, as the report has them.

    Each repeat measures every system once, so that a disturbance of the machine meets them all.
    """
    shape = {
        "batch_size": batch_size,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
    }
    runs = {
        name: Stopwatch(
            # On random prompts LLM and SLM don't agree as on the task.
            dataclasses.replace(generator.system, acceptance=acceptance)
            if isinstance(generator.system, Exact)
            else generator.system,
            generator.trained,
            generator.frozen,
            generator.prompt_tokenizer.vocab_size,
            search=generator.search,
            mesh=generator.mesh,
            **shape,
        )
        for name, generator in generators.items()
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    silent = not distributed.is_primary()
    for _ in tqdm(range(settings.repeats), desc=f"latency, batch {batch_size}", disable=silent):
        for name, run in runs.items():
            samples[name].append(run.measure())
    return {
        name: {
            **shape,
            **{key: float(np.median([s[key] for s in samples[name]])) for key in samples[name][0]},
            "compile_s": run.compile_s,
        }
        for name, run in runs.items()
    }


def environment(dtype: Any, encoder_dtype: Any) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "cpu_cores": os.cpu_count(),
        "dtype": str(dtype),
        "encoder_dtype": str(encoder_dtype),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def write_predictions(path: str, examples: Sequence[Example], outputs: Sequence[Output]) -> None:
    """Writes what a system answers to each example, as JSON Lines."""
    make_folder(os.path.dirname(path))
    records = (
        {
            "prompt": example.prompt,
            "references": list(example.references),
            "response": output.text,
            "cut": output.cut,
        }
        for example, output in zip(examples, outputs, strict=True)
    )
    write_json_lines(path, records)
