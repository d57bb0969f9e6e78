"""What a GPU launches and reads for one decoding step, counted from the step's program.

    python benchmarks/kernels.py --slm=t5-small --batch_sizes=1,32

Needs no GPU and runs nothing. JAX lowers the step for CUDA anywhere; that gives its products,
reductions and cache writes, and from them the fewest and most kernels that XLA may make. Where
JAX's CUDA plugin is installed (`pip install 'jax[cuda13]'`), its compiler makes the program for an
H100 too, and the kernels are counted; which ones a card would choose by timing them it cannot know.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from l2s_jax.arguments import Parser, count, integers
from l2s_jax.cluster.chips import CHIPS
from l2s_jax.decoding.engine import decode_cache, prefill
from l2s_jax.decoding.logits import greatest
from l2s_jax.decoding.loop import CHUNK
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.systems import LanguageModel
from l2s_jax.plan.hlo import memory_bytes

# Microseconds that a small kernel takes when launched by itself and within a CUDA graph:
# 80 kernels take 260 and 70, https://cuda.juliagpu.org/dev/usage/graphs/
ALONE, IN_GRAPH = 3.3, 0.9

# What XLA has to know of an H100 to compile for it; openxla/xla has the same numbers in
# xla/backends/gpu/target_config/specs/h100_sxm.txtpb.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  name: "NVIDIA H100 80GB HBM3" core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84929347584 memory_bandwidth: 3352320000000
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is here, which holds XLA's whole compiler for GPUs."""
    return importlib.util.find_spec("jax_plugins") is not None and any(
        importlib.util.find_spec(f"jax_plugins.xla_cuda{version}") for version in (12, 13)
    )


class Decoding:
    """One geometry's decoding at one batch size, in shapes only."""

    def __init__(self, system: LanguageModel, rows: int, prompt_tokens: int, new_tokens: int):
        self.system, self.rows, self.new_tokens = system, rows, new_tokens
        self.trained = jax.eval_shape(
            lambda key: system.to_serve(system.init(key), {})[0], jax.random.key(0)
        )
        ids = jax.ShapeDtypeStruct((rows, prompt_tokens), jnp.int32)
        mask = jax.ShapeDtypeStruct(ids.shape, bool)
        hidden = jax.eval_shape(system.encode, self.trained, {}, ids, mask)
        self.logits, self.cache, _ = jax.eval_shape(
            lambda *arguments: prefill(system, *arguments, max_new_tokens=new_tokens),
            *(self.trained, {}, ids, mask, hidden),
        )

    def stablehlo(self) -> str:
        """One step and the choice of its token, lowered for CUDA, before any optimization."""

        def step(trained: Any, token: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
            logits, cache = self.system.step(trained, token, cache)
            return greatest(logits), cache

        token = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
        traced = jax.jit(step).trace(self.trained, token, self.cache)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    def compiled(self) -> str:
        """The whole decoding loop in HLO, as XLA compiles it for an H100."""
        (device,) = topologies.get_topology_desc(
            platform="cuda", target_config=H100, topology="1x1x1"
        ).devices
        where = jax.sharding.SingleDeviceSharding(device)

        def loop(trained: Any, logits: jax.Array, cache: Any, limits: jax.Array) -> Any:
            settings = {"max_new_tokens": self.new_tokens, "end_ids": ()}
            return decode_cache(self.system, trained, logits, cache, limits, **settings)

        limits = jax.ShapeDtypeStruct((self.rows,), jnp.int32)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            (self.trained, self.logits, self.cache, limits),
        )
        return jax.jit(loop).lower(*arguments).compile().as_text()

    def read(self) -> dict[str, int]:
        """Bytes of the weights, in the dtype of the products, and of the cache, read once."""
        weights = self.system.parameters_read_per_token(self.trained)
        cache = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.cache))
        return {
            "weights": weights * jnp.dtype(self.system.config.dtype).itemsize,
            "cache": cache,
        }


def operations(stablehlo: str) -> dict[str, int]:
    """How often a step runs what a kernel is made around, and the bytes of the weights it casts.

    products; attention: those among them with the cache; writes, of keys or values; reductions,
    of norms, softmax and the choice of the token; cast_bytes: bytes written when a weight is cast.
    """
    functions = re.split(r"^ *func\.func ", stablehlo, flags=re.MULTILINE)[1:]
    bodies = {re.search(r"@([\w.]+)", text)[1]: text for text in functions}

    def counted(name: str) -> Counter[str]:
        found: Counter[str] = Counter()
        for line in bodies[name].splitlines():
            if called := re.search(r"\bcall @([\w.]+)", line):
                found += counted(called[1])
            elif "stablehlo.dot_general" in line:
                found["products"] += 1
                found["attention"] += "batching_dims" in line
            elif re.search(r"stablehlo.dynamic_update_slice .*: \(tensor<(\d+x){3}", line):
                found["writes"] += 1
            elif "stablehlo.reduce(" in line:
                # The bounds check of a look-up is no kernel of its own.
                found["reductions"] += "applies stablehlo.and" not in line
            elif "stablehlo.convert %arg" in line and name == "main":
                shape, width = re.search(r"-> tensor<([\dx]*)x[a-z]+(\d+)>", line).groups()
                sizes = [int(size) for size in shape.split("x")]
                if len(sizes) == 2:
                    found["cast_bytes"] += sizes[0] * sizes[1] * int(width) // 8
        return found

    names = ("products", "attention", "writes", "reductions", "cast_bytes")
    total = counted("main")
    return {name: total[name] for name in names}


