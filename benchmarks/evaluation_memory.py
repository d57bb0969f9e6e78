"""What evaluation holds in memory: the most bytes of arrays at once, on eight CPU devices.

    python benchmarks/evaluation_memory.py [--width=256] [--layers=2] [--workdir=DIR]

A random T5 is the LLM, and one an eighth as wide the SLM. Both and L2S are trained for one step,
and evaluated. Arrays are counted every few milliseconds, one that several systems share once, and
compared with the parameters of each system. The mesh is fsdp=8.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8")
)

import jax
from ml_collections import ConfigDict

from l2s_jax.arguments import Parser, count
from l2s_jax.config import default, settled
from l2s_jax.evaluation.evaluate import evaluate
from l2s_jax.experiment.experiment import Experiment

EVERY_S = 0.003


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
        section.train.update(steps=1, batch_size=8, evaluate_every=1)
    config.decoding.update(max_new_tokens=8, batch_size=8)
    config.evaluation.max_examples = 16
    config.evaluation.latency.update(batch_size=8, prompt_tokens=8, new_tokens=8, repeats=2)
    config.mesh.update(data=1, fsdp=8)
    return settled(config)


def held() -> int:
    """Bytes of all arrays, on all devices together."""
    return sum(
        math.prod(array.sharding.shard_shape(array.shape))
        * array.dtype.itemsize
        * len(array.sharding.device_set)
        for array in jax.live_arrays()
    )


@contextlib.contextmanager
def watched() -> Iterator[list[int]]:
    """What `held` was, every few milliseconds."""
    found, over = [held()], threading.Event()

    def watch() -> None:
        while not over.wait(EVERY_S):
            found.append(held())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()


def main() -> None:
    """Prints what each system has, and the most that is held at once."""
    parser = Parser(description="What evaluation holds in memory.", allow_abbrev=False)
    parser.add_argument("--width", type=count, default=256)
    parser.add_argument("--layers", type=count, default=2)
    parser.add_argument("--workdir")
    flags = parser.parse_args()
    with contextlib.ExitStack() as stack:
        workdir = flags.workdir or stack.enter_context(tempfile.TemporaryDirectory())
        experiment = Experiment(config_of(workdir, flags.width, flags.layers), workdir)
        experiment.make()
        with watched() as found:
            report = evaluate(experiment)
    for name in ("llm", "slm", "l2s"):
        print(f"{name}: {report['systems'][name]['params'] * 4 / 1e6:.1f} MB")
    print(f"most at once: {max(found) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
