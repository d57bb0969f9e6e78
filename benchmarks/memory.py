"""What a whole run holds in memory, stage by stage, beside what its largest program needs.

    python benchmarks/memory.py [--width=256] [--layers=2] [--workdir=DIR]

A random T5 is the LLM, and one an eighth as wide the SLM. The LLM answers the train split, gives
its distributions and its features; both and L2S are trained for a few steps, and evaluated. The
run has eight CPU devices, mesh fsdp=8. Said are, for all devices together:

- arrays: the most bytes of arrays at once, looked at every few milliseconds;
- program: arguments and results of the stage's largest program, an array that it is given and gives
  back once;
- its temporaries: what the compiler plans for that program beside them.

A checkpoint that is being written is waited for: on a CPU it is the arrays themselves, which an
accelerator copies to its host first.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
)

import jax
from ml_collections import ConfigDict

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.config import default, settled
from l2s_jax.evaluation.evaluate import evaluate
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.files import write_json
from l2s_jax.training import loop
from l2s_jax.training.checkpoint import Checkpoints

EVERY_S = 0.02


def config_of(workdir: str, width: int, layers: int) -> ConfigDict:
    """A run on sentences that are written to the workdir."""
    sentences = [f"{a} {b} {c}" for a in "abcd" for b in "efgh" for c in "ijkl"]
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, "data.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"said": one, "back": one[::-1]}) + "\n" for one in sentences)
    config = default()
    config.task.update(name="back", source="jsonl", data_dir=workdir)
    config.task.splits.update(train="data.jsonl", validation="data.jsonl", test="data.jsonl")
    config.task.update(prompt="{said}", response="back")
    config.tokenizer.train_vocab_size = 24
    config.update(max_prompt_tokens=8, max_response_tokens=8, buckets=((8, 8),))
    for section, size, number in ((config.llm, width, layers), (config.slm, width // 8, 1)):
        section.model.update(
            width=size,
            num_heads=8,
            head_width=size // 8,
            feed_forward_width=4 * size,
            num_encoder_layers=number,
            num_decoder_layers=number,
        )
    for section in (config.llm, config.slm, config.l2s):
        # The best of them is not the last: the run has to go back to it.
        section.train.update(steps=4, batch_size=8, evaluate_every=1, warmup_steps=0)
    config.labels.update(source="llm", batch_size=8)
    config.distillation.update(weight=0.5, top_k=8)
    config.features.cache = os.path.join(workdir, "features")
    config.decoding.update(max_new_tokens=8, batch_size=8)
    config.evaluation.max_examples = 16
    config.evaluation.latency.update(batch_size=8, prompt_tokens=8, new_tokens=8, repeats=2)
    config.mesh.update(data=1, fsdp=8)
    return settled(config)


class Most:
    """The most that was there at once, so far.

    Attributes:
      arrays: bytes of all arrays, on all devices together.
      program, temporaries: bytes that the program with the most of both takes.
      name: of that program.
    """

    def __init__(self) -> None:
        self.arrays, self.program, self.temporaries, self.name = 0, 0, 0, ""

    def look(self) -> None:
        """Counts what is there now."""
        held: dict[int, int] = {}
        for array in jax.live_arrays():
            with contextlib.suppress(RuntimeError):  # given away meanwhile
                held |= _buffers(array)
        self.arrays = max(self.arrays, sum(held.values()))
        for executable in jax.devices()[0].client.live_executables():
            one, devices = executable.get_compiled_memory_stats(), len(executable.local_devices())
            program = devices * (
                one.argument_size_in_bytes + one.output_size_in_bytes - one.alias_size_in_bytes
            )
            temporaries = devices * one.temp_size_in_bytes
            if program + temporaries > self.program + self.temporaries:
                self.program, self.temporaries = program, temporaries
                self.name = executable.hlo_modules()[0].name


def _buffers(array: jax.Array) -> dict[int, int]:
    """Bytes of an array's buffers by where they lie: others may be views of them."""
    return {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for shard in array.addressable_shards
    }


@contextlib.contextmanager
def watched() -> Iterator[Most]:
    """What there is at most until the block's end."""
    jax.clear_caches()
    found, over = Most(), threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            found.look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
        found.look()


class Written(Checkpoints):
    """Checkpoints, of which none is being written while training goes on."""

    def save(self, step: int, **items: Any) -> None:
        """Saves, and waits for it."""
        super().save(step, **items)
        self.wait()


def measure(workdir: str, width: int, layers: int) -> dict[str, dict[str, float | str]]:
    """By stage: megabytes of arrays and of the largest program, and its name."""
    loop.Checkpoints = Written
    experiment = Experiment(config_of(workdir, width, layers), workdir)
    stages = {}
    work = {
        stage.name: lambda name=stage.name: experiment.make(name)
        for stage in experiment.stages
        if stage.is_used() and not stage.name.endswith("tokenizer")
    }
    for name, run in {**work, "evaluation": lambda: evaluate(experiment)}.items():
        with watched() as found:
            run()
        stages[name] = {
            "arrays_mb": found.arrays / 1e6,
            "program_mb": found.program / 1e6,
            "temporaries_mb": found.temporaries / 1e6,
            "program": found.name,
        }
    return stages


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints a table and writes --output."""
    parser = Parser(description="What a run holds in memory.", allow_abbrev=False)
    parser.add_argument("--width", type=count, default=256)
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--workdir")
    parser.add_argument("--output", default="memory.json")
    flags = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        workdir = flags.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        stages = measure(workdir, flags.width, flags.layers)
    write_json(flags.output, {"machine": {**cpu(), "cores": cores()}, "stages": stages})
    print("| stage | arrays, MB | largest program, MB | its temporaries, MB | arrays / program |")
    print("|---|---:|---:|---:|---:|")
    for name, one in stages.items():
        print(
            f"| {name} | {one['arrays_mb']:.1f} | {one['program_mb']:.1f} | "
            f"{one['temporaries_mb']:.1f} | {one['arrays_mb'] / one['program_mb']:.2f} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
