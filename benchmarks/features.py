"""A training step that encodes its prompts against one that reads H from the feature cache.

    python benchmarks/features.py --llm=t5-large --slm=t5-small --prompt_tokens=128

Both are the real loop over the real pipeline, in turn, on the same rows, with random weights of
published geometries; times are those of metrics.jsonl. Also says how large the cache is and how
fast it is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import statistics
import tempfile
import time
from typing import Any

import jax
import numpy as np

from l2s_jax.arguments import Parser, count
from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.config import compute_dtype, default
from l2s_jax.data.batches import training_batches
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.prompts import random_prompts
from l2s_jax.data.table import Example
from l2s_jax.experiment import feature_cache
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.l2s import FUSIONS
from l2s_jax.models.serving import to_serve
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.training import loop


class Numbers:
    """The tokenizer of texts that are token ids."""

    pad_id, eos_id, end_ids = 0, 1, (1,)
    is_chat = False
    fingerprint = identity = "numbers"

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; nothing ends it."""
        return [[int(word) for word in text.split()] for text in texts]

    encode_responses = encode_prompts


def make_system(arguments: argparse.Namespace) -> tuple[LlmToSlm, Any]:
    """(system, the LLM's random parameters)."""
    dtype = compute_dtype(arguments.dtype)
    encoder, shapes = pretrained.abstract_encoder(
        dataclasses.replace(GEOMETRIES[arguments.llm], dtype=dtype)
    )
    random = np.random.default_rng(0)

    def weights(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return random.standard_normal(x.shape, np.float32) * x.shape[0] ** -0.5

    slm = dataclasses.replace(GEOMETRIES[arguments.slm], dtype=dtype, dropout_rate=0.1)
    system = LlmToSlm(encoder, slm, projector_width=slm.width, fusion=arguments.fusion)
    return system, to_serve(jax.tree.map(weights, shapes), encoder, "float", encodes=True)


def make_data(arguments: argparse.Namespace, vocabulary: int, rows: int) -> TokenizedExamples:
    """Random ids, all of the full lengths, so that every step does the same work."""
    tokens = arguments.prompt_tokens, arguments.response_tokens

    def text(ids: np.ndarray) -> str:
        return " ".join(map(str, ids))

    return TokenizedExamples(
        [
            Example(text(ids[: tokens[0]]), text(ids[tokens[0] :]), ())
            for ids in random_prompts(rows, sum(tokens), vocabulary)
        ],
        prompt_tokenizer=Numbers(),
        response_tokenizer=Numbers(),
        max_prompt_tokens=tokens[0],
        max_response_tokens=tokens[1],
    )


def run(
    system: LlmToSlm, frozen: Any, data: TokenizedExamples, settings: Any, mesh: Any
) -> list[dict[str, float]]:
    """The metrics of each step of a run, but for the first, which compiles."""
    tokens = (data.max_prompt_tokens, data.max_response_tokens)
    batches = {"prompt_name": "llm", "buckets": (tokens,), "batch_size": settings.batch_size}
    with tempfile.TemporaryDirectory() as directory:
        loop.fit(
            system,
            frozen,
            jax.jit(system.init)(jax.random.key(0)),
            settings,
            batches=training_batches(data, seed=0, **batches),
            validation=[next(training_batches(data, seed=1, **batches))],
            directory=directory,
            fingerprint="",
            seed=0,
            mesh=mesh,
        )
        with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
    return [line for line in lines if "step_ms" in line][1:]


def measure(arguments: argparse.Namespace, folder: str) -> None:
    """Prints all figures."""
    mesh = sharding.make_mesh(default().mesh)
    system, frozen = make_system(arguments)
    rows = arguments.batch_size * arguments.steps
    data = make_data(arguments, system.llm_config.vocab_size, rows)
    encoder = feature_cache.Encoder(system.llm_config, frozen, mesh)
    # Compiled before the clock starts.
    ids, mask = data.padded_prompts(np.arange(arguments.batch_size), arguments.prompt_tokens)
    jax.block_until_ready(encoder(**sharding.put_batch({"ids": ids, "mask": mask}, mesh)))
    start = time.perf_counter()
    kept = feature_cache.cached(
        data,
        folder,
        {"llm_hash": ""},
        lambda: encoder,
        mesh=mesh,
        split="train",
        width=system.llm_config.width,
        buckets=[arguments.prompt_tokens],
        batch_size=arguments.batch_size,
    )
    seconds = time.perf_counter() - start
    tokens = rows * arguments.prompt_tokens
    size = sum(os.path.getsize(path) for path in glob.glob(os.path.join(folder, "*", "*")))
    print(f"making the cache: {tokens / seconds:.0f} prompt tokens/s")
    print(f"size: {size / tokens / 1e3:.4f} GB per million prompt tokens")
    start = time.perf_counter()
    for first in range(0, rows, arguments.batch_size):
        kept.padded(np.arange(first, first + arguments.batch_size), arguments.prompt_tokens)
    seconds = time.perf_counter() - start
    print(f"reading a batch: {seconds / arguments.steps * 1e3:.1f} ms")

    settings = default().l2s.train
    settings.update(
        steps=arguments.steps, batch_size=arguments.batch_size, log_every=1, select="last"
    )
    found: dict[str, list[dict[str, float]]] = {"encoding": [], "from the cache": []}
    for _ in range(arguments.repeats):
        for name, lines in found.items():
            data.hidden = kept if name == "from the cache" else None
            entries = system.beside_hidden if data.hidden else frozen
            lines += run(system, {entry: frozen[entry] for entry in entries}, data, settings, mesh)
    medians = {}
    for name, lines in found.items():
        times = [line["step_ms"] for line in lines]
        medians[name] = statistics.median(times)
        work = [line["tflops_per_device"] * line["step_ms"] * mesh.size for line in lines]
        waits = statistics.median(line["data_wait"] for line in lines)
        print(
            f"a step, {name}: {medians[name]:.0f} ms ({min(times):.0f} to {max(times):.0f}, "
            f"{len(times)} steps), {statistics.median(work):.0f} GFLOP, waiting {waits:.2%} of it"
        )
    print(f"ratio: {medians['encoding'] / medians['from the cache']:.2f}")


if __name__ == "__main__":
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--llm", choices=GEOMETRIES, default="t5-large")
    parser.add_argument("--slm", choices=GEOMETRIES, default="t5-small")
    parser.add_argument("--fusion", choices=FUSIONS, default="add")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    for name, value in (
        ("batch_size", 8),
        ("prompt_tokens", 128),
        ("response_tokens", 64),
        ("steps", 8),
        ("repeats", 2),
    ):
        parser.add_argument(f"--{name}", type=count, default=value)
    given = parser.parse_args()
    if given.steps == 1:
        parser.error("argument --steps: '1': expected at least 2, the first one is not counted")
    with tempfile.TemporaryDirectory() as cache:
        measure(given, cache)
