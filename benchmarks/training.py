"""One training step of L2S, ours beside transformers with PyTorch, on the same random batch.

    python benchmarks/training.py --llm=t5-large --slm=t5-small --batch_size=8
    python benchmarks/training.py --batch_size=64 --dtype=bfloat16 --compiled --steps=5 --together

The frozen LLM encodes, projector and SLM are updated by AdamW with clipped gradients and dropout.
Weights are random, of the published geometry. Those that are trained are float32, their products
are in --dtype; the LLM's weights and products are in --encoder_dtype. A GPU may take TF32 for
float32 products, on either side. All rows are full, but masks are passed, as real batches need
them.

PyTorch has its fused AdamW, autocast, and scaled_dot_product_attention in transformers. It draws a
number for every element that dropout may drop; ours draws one for all positions of a row, as the
reference T5 does.

Each side has a process of its own, and they take turns. Whoever waits is stopped, so that its idle
threads take nothing. Times are medians over turns of --steps steps, at the end of which the device
has finished. Needs torch and transformers.

Exit status: 0; 1 where ours could not be measured; 2 for bad input. A peer that could not be
measured is named with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from training_sides import EAGER, MODES, OURS, make, names_of

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.contest import quartiles
from l2s_jax.bench.remote import end_with_parent
from l2s_jax.files import finite, write_json
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.models.t5 import T5Config


def serve(name: str, arguments: argparse.Namespace, pipe: Connection) -> None:
    """A side's process: makes its step, then answers each number of steps with their time."""
    end_with_parent()
    os.dup2(2, 1)  # libraries may print; the table is the parent's
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            step = make(name, arguments)
            began = time.perf_counter()
            first = step.run(1)
            compile_s = time.perf_counter() - began
            pipe.send({"compile_s": compile_s, "first_loss": first, **step.facts})
            while steps := pipe.recv():
                began = time.perf_counter()
                loss = step.run(steps)
                milliseconds = (time.perf_counter() - began) * 1e3 / steps
                pipe.send({"ms": milliseconds, "loss": loss, "peak_bytes": step.peak_bytes()})
        except (EOFError, BrokenPipeError):
            raise
        except Exception as error:  # whatever a library fails with is its result
            message = " ".join(str(error).split())[:200]
            pipe.send({"error": f"{type(error).__name__}: {message}"})


class Side:
    """A side's process, stopped while nothing is asked of it."""

    def __init__(self, name: str, arguments: argparse.Namespace):
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=serve, args=(name, arguments, far))
        self._process.start()
        far.close()

    def answer(self, deadline: float = math.inf) -> dict[str, Any]:
        """What it says, and then it is stopped.

        Raises:
          RuntimeError: it failed, its process ended, or it had said nothing by `deadline`, on the
            clock of `time.monotonic`.
        """
        left = None if math.isinf(deadline) else max(deadline - time.monotonic(), 0.0)
        if not self._pipe.poll(left):
            raise RuntimeError("not ready in time")
        try:
            found = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise RuntimeError(f"its process ended ({self._process.exitcode})") from None
        if "error" in found:
            raise RuntimeError(found["error"])
        self._signal("SIGSTOP")
        return found

    def ask(self, steps: int) -> dict[str, Any]:
        """The time of so many steps; raises as `answer` does."""
        self._signal("SIGCONT")
        with contextlib.suppress(BrokenPipeError):  # `answer` says how it ended
            self._pipe.send(steps)
        return self.answer()

    def close(self) -> None:
        """Ends the process, stopped or not."""
        self._process.kill()
        self._process.join()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):  # else it goes on, and waits beside the others
            os.kill(self._process.pid, getattr(signal, name))


