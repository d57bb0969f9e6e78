"""Quality and latency of the LLM, the SLM alone, L2S and its control, into one report."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from l2s_jax import metrics, report
from l2s_jax.card import write_card
from l2s_jax.decoding.engine import decode, decode_cache
from l2s_jax.decoding.loop import decoding_steps
from l2s_jax.experiment import Experiment
from l2s_jax.generate import Generator, Output
from l2s_jax.models.systems import parameter_count

log = logging.getLogger(__name__)

_TRAINED = ("llm", "slm", "l2s")
DESCRIPTIONS = {
    "llm": "the large model on its own",
    "slm": "the small model on its own, trained on the same labels as L2S",
    "l2s": "the frozen large model encodes, the small model decodes",
    "l2s_mismatched": "control: L2S fed the large model's representations of another prompt",
}


def evaluate(experiment: Experiment) -> dict[str, Any]:
    """Makes what is missing, measures, and writes the report and the outputs to the workdir.

    Outputs go to DIR/predictions/SYSTEM.jsonl, in the order of the examples.
    """
    settings = experiment.config.evaluation
    # First, so that what is wrong with them shows before hours of training.
    examples = experiment.evaluation_examples()
    generators = {name: experiment.generator(getattr(experiment, name)) for name in _TRAINED}
    references = [example.references for example in examples]

    systems: dict[str, dict[str, Any]] = {}
    for name, description in DESCRIPTIONS.items():
        generator = generators[name.removesuffix("_mismatched")]
        outputs = generator.generate(
            [example.prompt for example in examples],
            description=f"evaluating {name}",
            mismatched=name.endswith("_mismatched"),
        )
        _write_predictions(experiment.workdir, name, examples, outputs)
        systems[name] = {
            "description": description,
            "params": parameter_count((generator.trained, generator.frozen)),
            "params_read_per_token": generator.system.parameters_read_per_token(generator.trained),
            "quality": metrics.evaluate(
                settings.metrics, [output.text for output in outputs], references
            ),
            "cut_share": float(np.mean([output.cut for output in outputs])),
        }
    latency = settings.latency
    for key, batch_size in (("latency", 1), ("latency_batch", latency.batch_size)):
        measured = measure_latency(
            generators,
            batch_size=batch_size,
            prompt_tokens=latency.prompt_tokens,
            new_tokens=latency.new_tokens,
            repeats=latency.repeats,
        )
        # The control runs the same program as L2S.
        for name in systems:
            systems[name][key] = measured[name.removesuffix("_mismatched")]
    result = {
        "task": {
            "name": experiment.task.name,
            "split": settings.split,
            "examples": len(examples),
            "metric": settings.metrics[0],
            "metric_signatures": metrics.signatures(settings.metrics, references),
            "labels": experiment.config.labels,
        },
        "systems": systems,
        "l2s_vs_llm": report.compare(systems, settings.metrics[0]),
        "environment": environment(str(experiment.dtype)),
    }
    report.write_report(result, experiment.workdir)
    write_card(
        os.path.join(experiment.workdir, "l2s", "model"), experiment.config, result, experiment.l2s
    )
    log.info("report: %s", os.path.join(experiment.workdir, "report.md"))
    return result


def measure_latency(
    generators: Mapping[str, Generator],
    *,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Medians in milliseconds for a whole batch of random prompts, all systems in turn.

    encode_ms, prefill_ms (which gives the first token) and decode_ms_per_token are those of three
    programs run one after another; total_ms is that of the one program that generation runs. Each
    repeat measures every system once, so that a disturbance of the machine meets them all.
    compile_s is the compile time of that one program; warm-up is excluded.
    """
    runs = {
        name: _Stopwatch(generator, batch_size, prompt_tokens, new_tokens)
        for name, generator in generators.items()
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for _ in tqdm(range(repeats), desc=f"latency, batch {batch_size}"):
        for name, run in runs.items():
            samples[name].append(run.measure())
    return {
        name: {
            "batch_size": batch_size,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            **{key: float(np.median([s[key] for s in samples[name]])) for key in samples[name][0]},
            "compile_s": run.compile_s,
        }
        for name, run in runs.items()
    }


class _Stopwatch:
    """The compiled programs of one system at one shape."""

    def __init__(self, generator: Generator, batch_size: int, prompt_tokens: int, new_tokens: int):
        system = generator.system
        rng = np.random.default_rng(0)
        shape = (batch_size, prompt_tokens)
        ids = jnp.asarray(rng.integers(3, generator.prompt_tokenizer.vocab_size, shape), jnp.int32)
        mask = jnp.ones(shape, bool)
        limits = jnp.full(batch_size, new_tokens)
        trained, frozen = generator.trained, generator.frozen
        self._steps = max(decoding_steps(new_tokens), 1)

        encode = jax.jit(system.encode).lower(trained, frozen, ids, mask).compile()
        hidden = encode(trained, frozen, ids, mask)
        prefill = (
            jax.jit(system.prefill, static_argnums=5)
            .lower(trained, frozen, ids, mask, hidden, decoding_steps(new_tokens))
            .compile()
        )
        logits, cache = prefill(trained, frozen, ids, mask, hidden)
        loop = (
            jax.jit(
                lambda trained, logits, cache, limits: decode_cache(
                    system,
                    trained,
                    logits,
                    cache,
                    limits,
                    max_new_tokens=new_tokens,
                    ignore_eos=True,
                )
            )
            .lower(trained, logits, cache, limits)
            .compile()
        )
        start = time.perf_counter()
        whole = (
            jax.jit(lambda *args: decode(system, *args, max_new_tokens=new_tokens, ignore_eos=True))
            .lower(trained, frozen, ids, mask, limits)
            .compile()
        )
        self.compile_s = time.perf_counter() - start
        self._encode = lambda: encode(trained, frozen, ids, mask)
        self._prefill = lambda hidden: prefill(trained, frozen, ids, mask, hidden)
        self._loop = lambda first: loop(trained, *first, limits)
        self._whole = lambda: whole(trained, frozen, ids, mask, limits)
        for _ in range(2):
            self.measure()

    def measure(self) -> dict[str, float]:
        """One run of everything, in milliseconds."""
        hidden, encode_ms = _timed(self._encode)
        first, prefill_ms = _timed(self._prefill, hidden)
        _, decode_ms = _timed(self._loop, first)
        _, total_ms = _timed(self._whole)
        return {
            "encode_ms": encode_ms,
            "prefill_ms": prefill_ms,
            "decode_ms_per_token": decode_ms / self._steps,
            "total_ms": total_ms,
        }


def _timed(call: Any, *args: Any) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(call(*args))
    return result, (time.perf_counter() - start) * 1e3


def environment(dtype: str) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "platform": jax.default_backend(),
        "cpu_cores": os.cpu_count(),
        "dtype": dtype,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _write_predictions(workdir: str, name: str, examples: Any, outputs: list[Output]) -> None:
    directory = os.path.join(workdir, "predictions")
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, f"{name}.jsonl")
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        for example, output in zip(examples, outputs, strict=True):
            record = {
                "prompt": example.prompt,
                "references": list(example.references),
                "response": output.text,
                "cut": output.cut,
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(f"{path}.tmp", path)
