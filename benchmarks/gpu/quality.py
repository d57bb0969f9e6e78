"""The part *quality*: Multi30k English-German with an LLM of 60M parameters, for three seeds.

    python -m benchmarks.gpu.quality --output=quality.json [--limit_s=240]

Each seed is a run of `python -m l2s_jax.main` with configs/multi30k_en_de_60m.py. Its workdir is in
the folder `quality` beside the output. A run that is stopped at the limit goes on from its
checkpoints when this is called again, and one that has its report is not made again.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.gpu import part

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
CONFIG, DATA = "configs/multi30k_en_de_60m.py", "data/multi30k"
SEEDS = (0, 1, 2)
# What a training needs beyond what the other parts do.
NEEDED = ("array_record", "grain", "ml_collections", "qwix", "rouge_score", "tensorboardX")
# Seconds: what a run has to end after an interrupt, how often its state is read, and what it takes
# to get anywhere at all.
GRACE_S, POLL_S, LEAST_S = 10.0, 5.0, 20.0
TRAINED = ("llm", "slm", "l2s")
NAMES = {"llm": "LLM", "slm": "SLM alone", "l2s": "L2S", "l2s_mismatched": "L2S, mismatched"}
COLUMNS = (
    "seed", "system", "parameters", "BLEU", "chrF", "cut", "ms per request", "ms per token",
    "ms of a batch", "times the LLM's speed",
)  # fmt: skip
NOTE = (
    "The test split of 2016, greedy. Times are those of one request of random tokens, and of a "
    "batch. Mismatched is the control: L2S fed the LLM's representations of another prompt."
)
# The same with models, lengths and texts that take seconds on a CPU.
TINY = {
    "width": 16,
    "num_heads": 2,
    "head_width": 8,
    "feed_forward_width": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
}
BRIEF = {"steps": 2, "batch_size": 8, "evaluate_every": 2, "log_every": 2, "warmup_steps": 1}
REHEARSED_FLAGS = (
    *(f"--config.{name}.model.{key}={TINY[key]}" for name in ("llm", "slm") for key in TINY),
    *(f"--config.{name}.train.{key}={BRIEF[key]}" for name in TRAINED for key in BRIEF),
    "--config.tokenizer.train_vocab_size=30",
    "--config.max_prompt_tokens=12",
    "--config.max_response_tokens=12",
    "--config.buckets=((12,12),)",
    "--config.l2s.projector_width=16",
    "--config.labels.batch_size=16",
    "--config.decoding.max_new_tokens=12",
    "--config.decoding.batch_size=16",
    "--config.evaluation.latency.batch_size=1",
    "--config.evaluation.latency.prompt_tokens=12",
    "--config.evaluation.latency.new_tokens=12",
    "--config.evaluation.latency.repeats=2",
)


def write_texts(folder: str) -> None:
    """Pairs of lines as in Multi30k's files, the German one a cipher of the English one."""
    chance = random.Random(0)
    words = ["".join(chance.choices("abcdefgh", k=3)) for _ in range(12)]
    os.makedirs(folder, exist_ok=True)
    for split, pairs in (("train", 64), ("val", 16), ("test_2016_flickr", 16)):
        lines = [" ".join(chance.choices(words, k=3)) for _ in range(pairs)]
        for language, text in (("en", lines), ("de", [line[::-1] for line in lines])):
            path = os.path.join(folder, f"{split}.{language}.gz")
            with gzip.open(path, "wt", encoding="utf-8") as file:
                file.write("\n".join(text) + "\n")


def command(folder: str, seed: int, rehearse: bool) -> list[str]:
    """The words of a seed's run."""
    return [
        *(sys.executable, "-m", "l2s_jax.main"),
        f"--config={CONFIG}",
        f"--workdir={workdir(folder, seed)}",
        f"--config.seed={seed}",
        # A run that goes on, and the next seed, need not compile the same again.
        f"--compilation_cache={os.path.join(folder, 'compiled')}",
        *((f"--config.task.data_dir={folder}/data", *REHEARSED_FLAGS) if rehearse else ()),
    ]


def workdir(folder: str, seed: int) -> str:
    """Of a seed."""
    return os.path.join(folder, f"seed{seed}")


def run(folder: str, seed: int, rehearse: bool, limit_s: float) -> Iterator[str]:
    """Runs a seed; gives "" now and then while it does, at last the reason where it failed.

    At the limit it is interrupted, which is no failure.
    """
    # In the background a shell has its commands ignore interrupts, and all that these start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    words = command(folder, seed, rehearse)
    print("+", *words, flush=True)
    began = time.monotonic()
    log = os.path.join(folder, f"seed{seed}.log")
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            while (left := limit_s - (time.monotonic() - began)) > 0:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    yield _reason(process.wait(min(left, POLL_S)), log)
                    return
                yield ""
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
        finally:
            process.kill()
            process.wait()


def _reason(status: int, log: str) -> str:
    if not status:
        return ""
    with open(log, encoding="utf-8", errors="replace") as file:
        return f"{part.last_error(file.read())} ({status})"


def report_of(directory: str) -> dict[str, Any] | None:
    """The report of a run that has ended, None where its newest run has not."""
    paths = [os.path.join(directory, name) for name in ("config.json", "report.json")]
    with contextlib.suppress(OSError):
        begun, ended = (os.path.getmtime(path) for path in paths)
        return part.read_json(paths[1]) if begun <= ended else None
    return None


