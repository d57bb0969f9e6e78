"""Plain products by XLA, beside which to read the times of a model.

    python benchmarks/products.py --rows=1,8,32,128 --shapes=512x512,512x2048,512x32128
    python benchmarks/products.py --rows=4096 --shapes=4096x4096 --dtypes=float32,bfloat16

For every number of rows and every shape INxOUT a chain of products [rows, IN] by [IN, OUT], each
of which waits for the one before, as a model's do. Their matrices are different ones, --megabytes
of them together, so that they come from memory. The chains take turns; times are medians.
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

from l2s_jax.arguments import Parser, count, integers

# Products of a chain: each of them is compiled.
LONGEST = 1024


class Chain(NamedTuple):
    """Products of `rows` rows by matrices of `inputs` by `outputs` numbers."""

    rows: int
    inputs: int
    outputs: int
    dtype: str


def random_matrices(inputs: int, outputs: int, dtype: str, megabytes: int) -> list[jax.Array]:
    """Of so many bytes together, at least two, as the second product waits, and at most LONGEST.

    Their products keep the size of what they multiply.
    """
    products = round(megabytes * 1e6 / (inputs * outputs * jnp.dtype(dtype).itemsize))
    products = min(max(products, 2), LONGEST)
    make = jax.jit(
        lambda key: (inputs**-0.5 * jax.random.normal(key, (inputs, outputs))).astype(dtype)
    )
    return [make(key) for key in jax.random.split(jax.random.key(0), products)]


def program(chain: Chain, matrices: list[jax.Array]) -> Callable[[], Any]:
    """Runs the compiled chain and waits for it."""
    x = jnp.ones((chain.rows, chain.inputs), chain.dtype)

    def multiply(x: jax.Array, matrices: list[jax.Array]) -> jax.Array:
        repeats = -(-chain.inputs // chain.outputs)
        for matrix in matrices:
            # Sums in float32 as in the models; the CPU has no fast product that gives bfloat16.
            y = jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(chain.dtype)
            x = jnp.tile(y, (1, repeats))[:, : chain.inputs]
            if chain.outputs > chain.inputs:
                # All of y counts, lest less of it be computed.
                x += y[:, chain.inputs :].mean(axis=1, keepdims=True)
        return x

    compiled = jax.jit(multiply).lower(x, matrices).compile()
    return lambda: jax.block_until_ready(compiled(x, matrices))


def shapes(text: str) -> list[tuple[int, int]]:
    """ "512x512,512x2048" -> [(512, 512), (512, 2048)]."""
    for part in text.split(","):
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", part):
            raise argparse.ArgumentTypeError(f"shape {part!r}: expected INxOUT, such as 512x2048")
    return [tuple(map(int, part.split("x"))) for part in text.split(",")]


def dtypes(text: str) -> list[str]:
    """ "float32,bfloat16" -> ["float32", "bfloat16"]."""
    for part in text.split(","):
        if part not in ("float32", "bfloat16"):
            raise argparse.ArgumentTypeError(f"dtype {part!r}: expected float32 or bfloat16")
    return text.split(",")


def main(argv: list[str]) -> None:
    """Prints a table; writes --output where it is given."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=integers, default="1,8,32,128")
    parser.add_argument("--shapes", type=shapes, default="512x512,512x2048")
    parser.add_argument("--dtypes", type=dtypes, default="float32")
    parser.add_argument("--megabytes", type=count, default=256, help="of a chain's matrices")
    parser.add_argument("--repeats", type=count, default=9)
    parser.add_argument("--output", default="", help="a JSON file")
    arguments = parser.parse_args(argv)

    programs: dict[Chain, Callable[[], Any]] = {}
    counts: dict[Chain, int] = {}
    for dtype, shape in itertools.product(arguments.dtypes, arguments.shapes):
        matrices = random_matrices(*shape, dtype, arguments.megabytes)
        for rows in arguments.rows:
            chain = Chain(rows, *shape, dtype)
            programs[chain], counts[chain] = program(chain, matrices), len(matrices)
    seconds: dict[Chain, list[float]] = {chain: [] for chain in programs}
    for repeat in range(arguments.repeats + 1):
        for chain, run in programs.items():
            began = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                seconds[chain].append(time.perf_counter() - began)
    results = []
    print("| rows | matrix | dtype | µs per product | GFLOP/s | GB/s of matrices |")
    print("|---:|---|---|---:|---:|---:|")
    for chain, times in seconds.items():
        each = statistics.median(times) / counts[chain]
        size = chain.inputs * chain.outputs
        row = {
            **chain._asdict(),
            "products": counts[chain],
            "chain_ms": statistics.median(times) * 1e3,
            "gflops": 2 * chain.rows * size / each / 1e9,
            "gb_per_s": size * jnp.dtype(chain.dtype).itemsize / each / 1e9,
        }
        results.append(row)
        print(
            f"| {chain.rows} | {chain.inputs} x {chain.outputs} | {chain.dtype} | "
            f"{each * 1e6:.1f} | {row['gflops']:.3g} | {row['gb_per_s']:.3g} |"
        )
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": results}, file, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
