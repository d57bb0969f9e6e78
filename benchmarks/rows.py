"""A run over many examples: memory of its process, seconds to the end of its first step.

    python benchmarks/rows.py --rows=10000000

Makes a JSON Lines file of random sentences, and has `python -m l2s_jax.main` train a tiny LLM for
one step on it: it reads, hashes and tokenizes all of them first. Then a second run goes on for one
step more, with what the first left in the workdir. Said are the most memory of its own that the
process had, and the most of files that are mapped into it, which the system takes back when it
needs room. Files lie in a temporary directory (--directory, and TMPDIR of the run).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from sentences import write_task

from l2s_jax.arguments import Parser, count
from l2s_jax.bench.machine import cores, cpu
from l2s_jax.files import write_json

_MODEL = {
    "width": 32,
    "num_heads": 2,
    "head_width": 16,
    "feed_forward_width": 64,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
_TRAIN = {"steps": 1, "warmup_steps": 0, "evaluate_every": 1, "batch_size": 32}


def memory(process: int) -> tuple[int, int]:
    """Bytes of its own, and of files, that a process has in memory; zeros once it is gone."""
    found = {"RssAnon": 0, "RssFile": 0}
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name in found:
                    found[name] = int(value.split()[0]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found["RssAnon"], found["RssFile"]


def run(folder: str, config: str, steps: int) -> dict[str, float]:
    """What a run of a config takes to the end of so many steps.

    Raises:
      RuntimeError: it failed.
    """
    command = [sys.executable, "-m", "l2s_jax.main", f"--config={config}", "--until=llm"]
    command += [f"--workdir={folder}/run", f"--config.llm.train.steps={steps}"]
    began, own, mapped = time.monotonic(), 0, 0
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": folder})
    while process.poll() is None:
        now = memory(process.pid)
        own, mapped = max(own, now[0]), max(mapped, now[1])
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the run ended with status {process.returncode}")
    return {"seconds": time.monotonic() - began, "own_mb": own / 1e6, "mapped_mb": mapped / 1e6}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs it, and writes --output."""
    parser = Parser(description="A run over many examples.", allow_abbrev=False)
    parser.add_argument("--rows", type=count, default=1_000_000)
    parser.add_argument("--directory", default=None, help="where files are written")
    parser.add_argument("--output", default="rows.json")
    options: argparse.Namespace = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        config = write_task(folder, options.rows, model=_MODEL, train=_TRAIN)
        first, again = (run(folder, config, steps) for steps in (1, 2))
    machine = {**cpu(), "cores": cores()}
    write_json(options.output, {"rows": options.rows, "machine": machine, **first, "again": again})
    for name, taken in (("one step", first), ("another, by a second run", again)):
        print(
            f"{options.rows} rows: {taken['seconds']:.0f} s to the end of {name}; at most "
            f"{taken['own_mb']:.0f} MB of its own, {taken['mapped_mb']:.0f} MB of files"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
