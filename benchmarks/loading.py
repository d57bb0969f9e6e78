"""Loading from safetensors: seconds and memory.

    python benchmarks/loading.py

T5-Large's encoder, ours beside transformers' (needs torch and transformers). Each loading is a
process of its own, the two in turn, from a random checkpoint of 2.95 GB.

    python benchmarks/loading.py --paths=DIR,FILE.gguf

Whole models that are there, in turn: from a folder, and from a GGUF file.

    python benchmarks/loading.py --processes=1,2

T5-3B's encoder in bfloat16, from a random checkpoint of 2.5 GB in files of 1 GB, by jobs of as many
processes, each of which reads its part to its CPU device: mesh fsdp=N.

Checkpoints are written to a temporary directory (--directory) and are in the page cache when they
are read. Memory is the most that a process had resident while it loaded, less what it had before.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from l2s_jax.arguments import Parser

REPEATS = 5
MODEL_REPEATS = 3
ENCODER_BYTES = 4 * 334_939_648
WIDTH, INNER, FEED_FORWARD, HEADS, LAYERS = 1024, 4096, 16384, 32, 24  # T5-3B
FILE_BYTES = 10**9


def write_checkpoint(directory: str) -> None:
    """T5-Large with random weights, as transformers saves it."""
    import torch
    import transformers

    config = transformers.T5Config(
        d_model=1024, d_ff=4096, num_layers=24, num_heads=16, decoder_start_token_id=0
    )
    torch.set_default_dtype(torch.float32)
    transformers.T5ForConditionalGeneration(config).save_pretrained(directory)


def encoder_tensors() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of T5-3B's encoder."""
    yield "shared.weight", (32128, WIDTH)
    for i in range(LAYERS):
        attention, feed_forward = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        for name in "qkv":
            yield f"{attention}.SelfAttention.{name}.weight", (INNER, WIDTH)
        yield f"{attention}.SelfAttention.o.weight", (WIDTH, INNER)
        if i == 0:
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (32, HEADS)
        yield f"{attention}.layer_norm.weight", (WIDTH,)
        yield f"{feed_forward}.DenseReluDense.wi.weight", (FEED_FORWARD, WIDTH)
        yield f"{feed_forward}.DenseReluDense.wo.weight", (WIDTH, FEED_FORWARD)
        yield f"{feed_forward}.layer_norm.weight", (WIDTH,)
    yield "encoder.final_layer_norm.weight", (WIDTH,)


def write_encoder(directory: str) -> None:
    """T5-3B's encoder with random weights, bfloat16, in files of up to FILE_BYTES."""
    import ml_dtypes
    from safetensors.numpy import save_file

    random = np.random.default_rng(0)
    files: list[dict[str, np.ndarray]] = [{}]
    for name, shape in encoder_tensors():
        tensor = random.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        if sum(one.nbytes for one in files[-1].values()) + tensor.nbytes > FILE_BYTES:
            files.append({})
        files[-1][name] = tensor
    weight_map = {}
    for i, tensors in enumerate(files):
        file = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        save_file(tensors, os.path.join(directory, file))
        weight_map.update(dict.fromkeys(tensors, file))
    fields = {
        "model_type": "t5",
        "vocab_size": 32128,
        "d_model": WIDTH,
        "d_kv": INNER // HEADS,
        "d_ff": FEED_FORWARD,
        "num_heads": HEADS,
        "num_layers": LAYERS,
    }
    for file, value in (
        ("config.json", fields),
        ("model.safetensors.index.json", {"weight_map": weight_map}),
    ):
        with open(os.path.join(directory, file), "w", encoding="utf-8") as stream:
            json.dump(value, stream)


def resident() -> int:
    """Bytes of memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


def measured(run: Callable[[], Any]) -> dict[str, float]:
    """Seconds of `run`, and the memory that it took at its peak."""
    before = resident()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak_bytes": peak - before}


def load(which: str, directory: str) -> dict[str, float]:
    """One loading of T5-Large's encoder."""
    if which == "l2s_jax":
        from l2s_jax.checkpoints.pretrained import load_encoder

        return measured(lambda: load_encoder(directory))
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def run() -> object:
        model = transformers.T5EncoderModel.from_pretrained(directory)
        # Weights that are still mapped from the file are read on first use: count that too.
        return model, sum(float(p.sum()) for p in model.parameters())

    return measured(run)


def load_whole(path: str) -> dict[str, float]:
    """One loading of a model, with its tokenizer."""
    from l2s_jax.checkpoints.pretrained import load
    from l2s_jax.tokenizers import load_tokenizer

    return measured(lambda: (load(path), load_tokenizer(path)))


