"""One training step's gradient by LoRA: with the change beside the kernels, and with kernels made.

python benchmarks/lora.py --model=gpt2 --rank=16 --rows=8 --tokens=128 --repeats=5

The model is random, in float32, with as many tokens of a prompt as of a response. Turns alternate;
a time is the median, and what is compiled before is not in it. Temporaries are what the compiler
says that a step needs beside parameters.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any

import jax
import numpy as np

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.geometry import random_like
from l2s_jax.config import default
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.lora import Lora
from l2s_jax.models.systems import LanguageModel
from l2s_jax.training.update import batch_loss


def main() -> None:
    """Prints a table: how, milliseconds, temporaries."""
    parser = Parser(description="A gradient by LoRA.", allow_abbrev=False)
    parser.add_argument("--model", choices=sorted(GEOMETRIES), default="gpt2", help="its geometry")
    for name, value in (("rank", 16), ("rows", 8), ("tokens", 128), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=count, default=value)
    flags = parser.parse_args()
    system = LanguageModel("slm", GEOMETRIES[flags.model])
    lora = Lora(system, flags.rank, 2.0 * flags.rank, default().l2s.lora.pattern)
    params = random_like(jax.eval_shape(system.init, jax.random.key(0)))
    trained, base = lora.split(params, jax.random.key(1))
    frozen = {"base": base, "inner": {}}
    shape = (flags.rows, flags.tokens)
    ids = np.random.default_rng(0).integers(2, system.config.vocab_size, shape, dtype=np.int32)
    batch = {f"{name}_ids": ids for name in ("slm_prompt", "response")}
    batch |= {f"{name}_mask": np.ones(shape, bool) for name in ("slm_prompt", "response")}

    def loss(trained: Any, frozen: Any, *, merged: bool) -> jax.Array:
        whole = lora.whole(trained, frozen, merged=merged)
        return batch_loss(*whole, batch, None, 0.0)[0]

    programs = {
        name: jax.jit(jax.grad(functools.partial(loss, merged=merged)))
        .lower(trained, frozen)
        .compile()
        for name, merged in (("kernels made", True), ("beside", False))
    }
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(1 + flags.repeats):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(trained, frozen))
            if turn:
                times[name].append(1e3 * (time.perf_counter() - began))
    print("| kernels | ms | temporaries, MB |\n|---|---:|---:|")
    for name, program in programs.items():
        memory: Any = program.memory_analysis()
        print(
            f"| {name} | {statistics.median(times[name]):.0f} | "
            f"{memory.temp_size_in_bytes / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()
