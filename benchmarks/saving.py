"""What saving costs a training, and what is lost when it ends too soon.

    python benchmarks/saving.py --output=saving.json

Trains a T5 of random weights by `python -m l2s_jax.main`, one step a line of its metrics:

- without saves, and saved by the clock: seconds that a save holds up the steps, and seconds of a
  step beside it;
- asked to end (SIGTERM), and killed (SIGKILL), with programs that are compiled anew and with
  JAX's cache of them: steps that are lost, seconds to the end, seconds until the same command has
  made a new step.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import sentences

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.files import read_json, write_json

_POLL_S = 0.02
_ROWS = 2000
# A run is interrupted at its step of this number, counted from where it began.
AT = 12
# Steps from one save by the clock to the next, more or less.
_BETWEEN = 5


class Training:
    """The command in a process of its own, in a workdir of its own."""

    def __init__(self, folder: str, name: str, cache: str | None = None):
        self._workdir = os.path.join(folder, name)
        self._metrics = os.path.join(self._workdir, "llm", "metrics.jsonl")
        self._checkpoints = os.path.join(self._workdir, "llm", "checkpoints")
        command = [sys.executable, "-m", "l2s_jax.main", "--until=llm"]
        self._command = [*command, f"--config={folder}/sentences.py", f"--workdir={self._workdir}"]
        self._environment = {**os.environ}
        self._environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        if cache:
            self._environment["JAX_COMPILATION_CACHE_DIR"] = cache
            self._environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

    def start(self, **settings: float) -> subprocess.Popen[str]:
        """Begins or goes on, with settings of `config.llm.train`."""
        flags = [f"--config.llm.train.{name}={value}" for name, value in settings.items()]
        return subprocess.Popen(
            [*self._command, *flags],
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def rows(self) -> list[dict[str, Any]]:
        """The metrics of the steps that have been made; a last line may not be whole."""
        try:
            with open(self._metrics, encoding="utf-8") as file:
                lines = [line for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []
        return [row for row in map(json.loads, lines) if "step_ms" in row]

    def step(self) -> int:
        """The last step in the metrics."""
        rows = self.rows()
        return rows[-1]["step"] if rows else 0

    def saved(self) -> set[int]:
        """Steps whose checkpoints are whole."""
        try:
            return {int(name) for name in os.listdir(self._checkpoints) if name.isdecimal()}
        except FileNotFoundError:
            return set()

    def seconds(self) -> dict[str, float]:
        """What the stage took, by kind."""
        return read_json(os.path.join(self._workdir, "llm", "time.json")) or {}

    def size(self, step: int) -> int:
        """Bytes of a checkpoint."""
        walked = os.walk(os.path.join(self._checkpoints, str(step)))
        return sum(
            os.path.getsize(os.path.join(path, name)) for path, _, names in walked for name in names
        )


def watch(process: subprocess.Popen[str]) -> Iterator[None]:
    """Now and again, until the process has ended.

    Raises:
      RuntimeError: it failed.
    """
    while process.poll() is None:
        yield
        time.sleep(_POLL_S)
    if process.returncode:
        raise RuntimeError(process.communicate()[1])


def train(training: Training, steps: int, save_minutes: float) -> dict[str, Any]:
    """A whole run: seconds of a step (median, after compiling), of saving, and number of saves."""
    saved: set[int] = set()
    process = training.start(steps=steps, evaluate_every=steps, save_minutes=save_minutes)
    for _ in watch(process):
        saved |= training.saved()
    return {
        "step_s": statistics.median(row["step_ms"] / 1000 for row in training.rows()[2:]),
        "saves": len(saved | training.saved()),
        "saving_s": training.seconds()["saving"],
        "bytes": training.size(steps),
    }


def interrupt(training: Training, number: signal.Signals, **settings: float) -> dict[str, Any]:
    """Ends a run by a signal, and goes on: steps lost, seconds to the end and to a new step."""
    process = training.start(**settings)
    for _ in watch(process):
        if training.step() >= AT:
            break
    process.send_signal(number)
    began = time.monotonic()
    process.communicate()
    ended = time.monotonic()
    rows, kept = training.rows(), max(training.saved(), default=0)
    process = training.start(**settings)
    again = time.monotonic()
    for _ in watch(process):
        # A run that goes on drops the lines of steps that it makes anew.
        if any(row["step"] > kept and row not in rows for row in training.rows()):
            break
    went_on = time.monotonic()
    process.kill()
    process.communicate()
    return {
        "signal": number.name,
        "lost": rows[-1]["step"] - kept,
        "end_s": ended - began,
        "new_step_s": went_on - again,
    }


def write_task(folder: str, *, width: int, layers: int, batch_size: int) -> None:
    """The data, and a config of a model `width` wide, in heads of 64."""
    model = {
        "width": width,
        "num_heads": width // 64,
        "head_width": 64,
        "feed_forward_width": 4 * width,
        "num_encoder_layers": layers,
        "num_decoder_layers": layers,
    }
    train = {"batch_size": batch_size, "warmup_steps": 0, "log_every": 1}
    sentences.write_task(folder, _ROWS, model=model, train=train)


def measure(folder: str, steps: int) -> dict[str, Any]:
    """All runs, of which those that end by themselves have `steps`."""
    without = train(Training(folder, "without"), steps, 0)
    minutes = _BETWEEN * without["step_s"] / 60
    saved = train(Training(folder, "saved"), steps, minutes)
    found: dict[str, Any] = {
        "bytes": saved["bytes"],
        "saves": saved["saves"],
        "step_s": without["step_s"],
        "step_beside_saves_s": saved["step_s"],
        "held_up_s": saved["saving_s"] / saved["saves"],
        "ends": [],
    }
    for cache in (None, os.path.join(folder, "programs")):
        for number in (signal.SIGTERM, signal.SIGKILL):
            name = f"{number.name}-{'cached' if cache else 'anew'}"
            settings = {"steps": 10_000, "evaluate_every": 10_000, "save_minutes": minutes}
            ended = interrupt(Training(folder, name, cache), number, **settings)
            found["ends"].append({"programs": "cached" if cache else "compiled anew", **ended})
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, prints and writes --output."""
    parser = Parser(description="What saving costs a training.", allow_abbrev=False)
    parser.add_argument("--width", type=count, default=512, help="of the model, in 64 a head")
    parser.add_argument("--layers", type=count, default=6, help="of encoder and decoder")
    parser.add_argument("--batch_size", type=count, default=8)
    parser.add_argument(
        "--steps", type=count, default=60, help="of the runs that end by themselves"
    )
    parser.add_argument("--output", default="saving.json")
    options = parser.parse_args(argv)
    if options.width % 64:
        parser.error(f"--width={options.width}: expected a multiple of 64")
    with tempfile.TemporaryDirectory() as folder:
        write_task(
            folder, width=options.width, layers=options.layers, batch_size=options.batch_size
        )
        result = {"machine": {**cpu(), "cores": cores()}, **measure(folder, options.steps)}
    write_json(options.output, result)
    print(
        f"a step {result['step_s']:.3f} s, beside saves {result['step_beside_saves_s']:.3f} s; "
        f"{result['saves']} saves of {result['bytes'] / 1e6:.0f} MB hold up the steps "
        f"{result['held_up_s']:.2f} s each"
    )
    for row in result["ends"]:
        print(
            f"{row['signal']}, programs {row['programs']}: {row['lost']} steps lost, ends after "
            f"{row['end_s']:.1f} s, a new step {row['new_step_s']:.1f} s after it goes on"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
