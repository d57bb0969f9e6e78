"""Memory and time of reading a prompt, by its length: scores in blocks, and all at once.

    python benchmarks/long_prompts.py --lengths=512,1024,2048,4096,8192,16384,32768 --family=llama

One row, read by a small model with random weights: T5's encoder, or a Llama that gives the hidden
states of its last layer. Both ways take turns. Memory is what the compiled program needs besides
its arguments and its result. Times are medians, without the first run. All scores at once are not
run where they alone would take more than --megabytes; what their program needs is written anyway.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from l2s_jax.arguments import Parser, count, integers
from l2s_jax.bench.geometry import random_like
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.files import write_json, write_text
from l2s_jax.models.counting import all_at_once
from l2s_jax.models.families import ModelConfig, make_module
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel
from l2s_jax.models.t5 import T5Config

FAMILIES = ("t5", "llama")
WAYS = {"blocks": contextlib.nullcontext, "at once": all_at_once}
_HEADS, _WIDTH, _LAYERS = 4, 256, 2


def config_of(family: str) -> ModelConfig:
    """Of a small model."""
    if family == "t5":
        shape = {"num_heads": _HEADS, "head_width": 64, "feed_forward_width": 4 * _WIDTH}
        layers = {"num_encoder_layers": _LAYERS, "num_decoder_layers": 1}
        return T5Config(width=_WIDTH, **shape, **layers)
    return LlamaConfig(
        width=_WIDTH,
        num_heads=_HEADS,
        num_kv_heads=_HEADS // 2,
        head_width=64,
        feed_forward_width=4 * _WIDTH,
        num_layers=_LAYERS,
        rotary=Rotary(64),
    )


def program(family: str, length: int, way: str) -> tuple[Callable[[], Any], int]:
    """Runs the compiled program and waits for it; the bytes that it needs."""
    config = config_of(family)
    system, module = LanguageModel("llm", config), make_module(config)
    params = random_like(jax.eval_shape(system.init, jax.random.key(0)))["llm"]

    def read(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        embedded = module.apply({"params": params}, ids, method="embed")
        return module.apply({"params": params}, embedded, mask, method="represent")

    ids, mask = jnp.ones((1, length), jnp.int32), jnp.ones((1, length), bool)
    with WAYS[way]():
        compiled = jax.jit(read).lower(params, ids, mask).compile()
    needed = compiled.memory_analysis().temp_size_in_bytes
    return lambda: jax.block_until_ready(compiled(params, ids, mask)), needed


def measure(family: str, length: int, repeats: int, megabytes: int) -> dict[str, Any]:
    """A row of the table."""
    runs, row = {}, {"family": family, "length": length}
    for way in WAYS:
        runs[way], row[f"{way}, bytes"] = program(family, length, way)
        row[f"{way}, seconds"] = None
    if _HEADS * length**2 * 4 > megabytes * 1e6:
        del runs["at once"]
    times: dict[str, list[float]] = {way: [] for way in runs}
    for turn in range(repeats + 1):
        for way, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                times[way].append(time.perf_counter() - began)
    return row | {f"{way}, seconds": statistics.median(took) for way, took in times.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| model | tokens | blocks, MB | at once, MB | blocks, s | at once, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = [f"{row[f'{way}, bytes'] / 1e6:,.0f}" for way in WAYS]
        seconds = [row[f"{way}, seconds"] for way in WAYS]
        times = ["" if took is None else f"{took:.3g}" for took in seconds]
        cells = [row["family"], f"{row['length']:,}", *memory, *times]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Memory and time against the length."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, what, unit, label in zip(
        figure.subplots(1, 2),
        ("bytes", "seconds"),
        (1e6, 1),
        ("memory, MB", "time, seconds"),
        strict=True,
    ):
        for place, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
            for way, style in zip(WAYS, ("-o", "--^"), strict=True):
                own = [
                    (row["length"], row[f"{way}, {what}"] / unit)
                    for row in rows
                    if row["family"] == family and row[f"{way}, {what}"] is not None
                ]
                axes.plot(
                    *zip(*own, strict=True), style, color=f"C{place}", label=f"{family}, {way}"
                )
        axes.set(yscale="log", xlabel="tokens of a prompt", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def families(text: str) -> list[str]:
    """Of a flag."""
    found = text.split(",")
    if unknown := set(found) - set(FAMILIES):
        raise argparse.ArgumentTypeError(
            f"{min(unknown)!r}: expected some of {', '.join(FAMILIES)}"
        )
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a table; writes --output, the table beside it as .md, and a plot as .png."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--lengths", type=integers, default="512,1024,2048,4096")
    add("--family", type=families, default="t5,llama", help="as in t5,llama")
    add("--repeats", type=count, default=3)
    add("--megabytes", type=count, default=2200, help="that scores may take which are run")
    add("--output", default="long_prompts.json")
    options = parser.parse_args(argv)
    rows = [
        measure(family, length, options.repeats, options.megabytes)
        for family in options.family
        for length in options.lengths
    ]
    write_json(options.output, {"machine": {**cpu(), "cores": cores()}, "rows": rows})
    stem = options.output.removesuffix(".json")
    write_text(f"{stem}.md", table(rows))
    plot(rows, f"{stem}.png")
    print(table(rows), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