def bounds(found: dict[str, int]) -> tuple[int, int]:
    """The fewest and most kernels of a step.

    Fewest: a kernel per product by weights, but one for queries, keys and values; one per attention
    with its softmax; one per reduction of a norm; one per write. Most: each reduction and write is
    a kernel, and each product is two, as where its sum is split or what follows is not fused.
    """
    weights = found["products"] - found["attention"]
    others = found["reductions"] - found["attention"]  # a softmax has two, as many as products
    merged = found["writes"]  # a product each, whose input is that of the queries
    low = weights - merged + found["attention"] // 2 + others + found["writes"]
    return low, 2 * found["products"] + found["reductions"] + found["writes"]


def launched(hlo: str) -> dict[str, int]:
    """Kernels of one step in a compiled loop's text, by what they hold.

    A product that XLA has made a sum of is among the reductions.
    """
    inside: dict[str, list[str]] = {}
    name = ""
    for line in hlo.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = opened[1]
            inside[name] = []
        elif name:
            inside[name].append(line)
    loops = re.findall(rf' while\(.*body=%?([\w.\-]+).*known_trip_count":\{{"n":"{CHUNK}"', hlo)
    if not loops:
        raise ValueError(f"the program has no loop of {CHUNK} turns")

    def sort(line: str) -> str:
        called = re.search(r"\bcalls=%?([\w.\-]+)", line)
        text = "\n".join(inside[called[1]] if called else [line])
        for kind, pattern in (
            ("products", r" dot\(|cublas|__cudnn"),
            ("writes", r" dynamic-update-slice\("),
            ("reductions", r" reduce\("),
            ("copies", r" (copy|transpose)\("),
        ):
            if re.search(pattern, text):
                return kind
        return "others"

    kinds: Counter[str] = Counter()
    for line in inside[loops[-1]]:
        if re.search(r" (fusion|custom-call|copy|dynamic-update-slice|sort)\(", line):
            kinds[sort(line)] += 1
    return dict(kinds)


def counted(decoding: Decoding, compile_it: bool) -> dict[str, Any]:
    """A row: all counts of one step, and microseconds that reading and launching take."""
    found, read = operations(decoding.stablehlo()), decoding.read()
    low, high = bounds(found)
    row = {"batch_size": decoding.rows, **found, "kernels_low": low, "kernels_high": high}
    row.update({f"{name}_bytes": size for name, size in read.items()})
    for chip in ("h100", "h200"):
        row[f"{chip}_floor_us"] = sum(read.values()) / CHIPS[chip].hbm * 1e6
    if compile_it:
        text = decoding.compiled()
        row["launched"] = launched(text)
        row["moved_bytes"] = memory_bytes(text, only_loops=True) / CHUNK
        low = high = sum(row["launched"].values())
    for name, each in (("alone", ALONE), ("in_graph", IN_GRAPH)):
        row[f"{name}_us"] = [low * each, high * each]
    return row


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A row of the table, by column."""

    def to(pair: list[float]) -> str:
        return " to ".join(dict.fromkeys(f"{x:.0f}" for x in pair))

    cells = {
        "batch": f"{row['batch_size']}",
        "products, of attention": f"{row['products']}, {row['attention']}",
        "reductions": f"{row['reductions']}",
        "cache writes": f"{row['writes']}",
        "kernels, by bounds": to([row["kernels_low"], row["kernels_high"]]),
    }
    if "launched" in row:
        cells["compiled"] = f"{sum(row['launched'].values())}"
    for name in ("weights", "cache", "cast", "moved"):
        if f"{name}_bytes" in row:
            cells[f"{name} MB"] = f"{row[f'{name}_bytes'] / 1e6:.1f}"
    cells["floor µs, H100, H200"] = f"{row['h100_floor_us']:.0f}, {row['h200_floor_us']:.0f}"
    cells["launches µs, in a graph"] = to(row["in_graph_us"])
    return cells | {"launched alone": to(row["alone_us"])}


def main(argv: list[str]) -> None:
    """Prints a table; writes --output where it is given."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--slm", choices=GEOMETRIES, default="t5-small")
    parser.add_argument("--batch_sizes", type=integers, default="1,32")
    parser.add_argument("--prompt_tokens", type=count, default=128)
    parser.add_argument("--new_tokens", type=count, default=64)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", default="", help="a JSON file")
    arguments = parser.parse_args(argv)
    if arguments.new_tokens < 2:
        parser.error("--new_tokens=1: expected more, as the first token takes no step")

    jax.config.update("jax_platforms", "cpu")
    config = dataclasses.replace(GEOMETRIES[arguments.slm], dtype=jnp.dtype(arguments.dtype))
    compile_it = has_compiler()
    rows = [
        counted(
            Decoding(
                LanguageModel("slm", config), size, arguments.prompt_tokens, arguments.new_tokens
            ),
            compile_it,
        )
        for size in arguments.batch_sizes
    ]
    columns = list(cells(rows[0]))
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(cells(row).values())} |")
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump({"arguments": vars(arguments), "rows": rows}, file, indent=2)


if __name__ == "__main__":
    main(sys.argv[1:])
