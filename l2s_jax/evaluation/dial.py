"""`--mode=dial`: what each draft tolerance costs in quality, and what it gains in time.

Measured between the LLM alone and L2S alone, on the examples of the report.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from l2s_jax.cluster import distributed
from l2s_jax.config import typed
from l2s_jax.evaluation import dial_report, evaluate, exactness, metrics, report
from l2s_jax.evaluation.generators import side_by_side
from l2s_jax.evaluation.stage import EvaluationStage, deciding
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.files import is_file, read_json
from l2s_jax.serving import batching
from l2s_jax.serving.generator import Generator
from l2s_jax.settings.rules import cannot_draft
from l2s_jax.settings.search import Search

log = logging.getLogger(__name__)

_MODE = "--mode=dial"


class _Point(NamedTuple):
    """One way to answer; `tolerance` is None at the ends, where nothing is drafted."""

    system: str
    tolerance: float | None
    generator: Generator
    search: Search

    @property
    def name(self) -> str:
        return self.system if self.tolerance is None else f"tolerance {self.tolerance:g}"


def dial(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Measures the models of a finished run, and writes the dial to its workdir.

    The processes of a job share the answers that quality is measured on. Process 0 writes, and
    takes the times alone where it can decode alone. A report on the same models gets the plot too.

    Returns:
      What dial.json holds, by process 0; dial_report.py lists its keys.

    Raises:
      ValueError: the run is not finished, or its LLM can't decide on what its L2S drafts.
    """
    for problem in cannot_draft(typed(config), _MODE):
        raise ValueError(problem)
    experiment = Experiment(config, workdir, "find")
    experiment.check()
    experiment.check_drafting(_MODE, "another mode")
    scoring = evaluate.scoring_of(config)
    names = config.evaluation.metrics
    distributed.on_primary(lambda: metrics.check(names, **scoring))
    examples = experiment.evaluation_examples()
    prompts = [example.prompt for example in examples]
    references = [example.references for example in examples]
    sources = evaluate.sources_of(config, prompts)
    experiment.make()
    models = dial_report.models_of(experiment)
    points = _points(experiment)

    def times() -> list[dict[str, float]]:
        count = min(config.evaluation.dial_requests, len(prompts))
        return _times(points, prompts, np.linspace(0, len(prompts) - 1, count).astype(int).tolist())

    together = experiment.context.decoding_mesh.is_multi_process
    # Times first: nothing is compiled yet.
    timed = times() if together else distributed.on_primary(times)
    answers = [
        point.generator.generate(
            prompts, search=point.search, description=f"dial, {point.name}", shared=True
        )
        for point in points
    ]

    def written() -> dict[str, Any]:
        texts = [[output.text for output in outputs] for outputs in answers]
        found = [
            {
                "system": point.system,
                "tolerance": point.tolerance,
                "quality": metrics.measure(
                    names, said, references, sources=sources, **scoring
                ).quality,
                "against_llm": _likeness(said, texts[0]),
                "cut_share": float(np.mean([output.cut for output in outputs])),
                "new_tokens": float(np.mean([output.tokens for output in outputs])),
                "drafts": exactness.drafting(outputs) if point.tolerance is not None else None,
                **measured,
            }
            for point, said, outputs, measured in zip(points, texts, answers, timed, strict=True)
        ]
        settings = config.evaluation
        result = {
            "task": {
                "name": experiment.context.task.name,
                "split": settings.split,
                "examples": len(examples),
                "requests": min(settings.dial_requests, len(prompts)),
                "metric": names[0],
                "metric_signatures": metrics.signatures(names, references, **scoring),
                "likeness_signature": metrics.signatures(["chrf"], [("",)])["chrf"],
            },
            "models": models,
            "search": dataclasses.asdict(points[1].search),
            "decoding": deciding(config),
            "points": found,
            "environment": evaluate.environment(*experiment.context.dtypes),
        }
        dial_report.write(result, workdir)
        _into_report(experiment)
        log.info("dial: %s", os.path.join(workdir, "dial.md"))
        return result

    return distributed.on_primary(written)


