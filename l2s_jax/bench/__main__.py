"""Measures L2S, its LLM and SLM and other libraries' on one machine, in one run.

python -m l2s_jax.bench --llm=t5-large --slm=t5-small --peers=hf,ct2 --output=bench.json

--llm and --slm name a folder in Hugging Face's format or a published geometry, of which a
checkpoint with random weights is made. Every contestant has a process of its own; they take turns,
in an order drawn for each repeat, and what is reported are medians. Beside FILE.json come FILE.md
and plots, and with --profile a trace. Exit status: 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from l2s_jax import convert
from l2s_jax.bench.arguments import count, integers
from l2s_jax.bench.contestants import BANDWIDTH, CONTESTANTS, OURS, PEERS, Case, Setup, unfit
from l2s_jax.bench.geometry import write_random
from l2s_jax.bench.remote import Remote
from l2s_jax.bench.report import write_report

log = logging.getLogger("l2s_jax")

_LIBRARIES = ("l2s_jax", "jax", "torch", "transformers", "ctranslate2")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _ours(text: str) -> list[str]:
    names = text.split(",") if text else []
    for name in names:
        if name not in OURS:
            expected = ", ".join(OURS)
            raise argparse.ArgumentTypeError(f"no {name!r}, expected some of {expected}")
    return list(dict.fromkeys(names))


def _peers(text: str) -> list[str]:
    """Names, or what names begin with: hf is hf-llm, hf-slm, and so on."""
    chosen: dict[str, None] = {}
    for word in text.split(",") if text else ():
        names = [name for name in PEERS if name == word or name.split("-")[0] == word]
        if not names:
            expected = ", ".join(("hf", "ct2", *PEERS))
            raise argparse.ArgumentTypeError(f"no {word!r}, expected some of {expected}")
        chosen.update(dict.fromkeys(names))
    return list(chosen)


def _json_file(text: str) -> str:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a .json file")
    return text


def _cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m l2s_jax.bench",
        description="Measures L2S, its LLM and SLM and other libraries' side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--llm", default="t5-large", help="folder of a checkpoint, or a published geometry")
    add("--slm", default="t5-small", help="likewise")
    add("--ours", type=_ours, default="l2s,l2s-bfloat16,llm,slm", help=f"of {', '.join(OURS)}")
    add("--peers", type=_peers, default="hf,ct2", help=f"hf, ct2, or of {', '.join(PEERS)}")
    add("--batch_sizes", type=integers, default="1,8,32", help="(default: %(default)s)")
    add("--prompt_tokens", type=integers, default="32,128,512", help="(default: %(default)s)")
    add("--new_tokens", type=integers, default="32,128,256", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all but int8")
    add("--repeats", type=count, default=5, help="of each case (default: %(default)s)")
    add("--threads", type=count, default=_cores(), help="CPU cores of each (default: all)")
    add("--output", type=_json_file, default="bench.json", help="(default: %(default)s)")
    add("--profile", action="store_true", help="also a trace of the first of --ours, last case")
    return parser


def run(options: argparse.Namespace) -> None:
    """Measures everything that the options ask for, and writes the report."""
    cases = [
        Case(*shape)
        for shape in itertools.product(
            options.batch_sizes, options.prompt_tokens, options.new_tokens
        )
    ]
    stem = options.output.removesuffix(".json")
    os.makedirs(os.path.dirname(os.path.abspath(stem)), exist_ok=True)
    with contextlib.ExitStack() as stack:
        setup, weights = _setup(options, stack.enter_context(tempfile.TemporaryDirectory()))
        traced = [name for name in options.ours if not unfit(name, setup, cases[-1])][:1]
        if options.profile and not traced:
            raise ValueError("--profile: expected one of --ours that fits the last case")
        contest = _Contest(setup, options.repeats, stack)
        for name in (*options.ours, *options.peers, BANDWIDTH):
            contest.start(name, cases)
        report = {
            "llm": options.llm,
            "slm": options.slm,
            "dtype": options.dtype,
            "weights": weights,
            "repeats": options.repeats,
            "not_measured": contest.failures,
        }
        rows: list[dict[str, Any]] = []
        for case in tqdm(cases, desc="cases", file=sys.stderr):
            rows += contest.measure(case)
            if rows:
                # Whatever stops a long run, the cases before it are there.
                found = {"environment": _environment(contest.device, options.threads)}
                write_report({**report, **found, "rows": rows, "floor": _floor(rows)}, stem)
        if not rows:
            reasons = (f"{name}: {reason}" for name, reason in contest.failures.items())
            raise ValueError(f"nobody was measured ({'; '.join(reasons)})")
        for name in traced if options.profile else ():
            contest.ask(name, "trace", os.path.abspath(f"{stem}-trace"))


def _setup(options: argparse.Namespace, folder: str) -> tuple[Setup, str]:
    """What all share, and what the weights are."""
    paths, weights, configs = {}, {}, {}
    for name in ("llm", "slm"):
        given = getattr(options, name)
        real = os.path.isdir(given)
        paths[name] = given if real else os.path.join(folder, name)
        weights[name] = "of the checkpoint" if real else "random, of real geometry"
        if not real:
            write_random(given, paths[name])
        configs[name] = convert.read_config(paths[name])
    setup = Setup(
        **paths,
        dtype=options.dtype,
        threads=options.threads,
        folder=folder,
        vocab_size=min(config.vocab_size for config in configs.values()),
        real_weights=set(weights.values()) == {"of the checkpoint"},
        **{f"{name}_positions": getattr(c, "max_positions", None) for name, c in configs.items()},
    )
    if len(set(weights.values())) == 1:
        return setup, weights["llm"]
    return setup, ", ".join(f"{name.upper()}: {kind}" for name, kind in weights.items())


class _Contest:
    """The processes of all contestants, and why some are not measured."""

    def __init__(self, setup: Setup, repeats: int, stack: contextlib.ExitStack):
        """The stack ends the processes."""
        self.failures: dict[str, str] = {}
        self.device: dict[str, Any] = {}  # what ours run on, once a case has been measured
        self._setup, self._repeats, self._stack = setup, repeats, stack
        self._remotes: dict[str, Remote] = {}
        self._order = random.Random(0)

    def start(self, name: str, cases: Sequence[Case]) -> None:
        """Makes a contestant in a process of its own, if it is fit for one of the cases."""
        reasons = [unfit(name, self._setup, case) for case in cases]
        if all(reasons):
            self.failures[name] = reasons[0]
            return
        self._remotes[name] = Remote()
        self._stack.callback(self._remotes[name].close)
        self.ask(name, "start", name, dataclasses.asdict(self._setup))

    def ask(self, name: str, *request: Any) -> dict[str, Any] | None:
        """A contestant's answer, None if it failed: then it takes no further part.

        Raises:
          ValueError: one of ours failed. Another library that cannot do it is a result.
        """
        try:
            return self._remotes[name].ask(*request)
        except RuntimeError as error:
            if name in (*OURS, BANDWIDTH):
                raise ValueError(f"{name}: {error}") from error
            log.warning("%s: not measured: %s", name, error)
            self.failures[name] = str(error)
            # What it holds is not to disturb the others.
            self._remotes.pop(name).close()
            return None

    def measure(self, case: Case) -> list[dict[str, Any]]:
        """A record per contestant: the case, its facts, and medians of its measurements."""
        facts: dict[str, dict[str, Any]] = {}
        for name in list(self._remotes):
            if reason := unfit(name, self._setup, case):
                shape = "batch {}, {} prompt tokens, {} new tokens".format(*case)
                self.failures.setdefault(name, f"{shape}: {reason}")
            elif (found := self.ask(name, "prepare", *case)) is not None:
                facts[name] = found
        self.device = facts.pop(BANDWIDTH)
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in (*facts, BANDWIDTH)}
        for _ in range(self._repeats):
            # Not in one order: nobody always runs after the same one, in whose wake the caches are.
            for name in self._order.sample(list(samples), len(samples)):
                if (found := self.ask(name, "measure")) is None:
                    del samples[name]
                else:
                    samples[name].append(found)
        medians = {
            name: {key: statistics.median(s[key] for s in runs) for key in runs[0]}
            for name, runs in samples.items()
        }
        bandwidth = medians.pop(BANDWIDTH)["gb_per_s"]
        return [
            {**self._described(name, case), **facts[name], **times, **peak, "gb_per_s": bandwidth}
            | _derived(case, facts[name], times, bandwidth)
            for name, times in medians.items()
            if (peak := self._peak(name)) is not None
        ]

    def _described(self, name: str, case: Case) -> dict[str, Any]:
        library, arguments = CONTESTANTS[name].library, CONTESTANTS[name].arguments
        int8 = "int8" in (arguments.get("weights"), arguments.get("compute_type"))
        dtype = "int8" if int8 else self._setup.dtype
        return {
            "system": name,
            "dtype": dtype,
            "encoder_dtype": arguments.get("encoder_dtype", dtype),
            **case._asdict(),
            "version": metadata.version(library),
        }

    def _peak(self, name: str) -> dict[str, float] | None:
        found = self.ask(name, "memory")
        return found and {"peak_memory_mb": found["peak_bytes"] / 1e6}


def _derived(
    case: Case, facts: Mapping[str, float], times: Mapping[str, float], bandwidth: float
) -> dict[str, float]:
    derived = {"tokens_per_s": case.batch_size * case.new_tokens / times["total_ms"] * 1e3}
    if "bytes_read_per_token" in facts:
        derived["floor_ms_per_token"] = facts["bytes_read_per_token"] / bandwidth / 1e6
    return derived


def _floor(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median bandwidth, and of the first case the time in which it reads what a token needs."""
    floor = {"gb_per_s": statistics.median(row["gb_per_s"] for row in rows)}
    for name in ("l2s", "llm"):
        for first in itertools.islice((row for row in rows if row["system"] == name), 1):
            floor[f"{name}_ms_per_token"] = first["bytes_read_per_token"] / floor["gb_per_s"] / 1e6
    return floor


def _environment(device: Mapping[str, Any], threads: int) -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        **device,
        "cpu_cores": os.cpu_count(),
        "threads": threads,
        "python": sys.version.split()[0],
        **versions,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs; the exit status."""
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.profile and not options.ours:
        parser.error("--profile: expected one of ours in --ours")
    if options.threads > _cores():
        parser.error(f"--threads={options.threads}: expected at most {_cores()}, the cores here")
    # This process only makes checkpoints: the accelerator is left to those that are measured.
    jax.config.update("jax_platforms", "cpu")
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with open(options.output.removesuffix(".json") + ".md", encoding="utf-8") as file:
        print(file.read())
    return 0


if __name__ == "__main__":
    sys.exit(main())