class Contest:
    """All sides and what was found: their facts, their times, and why some are not measured."""

    def __init__(self, names: Sequence[str], arguments: argparse.Namespace):
        self._arguments = arguments
        self._names = list(names)
        self._sides: dict[str, Side] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self.turns: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        self.failures: dict[str, str] = {}

    def run(self) -> None:
        """Measures everybody; the file is complete after each round of turns."""
        try:
            self._start()
            for repeat in range(self._arguments.repeats + 1):
                for name in list(self._sides):
                    with self._failing(name):
                        found = self._sides[name].ask(self._arguments.steps)
                        if not math.isfinite(found["loss"]):
                            raise RuntimeError(f"its loss is {found['loss']}")
                        if repeat:  # the first is one more warm-up
                            self.turns[name].append(found)
                if repeat:
                    self.write()
        finally:
            for side in self._sides.values():
                side.close()
        self.write()

    def _start(self) -> None:
        """Makes all steps ready: one side after another, or all at the same time."""
        deadlines: dict[str, float] = {}
        waves = [self._names] if self._arguments.together else [[name] for name in self._names]
        for wave in waves:
            for name in wave:
                self._sides[name] = Side(name, self._arguments)
                deadlines[name] = time.monotonic() + (self._arguments.ready_s or math.inf)
            for name in wave:
                with self._failing(name):
                    self.facts[name] = self._sides[name].answer(deadlines[name])

    @contextlib.contextmanager
    def _failing(self, name: str) -> Any:
        """Who fails takes no further part, and what it holds does not disturb the others."""
        try:
            yield
        except RuntimeError as error:
            self.failures[name] = str(error)
            self._sides.pop(name).close()
            self.turns[name].clear()

    def rows(self) -> list[dict[str, Any]]:
        """A record for each side that was measured."""
        ours = self.facts.get(OURS, {})
        tflop, peak = ours.get("tflop"), ours.get("peak_flops")
        sizes = self._arguments
        tokens = sizes.batch_size * (sizes.prompt_tokens + sizes.response_tokens)
        times = {n: [turn["ms"] for turn in turns] for n, turns in self.turns.items() if turns}
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows = []
        for name, values in times.items():
            step_ms = medians[name]
            rate = tflop / step_ms * 1e3 if tflop else None
            held = self.turns[name][-1]["peak_bytes"]
            rows.append(
                {
                    "name": name,
                    "step_ms": step_ms,
                    "quartiles_ms": quartiles(values),
                    "tokens_per_s": tokens / step_ms * 1e3,
                    "tflops": rate,
                    "mfu": rate * 1e12 / peak if rate and peak else None,
                    "speedup": medians[EAGER] / step_ms if EAGER in medians else None,
                    "peak_gb": held / 1e9 if held else None,
                    **self.facts[name],
                }
            )
        return rows

    def write(self) -> None:
        """Replaces the file as a whole, where one is asked for."""
        path = self._arguments.output
        if not path:
            return
        found = {
            "arguments": vars(self._arguments),
            "rows": self.rows(),
            "not_measured": self.failures,
        }
        write_json(path, finite(found))


def print_table(rows: Sequence[Mapping[str, Any]], failures: Mapping[str, str]) -> None:
    """As Markdown; after it who is not measured."""
    print("| | step ms | quartiles | tokens/s | TFLOP/s | of peak | speedup | GB | compile s |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        first, third = row["quartiles_ms"]
        cells = (
            row["name"],
            milliseconds(row["step_ms"]),
            f"{milliseconds(first)} to {milliseconds(third)}",
            f"{row['tokens_per_s']:.0f}",
            f"{row['tflops']:.3g}" if row["tflops"] else "-",
            f"{row['mfu']:.1%}" if row["mfu"] else "-",
            f"{row['speedup']:.2f}" if row["speedup"] else "-",
            f"{row['peak_gb']:.1f}" if row["peak_gb"] else "-",
            f"{row['compile_s']:.1f}",
        )
        print(f"| {' | '.join(cells)} |")
    for name, reason in failures.items():
        print(f"{name}: not measured: {reason}")


def milliseconds(value: float) -> str:
    """In a table, to four digits or more."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def geometry(text: str) -> str:
    """The name of a published T5: PyTorch's side has no other family."""
    names = [name for name, config in GEOMETRIES.items() if isinstance(config, T5Config)]
    if text not in names:
        raise argparse.ArgumentTypeError(f"no geometry {text!r}, expected one of {names}")
    return text


def modes(text: str) -> list[str]:
    """ "default,max-autotune-no-cudagraphs" -> a list of MODES."""
    for mode in text.split(","):
        if mode not in MODES:
            raise argparse.ArgumentTypeError(f"mode {mode!r}, expected some of {', '.join(MODES)}")
    return list(dict.fromkeys(text.split(",")))


def json_file(text: str) -> str:
    """A file in a folder that is there."""
    if not os.path.isdir(os.path.dirname(os.path.abspath(text))):
        raise argparse.ArgumentTypeError(f"{text!r}: no such folder")
    return text


def main(argv: Sequence[str]) -> int:
    """Prints a table; writes --output where it is given. The exit status."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--llm", type=geometry, default="t5-large")
    add("--slm", type=geometry, default="t5-small")
    add("--batch_size", type=count, default=8)
    add("--prompt_tokens", type=count, default=128)
    add("--response_tokens", type=count, default=64)
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--encoder_dtype", choices=("auto", "bfloat16"), default="auto", help="auto: as --dtype")
    add("--threads", type=count, default=0, help="of PyTorch (default: its own choice)")
    add("--repeats", type=count, default=7, help="turns of each side")
    add("--steps", type=count, default=1, help="of a turn, the device's end awaited once")
    add("--compiled", type=modes, nargs="?", const=MODES[:1], default=(), help="also torch.compile")
    add("--scan_layers", action="store_true", help="ours: layers as a loop, faster to compile")
    add("--together", action="store_true", help="all get ready at once, on many cores")
    add("--ready_s", type=count, help="seconds for a side to get ready, else it is not measured")
    add("--output", type=json_file, default="", help="a JSON file")
    arguments = parser.parse_args(argv)

    # So that a side does not outlive this process, which ends as after any other error.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    contest = Contest(names_of(arguments.compiled), arguments)
    contest.run()
    print_table(contest.rows(), contest.failures)
    if OURS in contest.failures:
        print(f"error: {OURS}: {contest.failures[OURS]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