def load_part(directory: str, coordinator: str, processes: int, process: int) -> dict[str, float]:
    """One process's loading of its part of T5-3B's encoder."""
    import jax
    import jax.numpy as jnp

    from l2s_jax.checkpoints.pretrained import load_encoder
    from l2s_jax.cluster import sharding
    from l2s_jax.cluster.job import job

    found: dict[str, float] = {}
    with job(coordinator, processes, process):
        mesh = sharding.make_mesh({"data": 1, "fsdp": processes, "tensor": 1})

        def run() -> object:
            _, params = load_encoder(directory, dtype=jnp.bfloat16, weights="float", mesh=mesh)
            shards = [leaf.addressable_shards[0] for leaf in jax.tree.leaves(params)]
            found["part_bytes"] = sum(shard.data.nbytes for shard in shards)
            return params

        found |= measured(run)
    return found


def child(*arguments: object) -> subprocess.Popen:
    """This file with other arguments, as a process of its own."""
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def result(process: subprocess.Popen) -> dict[str, float]:
    """What a child found."""
    output, _ = process.communicate()
    if process.returncode:
        sys.exit(process.returncode)
    return json.loads(output.splitlines()[-1])


def beside_transformers(directory: str) -> None:
    """Both, in turn; medians."""
    subprocess.run([sys.executable, __file__, "write", directory], check=True)
    results: dict[str, list[dict[str, float]]] = {"l2s_jax": [], "transformers": []}
    for repeat in range(REPEATS + 1):
        for which, found in results.items():
            one = result(child("load", which, directory))
            if repeat:  # the first only warms the page cache
                found.append(one)
    print("| | seconds | peak memory / weights |\n|---|---|---|")
    for which, found in results.items():
        seconds, peak = (
            statistics.median(one[key] for one in found) for key in ("seconds", "peak_bytes")
        )
        print(f"| {which} | {seconds:.2f} | {peak / ENCODER_BYTES:.2f} |")


def whole_models(paths: Sequence[str]) -> None:
    """Each, in turn; medians."""
    results: dict[str, list[dict[str, float]]] = {path: [] for path in paths}
    for repeat in range(MODEL_REPEATS + 1):
        for path, found in results.items():
            one = result(child("whole", path))
            if repeat:  # the first only warms the page cache
                found.append(one)
    print("| | seconds | peak memory, GB |\n|---|---|---|")
    for path, found in results.items():
        seconds, peak = (
            statistics.median(one[key] for one in found) for key in ("seconds", "peak_bytes")
        )
        print(f"| {os.path.basename(path)} | {seconds:.2f} | {peak / 1e9:.2f} |")


def in_parts(directory: str, counts: Sequence[int]) -> None:
    """Jobs of as many processes: medians of the slowest's time, the most memory of all."""
    subprocess.run([sys.executable, __file__, "write-encoder", directory], check=True)
    sizes = [entry.stat().st_size for entry in os.scandir(directory)]
    print(f"files of {sum(sizes) / 1e9:.2f} GB, the largest {max(sizes) / 1e9:.2f} GB\n")
    print("| processes | seconds | part, GB | peak, GB | (peak - part) / largest file |")
    print("|---|---|---|---|---|")
    for count in counts:
        runs = []
        for _ in range(REPEATS):
            with socket.create_server(("127.0.0.1", 0)) as server:
                where = f"127.0.0.1:{server.getsockname()[1]}"
            job = [child("part", directory, where, count, i) for i in range(count)]
            runs.append([result(process) for process in job])
        seconds = statistics.median(max(one["seconds"] for one in run) for run in runs)
        worst = max((one for run in runs for one in run), key=lambda one: one["peak_bytes"])
        part, peak = worst["part_bytes"], worst["peak_bytes"]
        print(
            f"| {count} | {seconds:.2f} | {part / 1e9:.2f} | {peak / 1e9:.2f} "
            f"| {(peak - part) / max(sizes):.2f} |"
        )


def main() -> None:
    """The benchmark that the flags ask for."""
    parser = Parser()
    parser.add_argument("--processes", help="numbers of processes, as in 1,2")
    parser.add_argument("--paths", help="models that are there, as in DIR,FILE.gguf")
    parser.add_argument("--directory", help="where the checkpoint is written for as long")
    flags = parser.parse_args()
    if flags.paths:
        whole_models(flags.paths.split(","))
        return
    with tempfile.TemporaryDirectory(dir=flags.directory) as directory:
        if flags.processes:
            in_parts(directory, [int(count) for count in flags.processes.split(",")])
        else:
            beside_transformers(directory)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["write", where]:
            write_checkpoint(where)
        case ["write-encoder", where]:
            write_encoder(where)
        case ["load", which, where]:
            print(json.dumps(load(which, where)))
        case ["whole", where]:
            print(json.dumps(load_whole(where)))
        case ["part", where, coordinator, count, i]:
            print(json.dumps(load_part(where, coordinator, int(count), int(i))))
        case _:
            main()
