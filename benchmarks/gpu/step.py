"""One decoding step of a model: its time, and the operations that take longest in its trace.

    python -m benchmarks.gpu.step --model=t5-small --batch_sizes=1,32 --output=step.json

The chunks of steps that a stream runs are timed and traced, without the prompt. XLA's flags are
those of the environment: what others bring is seen by running this again.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import glob
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2s_jax.arguments import Parser, count, integers
from l2s_jax.bench.geometry import random_like
from l2s_jax.bench.ours import bytes_of_weights
from l2s_jax.data.prompts import random_prompts
from l2s_jax.decoding.engine import advance, start
from l2s_jax.decoding.loop import CHUNK, State
from l2s_jax.files import finite, write_json
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel

TRACED = 4  # chunks
WARM_UP = 3  # chunks: a GPU runs a program as one graph from its third run on
CONTAINERS = ("while", "call", "conditional")  # what is in them has events of its own


class Chunks:
    """A model in the middle of a response, chunk after chunk."""

    def __init__(self, model: str, dtype: str, batch_size: int, prompt_tokens: int, chunks: int):
        config = dataclasses.replace(GEOMETRIES[model], dtype=jnp.dtype(dtype))
        # No row may end before the last chunk.
        config = dataclasses.replace(config, eos_id=-1)
        self.system = LanguageModel("slm", config)
        shapes = jax.eval_shape(
            lambda key: self.system.to_serve(self.system.init(key), {}), jax.random.key(0)
        )
        self.trained = random_like(shapes[0])
        self._settings = {"max_new_tokens": chunks * CHUNK + 1}
        ids = random_prompts(batch_size, prompt_tokens, config.vocab_size)
        limits = np.full(batch_size, self._settings["max_new_tokens"], np.int32)
        self._ended = np.zeros(batch_size, bool)
        self.state: State = start(
            self.system,
            self.trained,
            {},
            ids,
            np.ones(ids.shape, bool),
            limits,
            **self._settings,
        )

    def run(self) -> float:
        """The seconds that a chunk took."""
        jax.block_until_ready(self.state)
        began = time.perf_counter()
        self.state = advance(
            self.system, self.trained, {}, self.state, self._ended, **self._settings
        )
        jax.block_until_ready(self.state)
        return time.perf_counter() - began

    def bytes_per_step(self) -> int:
        """Of the weights that a step reads, and of its cache."""
        cache = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state.cache))
        return bytes_of_weights(self.system, self.trained) + cache


def operations(folder: str) -> list[tuple[str, int, float]]:
    """(name, how often, microseconds in all) of what a trace says the device ran, longest first.

    Of a GPU these are its kernels; of a CPU, the operations of XLA's programs.
    """
    (path,) = glob.glob(os.path.join(folder, "**", "*.xplane.pb"), recursive=True)
    data = jax.profiler.ProfileData.from_file(path)
    devices = [plane for plane in data.planes if plane.name.startswith("/device:GPU")]
    found: dict[str, list[float]] = collections.defaultdict(list)
    for plane in devices or [plane for plane in data.planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # the same again, by module or by step
            for event in line.events:
                if event.name.startswith(CONTAINERS):
                    continue
                if devices or any(name == "hlo_op" for name, _ in event.stats):
                    found[event.name].append(event.duration_ns / 1e3)
    rows = [(name, len(times), sum(times)) for name, times in found.items()]
    return sorted(rows, key=lambda row: -row[2])


def measure(options: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Milliseconds of a step, its bytes, and its operations."""
    chunks = options.repeats + TRACED + WARM_UP
    model = Chunks(options.model, options.dtype, batch_size, options.prompt_tokens, chunks)
    for _ in range(WARM_UP):
        model.run()
    times = [model.run() / CHUNK * 1e3 for _ in range(options.repeats)]
    found: dict[str, Any] = {
        "batch_size": batch_size,
        "ms_per_step": statistics.median(times),
        "bytes_per_step": model.bytes_per_step(),
    }
    if options.trace:
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(TRACED):
                    model.run()
            steps = TRACED * CHUNK
            traced = operations(folder)
        found["operations_per_step"] = sum(times for _, times, _ in traced) / steps
        found["busy_ms_per_step"] = sum(total for *_, total in traced) / steps / 1e3
        found["longest"] = [
            {"name": name, "per_step": times / steps, "us_per_step": total / steps}
            for name, times, total in traced[:10]
        ]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures each batch size; writes the file after each."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", choices=GEOMETRIES, default="t5-small")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch_sizes", type=integers, default="1,32")
    parser.add_argument("--prompt_tokens", type=count, default=128)
    parser.add_argument("--repeats", type=count, default=20, help="chunks that are timed")
    parser.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--output", required=True, help="a JSON file")
    options = parser.parse_args(argv)
    rows = []
    for batch_size in options.batch_sizes:
        rows.append(measure(options, batch_size))
        content = {"model": options.model, "dtype": options.dtype, "rows": rows}
        write_json(options.output, finite(content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
