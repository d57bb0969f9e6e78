"""Quality and latency of the LLM, the SLM alone, L2S and its control, into one report."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from l2s_jax.cluster import distributed
from l2s_jax.evaluation import comet, metrics, report
from l2s_jax.evaluation.card import write_card
from l2s_jax.evaluation.latency import Stopwatch
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.files import write_json_lines
from l2s_jax.models.systems import parameter_count
from l2s_jax.serving.generator import Generator, Output
from l2s_jax.settings.evaluation import bleu_tokenizer

log = logging.getLogger(__name__)

DESCRIPTIONS = {
    "llm": "the large model on its own",
    "slm": "the small model on its own, trained on the same labels as L2S",
    "l2s": "the frozen large model encodes, the small model decodes",
    "l2s_mismatched": "control: L2S fed the large model's representations of another prompt",
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
    sources = comet.sources_of(context.task.prompt_fields, prompts) if settings.comet else ()
    # All of them before the first is read, which would take up memory while others train.
    experiment.make()
    answering = [s for s in experiment.systems if s is not experiment.llm or experiment.llm.answers]
    generators = {stage.name: experiment.generator(stage) for stage in answering}
    references = [example.references for example in examples]
    if "bleu" in settings.metrics and distributed.is_primary():
        metrics.warn_of_spaces(references, scoring["tokenizer"])

    systems: dict[str, dict[str, Any]] = {}
    for name, description in DESCRIPTIONS.items():
        if (generator := generators.get(name.removesuffix("_mismatched"))) is None:
            continue  # an LLM that only encodes
        outputs = generator.generate(
            prompts,
            description=f"evaluating {name}",
            mismatched=name.endswith("_mismatched"),
            shared=True,
        )
        if not distributed.is_primary():
            continue
        _write_predictions(context.workdir, name, examples, outputs)
        systems[name] = {
            "description": description,
            "params": parameter_count((generator.trained, generator.frozen)),
            "params_read_per_token": generator.system.parameters_read_per_token(generator.trained),
            "quality": metrics.evaluate(
                settings.metrics,
                [output.text for output in outputs],
                references,
                sources=sources,
                **scoring,
            ),
            "cut_share": float(np.mean([output.cut for output in outputs])),
        }

    def measured() -> dict[str, dict[str, dict[str, float]]]:
        return _latencies(generators, settings.latency)

    together = context.decoding_mesh.is_multi_process
    latencies = measured() if together else distributed.on_primary(measured)
    return distributed.on_primary(lambda: _written(experiment, systems, latencies, references))


def scoring_of(config: ConfigDict) -> dict[str, str]:
    """What the functions of `metrics` need to know of a config."""
    settings = config.evaluation
    return {
        "tokenizer": bleu_tokenizer(settings.bleu_tokenizer, config.task.language),
        "comet_folder": settings.comet,
    }


def _written(
    experiment: Experiment,
    systems: dict[str, dict[str, Any]],
    latencies: Mapping[str, Mapping[str, dict[str, float]]],
    references: list[tuple[str, ...]],
) -> dict[str, Any]:
    """The report, which it writes."""
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
            **experiment.logits.report(),
        },
        "systems": systems,
        "l2s_vs_llm": report.compare(systems, settings.metrics[0]),
        "environment": environment(*context.dtypes),
    }
    report.write_report(result, context.workdir)
    directory = os.path.join(context.workdir, "l2s", "model")
    write_card(directory, context.config, result, experiment.l2s.loaded)
    log.info("report: %s", os.path.join(context.workdir, "report.md"))
    return result


def _latencies(
    generators: Mapping[str, Generator], settings: ConfigDict
) -> dict[str, dict[str, dict[str, float]]]:
    """Of one prompt and of a batch of them, by their key in the report and by system."""
    return {
        key: _latency(generators, batch_size, settings)
        for key, batch_size in (("latency", 1), ("latency_batch", settings.batch_size))
    }


def _latency(
    generators: Mapping[str, Generator], batch_size: int, settings: ConfigDict
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
            generator.system,
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


def _write_predictions(workdir: str, name: str, examples: Any, outputs: list[Output]) -> None:
    directory = os.path.join(workdir, "predictions")
    os.makedirs(directory, exist_ok=True)
    records = (
        {
            "prompt": example.prompt,
            "references": list(example.references),
            "response": output.text,
            "cut": output.cut,
        }
        for example, output in zip(examples, outputs, strict=True)
    )
    write_json_lines(os.path.join(directory, f"{name}.jsonl"), records)
