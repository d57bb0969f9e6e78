"""Kills at every call by which a run changes files, and how it continues from there.

python tests/kills.py --folder=DIR [--stages=A,B] [--part=I/N] [--whole]

A tiny run of all stages is recorded: kills.c copies its folders before each call that changes a
file, whoever makes it, Python, Orbax or TensorStore. Such a copy is what a kill at that call would
leave: what a process has written stays, whether it ends or not. The run is continued from each, and
has to end with the files of the run that nobody has killed.

A continuation goes to the end of the stage whose file it was, since what follows is made from
files that are the same; with --whole it goes to the report. --stages and --part take some of
the calls. The record is kept in --folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import xla

TESTS = Path(__file__).parent
# In the order in which they are made; what lies in no folder of theirs is of the last.
STAGES = (
    "tokenizer", "llm", "labels", "vocabulary", "logits", "slm", "features", "l2s", "evaluation",
)  # fmt: skip
# Compiled programs are shared by all runs.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": xla.flags(),
}
# What only a whole run has, or whose times are all that is in it.
_WHOLE = ("README.md", "hashes.json", "time.json")
_TIMES = re.compile(
    r"time(_\w+)?|latency\w*|environment|wall_time|.*speedup.*|.*_s|.*_ms|mfu|data_wait|\w+_per_\w+"
)


class Call(NamedTuple):
    """The `number`-th call that changes a file; `path` from the root."""

    number: int
    kind: str
    path: str


class Runs:
    """A folder with the data of a tiny run, its workdir, and its feature cache."""

    def __init__(self, folder: Path):
        import tiny

        self.folder, self.root, self.copies = folder, folder / "root", folder / "copies"
        self.config = tiny.write_task(folder / "data")
        self.copies.mkdir(exist_ok=True)
        self.library = folder / "kills.so"
        source = TESTS / "kills.c"
        command = ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", self.library, source]
        subprocess.run([*command, "-ldl", "-lpthread"], check=True)

    @property
    def arguments(self) -> list[str]:
        """Of the command: a task of all stages that make files, in few steps."""
        train = ("steps=2", "evaluate_every=1", "save_minutes=0")
        return [
            f"--config={self.config}",
            f"--workdir={self.root / 'run'}",
            f"--config.features.cache={self.root / 'features'}",
            "--config.labels.source=llm",
            "--config.labels.max_new_tokens=8",
            "--config.slm.vocabulary=task",
            "--config.distillation.weight=0.5",
            "--config.evaluation.latency.repeats=1",
            *(f"--config.{name}.train.{one}" for name in ("llm", "slm", "l2s") for one in train),
        ]

    def process(self, **settings: Any) -> tuple[int, list[Call]]:
        """A run of its own, from nothing, under kills.c: its exit status and its calls."""
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        log = self.folder / "calls.txt"
        log.unlink(missing_ok=True)
        settings = {
            "LD_PRELOAD": self.library,
            "KILLS_ROOT": self.root,
            "KILLS_LOG": log,
        } | settings
        done = subprocess.run(
            [sys.executable, "-m", "l2s_jax.main", *self.arguments],
            cwd=TESTS.parent,
            env={**os.environ, **{key: str(value) for key, value in settings.items()}},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode not in (0, -9):
            raise RuntimeError(done.stderr)
        lines = (line.split(" ", 2) for line in log.read_text().splitlines())
        return done.returncode, [Call(int(n), kind, path) for n, kind, path in lines]

    def restore(self, number: int) -> None:
        """What a kill at a call would leave, in its place."""
        shutil.rmtree(self.root)
        subprocess.run(["cp", "-a", self.copies / str(number), self.root], check=True)

    def proceed(self, until: str) -> None:
        """Continues in this process, to the end of a stage."""
        import tiny

        ends = [] if until == "evaluation" else [f"--until={until}"]
        said = io.StringIO()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = tiny.run(*self.arguments, *ends)
        if status:
            raise AssertionError(f"exit status {status}: {said.getvalue()}")


def stage_of(path: str) -> str:
    """The stage that a path from the root belongs to; "" for files of several."""
    first, _, rest = path.strip("/").partition("/")
    name = first if first == "features" else rest.partition("/")[0]
    if name in STAGES:
        return name
    return "evaluation" if re.match(r"predictions|report|quality", name) else ""


def stages_of(calls: list[Call]) -> list[str]:
    """The stage that is under way at each call: one that has a file already, or gets the next."""
    found = [stage_of(call.path) for call in calls]
    reached, stages = STAGES[-1], []
    for name in reversed(found):
        reached = name or reached
        stages.append(reached)
    return stages[::-1]


def digest(path: Path) -> str:
    """Of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def state(root: Path) -> str:
    """A hash of all that lies in a folder."""
    lines = [
        f"{path.relative_to(root)} {digest(path) if path.is_file() else ''}"
        for path in sorted(root.rglob("*"))
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def timeless(value: Any) -> Any:
    """JSON without what a clock says."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not _TIMES.fullmatch(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def results(root: Path) -> dict[str, Any]:
    """By path: what has to be the same whenever a run is killed.

    That is all but for times: a report's, and its pictures', those of metrics, and the names of
    pieces of checkpoints, which Orbax draws at random. Of checkpoints the steps count, and the
    models that are made of them.
    """
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_dir() or "tfevents" in name or re.search(r"quality_latency|report.md", name):
            continue
        if step := re.match(r"(.*/checkpoints/[^/]*)/", name):
            found[step[1]] = ""
        elif name.endswith(_WHOLE):
            found[name] = ""
        elif path.name in ("metrics.jsonl", "report.json", "stage.json"):
            text = path.read_text()
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[name] = [timeless(json.loads(line)) for line in lines]
            for line in found[name]:
                # A name drawn at random, and a hash of all.
                line.pop("run", None), line.pop("sha256", None)
        else:
            found[name] = digest(path)
    return found


def compare(found: dict[str, Any], expected: dict[str, Any], until: str) -> None:
    """An error that names a file which is not as it has to be, up to a stage."""
    made = STAGES[: STAGES.index(until) + 1]
    last = until == STAGES[-1]

    for path in sorted(found.keys() | expected.keys()):
        if path.endswith((".tmp", ".lock", ".lock.json", ".shared")) or ".old" in path:
            raise AssertionError(f"{path} is left")
        is_compared = last or (stage_of(path) in made and not path.endswith(_WHOLE))
        if is_compared and found.get(path) != expected.get(path):
            raise AssertionError(
                f"{path}: {found.get(path, 'missing')}, expected {expected.get(path, 'nothing')}"
            )


def record(runs: Runs, every: int = 1) -> tuple[list[Call], dict[str, Any]]:
    """The calls of a run that nobody kills, a copy at each or some, and what it ends with."""
    status, calls = runs.process(KILLS_COPIES=runs.copies, KILLS_EVERY=every)
    if status:
        raise RuntimeError(f"exit status {status}")
    return calls, results(runs.root)


def distinct(runs: Runs, calls: list[Call]) -> dict[int, str]:
    """The stage under way by the number of a call, of those that leave another state each."""
    stages, seen, found = stages_of(calls), set(), {}
    for call, stage in zip(calls, stages, strict=True):
        copy = runs.copies / str(call.number)
        if copy.exists() and (key := state(copy)) not in seen:
            seen.add(key)
            found[call.number] = stage
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--part", default="0/1", help="of the calls, as in 2/5, from 0")
    parser.add_argument("--stages", default=",".join(STAGES), help="that are killed")
    parser.add_argument("--whole", action="store_true", help="continue to the report each time")
    parser.add_argument("--folder", type=Path, required=True, help="where a record is, or will be")
    flags = parser.parse_args()
    os.environ.update(ENVIRONMENT, JAX_COMPILATION_CACHE_DIR=str(flags.folder / "programs"))
    flags.folder.mkdir(parents=True, exist_ok=True)
    runs, kept = Runs(flags.folder), flags.folder / "record.json"
    if not kept.exists():
        calls, expected = record(runs)
        kept.write_text(json.dumps([calls, expected, distinct(runs, calls)]))
    calls, expected, found = json.loads(kept.read_text())
    kinds = collections.Counter(kind for _, kind, _ in calls)
    print(f"{len(calls)} calls ({', '.join(f'{n} {k}' for k, n in kinds.most_common())}),")
    print(f"{len(found)} states: {dict(collections.Counter(found.values()))}", flush=True)
    part, parts = map(int, flags.part.split("/"))
    began, failed = time.monotonic(), 0
    chosen = [number for number, stage in found.items() if stage in flags.stages.split(",")]
    chosen = chosen[part::parts]
    for number in chosen:
        until = "evaluation" if flags.whole else found[number]
        runs.restore(int(number))
        try:
            runs.proceed(until)
            compare(results(runs.root), expected, until)
        except AssertionError as error:
            failed += 1
            print(f"{calls[int(number) - 1]}: {error}", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(chosen)} continued in {seconds:.0f} s, {failed} not as they should", flush=True)
    os._exit(bool(failed))


if __name__ == "__main__":
    main()