def metrics_of(directory: str, stage: str) -> list[dict[str, Any]]:
    """The whole lines of a stage's metrics.jsonl."""
    lines = []
    path = os.path.join(directory, stage, "metrics.jsonl")
    with contextlib.suppress(OSError, ValueError), open(path, encoding="utf-8") as file:
        for line in file:
            lines.append(json.loads(line))
    return lines


def state_of(directory: str) -> str:
    """At which stage and step a run that has not ended stands."""
    config = part.read_json(os.path.join(directory, "config.json"))
    if config is None:
        return "not begun"
    for stage in TRAINED:
        if os.path.isdir(os.path.join(directory, stage, "model")):
            continue
        labels = os.path.join(directory, "labels")
        lines = metrics_of(directory, stage)
        if stage == "slm" and not lines and os.path.isdir(labels):
            count = sum(name.endswith(".jsonl") for name in os.listdir(labels))
            return f"labels, {count} files"
        step = lines[-1]["step"] if lines else 0
        saved = _last_checkpoint(os.path.join(directory, stage, "checkpoints"))
        return f"{stage}, step {step} of {config[stage]['train']['steps']}, saved at {saved}"
    return "evaluation"


def _last_checkpoint(directory: str) -> int:
    """Its step; 0 where there is none."""
    with contextlib.suppress(FileNotFoundError):
        return max((int(name) for name in os.listdir(directory) if name.isdecimal()), default=0)
    return 0


def cells(seed: int, name: str, report: Mapping[str, Any]) -> list[Any]:
    """A row of the table of all seeds."""
    system = report["systems"][name]
    one, batch = system["latency"], system["latency_batch"]
    llm = report["systems"]["llm"]["latency"]
    return [
        *(seed, NAMES[name], system["params"]),
        *(system["quality"]["bleu"], system["quality"]["chrf"], system["cut_share"]),
        *(one["total_ms"], one["decode_ms_per_token"], batch["total_ms"]),
        llm["total_ms"] / one["total_ms"],
    ]


def tell(result: part.Result, folder: str, seeds: tuple[int, ...]) -> None:
    """Writes the tables as things stand."""
    rows, training = [], []
    found: dict[str, list[list[Any]]] = {name: [] for name in NAMES}
    for seed in seeds:
        directory = workdir(folder, seed)
        if report := report_of(directory):
            result.data["reports"][seed] = report
            for name in NAMES:
                found[name].append(cells(seed, name, report))
            rows += [found[name][-1] for name in NAMES]
        else:
            state = f"not finished: {state_of(directory)}"
            rows.append([seed, state, *[None] * (len(COLUMNS) - 2)])
        for stage in TRAINED:
            timed = [line for line in metrics_of(directory, stage) if "step_ms" in line]
            if timed:
                names = ("step", "step_ms", "tokens_per_s", "mfu", "data_wait", "compile_s")
                training.append([seed, NAMES[stage], *(timed[-1].get(name) for name in names)])
    result.table("Quality of each seed", COLUMNS, rows, NOTE)
    means = [
        [
            *(NAMES[name], len(values)),
            *(statistics.fmean(column) for column in list(zip(*values, strict=True))[3:]),
            "{:.1f} to {:.1f}".format(*(end(row[3] for row in values) for end in (min, max))),
        ]
        for name, values in found.items()
        if values
    ]
    columns = ("system", "seeds", *COLUMNS[3:], "BLEU, worst to best")
    result.table("Quality, mean over the seeds that have ended", columns, means)
    columns = (
        "seed", "system", "step", "step ms", "tokens/s", "of peak", "waiting for batches",
        "compile s",
    )  # fmt: skip
    note = "Each system's last line of times; tokens are real ones, without padding."
    result.table("Training of these models", columns, training, note)


def missing(rehearse: bool) -> str:
    """What is not there that a run needs."""
    if packages := part.missing(NEEDED):
        return f"missing packages: {', '.join(packages)}"
    if not rehearse and not (ROOT / DATA).is_dir():
        return f"no folder {DATA}; {CONFIG} says where its files are from"
    return ""


def main() -> int:
    """Runs one seed after another; the exit status."""
    began = time.monotonic()
    options = part.arguments(__doc__.splitlines()[0])
    result = part.Result(options.output)
    result.data["reports"] = {}
    seeds = SEEDS[:1] if options.rehearse else SEEDS
    folder = os.path.join(os.path.dirname(os.path.abspath(options.output)), "quality")
    os.makedirs(folder, exist_ok=True)
    if options.rehearse:
        write_texts(os.path.join(folder, "data"))
    failures: list[str] = []
    if reason := missing(options.rehearse):
        result.skip("quality", reason)
        seeds = ()
    tell(result, folder, seeds)
    for seed in seeds:
        if report_of(workdir(folder, seed)):
            continue
        left = options.limit_s - GRACE_S - (time.monotonic() - began)
        if failures or left < LEAST_S:
            break
        for problem in run(folder, seed, options.rehearse, left):
            tell(result, folder, seeds)
            if problem:
                failures.append(f"seed {seed}: {problem}")
        tell(result, folder, seeds)  # what it saved at last
    return part.finish(result, failures)


if __name__ == "__main__":
    sys.exit(main())