def _points(experiment: Experiment) -> list[_Point]:
    """The LLM alone, the tolerances from the least to the most, L2S alone."""
    config = experiment.context.config
    search = dataclasses.replace(Search(**config.decoding.search.to_dict()), exact=True)
    generators = side_by_side(experiment, exact=search)
    llm, l2s, exact = (generators[name] for name in ("llm", "l2s", "exact"))
    tolerances = sorted({float(tolerance) for tolerance in config.evaluation.dial})
    return [
        _Point("llm", None, llm, llm.search),
        *(
            _Point("exact", t, exact, dataclasses.replace(exact.search, draft_tolerance=t))
            for t in tolerances
        ),
        _Point("l2s", None, l2s, l2s.search),
    ]


def _likeness(said: Sequence[str], by_llm: Sequence[str]) -> dict[str, float]:
    """How far texts are the LLM's: the share that equals it, and chrF with it as reference."""
    same = [one == other for one, other in zip(said, by_llm, strict=True)]
    references = [(text,) for text in by_llm]
    chrf = metrics.measure(["chrf"], said, references).quality
    return {"equal_share": float(np.mean(same)), **chrf}


def _times(
    points: Sequence[_Point], prompts: Sequence[str], places: Sequence[int]
) -> list[dict[str, float]]:
    """Of each point, over the requests at `places`: text in, text out, one at a time.

    Each request is answered by every point in turn, so that a disturbance of the machine meets them
    all.
    """
    samples: list[list[float]] = [[] for _ in points]
    silent = not distributed.is_primary()
    # Prompts that are too long are warned of once, when quality is measured.
    batching.log.disabled = True
    try:
        compile_s = [
            _warm_up(point, prompts, places)
            for point in tqdm(points, desc="dial, compiling", disable=silent)
        ]
        for place in tqdm(places, desc="dial, times", disable=silent):
            for point, own in zip(points, samples, strict=True):
                own.append(_timed(point, prompts[place], place))
    finally:
        batching.log.disabled = False
    return [
        {"request_ms": float(np.median(own)), "compile_s": seconds}
        for own, seconds in zip(samples, compile_s, strict=True)
    ]


def _warm_up(point: _Point, prompts: Sequence[str], places: Sequence[int]) -> float:
    """Compiles what the requests need; the seconds that it took."""
    lengths = point.generator.prompt_lengths
    ids = point.generator.prompt_tokenizer.encode_prompts([prompts[place] for place in places])
    # One request of each length that there is a program for.
    widths = np.searchsorted(lengths, np.minimum([len(one) for one in ids], lengths[-1]))
    chosen = {int(width): place for width, place in zip(widths, places, strict=True)}
    seconds = 0.0
    for place in chosen.values():
        first, second = (_timed(point, prompts[place], place) for _ in range(2))
        seconds += max(first - second, 0.0) / 1e3
    return seconds


def _timed(point: _Point, prompt: str, seed: int) -> float:
    """Milliseconds of one request; `seed` is what it has among all."""
    began = time.perf_counter()
    point.generator.generate([prompt], search=point.search, seeds=[seed])
    return (time.perf_counter() - began) * 1e3


def _into_report(experiment: Experiment) -> None:
    """Writes the report anew, with the plot, if there is one on the same models."""
    workdir = experiment.context.workdir
    path = os.path.join(workdir, "report.json")
    recorded = EvaluationStage(experiment).record.read() or {}
    models = dial_report.models_of(experiment)
    if is_file(path) and _holds(recorded.get("models"), models):
        decoding = recorded.get("decoding")
        own = decoding if isinstance(decoding, Mapping) else None
        conclusion = dial_report.found(experiment, own)
        report.write_report({**read_json(path), "dial": conclusion}, workdir)


def _holds(recorded: Any, models: Mapping[str, Any]) -> bool:
    return isinstance(recorded, Mapping) and models.items() <= recorded.items()
