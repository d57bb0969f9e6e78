"""Plain products by XLA: how fast the parts of a model could be at most.

    python benchmarks/products.py --rows=1,8,32,128 --shapes=512x512,512x2048,512x32128
    python benchmarks/products.py --rows=4096 --shapes=4096x4096 --dtypes=float32,bfloat16

For every number of rows and every shape IxO a chain of products [rows, I] by [I, O], each of which
waits for the one before, as a model's do. Their matrices are different ones, of --megabytes
together, so that they come from memory. The chains take turns; times are medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chain(NamedTuple):
    """Products of `rows` rows by matrices of `inputs` by `outputs` numbers."""

    rows: int
    inputs: int
    outputs: int
    dtype: str


def random_matrices(inputs: int, outputs: int, dtype: str, megabytes: int) -> list[jax.Array]:
    """Of so many bytes together, but at least two: the second product waits."""
    count = max(2, round(megabytes * 1e6 / (inputs * outputs * jnp.dtype(dtype).itemsize)))
    make = jax.jit(
        lambda key: (inputs**-0.5 * jax.random.normal(key, (inputs, outputs))).astype(dtype)
    )
    return [make(key) for key in jax.random.split(jax.random.key(0), count)]


def program(chain: Chain, matrices: list[jax.Array]) -> Callable[[], Any]:
    """Runs the compiled chain and waits for it."""
    x = jnp.ones((chain.rows, chain.inputs), chain.dtype)

    def multiply(x: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        repeats = -(-chain.inputs // chain.outputs)
        for matrix in matrices:
            # Sums in float32 as in the models; the CPU has no fast product that gives bfloat16.
            y = jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(chain.dtype)
            x = jnp.tile(y, (1, repeats))[:, : chain.inputs]
        return x

    compiled = jax.jit(multiply).lower(x, matrices).compile()
    return lambda: jax.block_until_ready(compiled(x, matrices))


def sizes(text: str) -> tuple[int, int]:
    """ "512x2048" -> (512, 2048)."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"shape {text!r}: expected INxOUT, such as 512x2048")
    inputs, outputs = text.split("x")
    return int(inputs), int(outputs)


def main(argv: list[str]) -> None:
    """Prints a table; writes --output where it is given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])

    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser.add_argument("--rows", type=listed(int), default=[1, 8, 32, 128])
    parser.add_argument("--shapes", type=listed(sizes), default=[(512, 512), (512, 2048)])
    parser.add_argument("--dtypes", type=listed(str), default=["float32"])
    parser.add_argument("--megabytes", type=int, default=256, help="of a chain's matrices")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", default="", help="a JSON file")
    arguments = parser.parse_args(argv)

    programs: dict[Chain, Callable[[], Any]] = {}
    counts: dict[Chain, int] = {}
    for dtype, shape in itertools.product(arguments.dtypes, arguments.shapes):
        matrices = random_matrices(*shape, dtype, arguments.megabytes)
        for number in arguments.rows:
            chain = Chain(number, *shape, dtype)
            programs[chain], counts[chain] = program(chain, matrices), len(matrices)
    seconds: dict[Chain, list[float]] = {chain: [] for chain in programs}
    for repeat in range(arguments.repeats + 1):
        for chain, run in programs.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                seconds[chain].append(time.perf_counter() - began)
    rows = []
    print("| rows | matrix | dtype | µs per product | GFLOP/s | GB/s of matrices |")
    print("|---:|---|---|---:|---:|---:|")
    for chain, times in seconds.items():
        each = statistics.median(times) / counts[chain]
        numbers = chain.inputs * chain.outputs
        row = {
            **chain._asdict(),
            "microseconds": each * 1e6,
            "gflops": 2 * chain.rows * numbers / each / 1e9,
            "gb_per_s": numbers * jnp.dtype(chain.dtype).itemsize / each / 1e9,
        }
        rows.append(row)
        print(
            f"| {chain.rows} | {chain.inputs} x {chain.outputs} | {chain.dtype} | "
            f"{row['microseconds']:.1f} | {row['gflops']:.3g} | {row['gb_per_s']:.3g} |"
        )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"device": jax.devices()[0].device_kind, "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
