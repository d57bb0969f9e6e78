"""Measures L2S, its LLM and SLM and other libraries' on one machine, in one run.

python -m l2s_jax.bench --llm=t5-large --slm=t5-small --peers=hf,ct2 --output=bench.json

--llm and --slm name a folder in Hugging Face's format or a published geometry, of which a
checkpoint with random weights is made. Every contestant has a process of its own; they take turns,
repeat by repeat, and what is reported are medians. Beside FILE.json come FILE.md and plots, and
with --profile a trace. Exit status: 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from tqdm import tqdm

from l2s_jax.bench.contestants import BANDWIDTH, CONTESTANTS, OURS, PEERS, Case, Setup, unfit
from l2s_jax.bench.geometry import write_random
from l2s_jax.bench.remote import Remote
from l2s_jax.bench.report import write_report

log = logging.getLogger("l2s_jax")

_LIBRARIES = ("l2s_jax", "jax", "torch", "transformers", "ctranslate2")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def _integers(text: str) -> list[int]:
    values = [int(value) if value.isdecimal() else 0 for value in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected positive integers")
    return values


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


def _count(text: str) -> int:
    values = _integers(text)
    if len(values) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected one positive integer")
    return values[0]


def _parser() -> _Parser:
    parser = _Parser(
        prog="python -m l2s_jax.bench",
        description="Measures L2S, its LLM and SLM and other libraries' side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--llm", default="t5-large", help="folder of a checkpoint, or a published geometry")
    add("--slm", default="t5-small", help="likewise")
    add("--peers", type=_peers, default="hf,ct2", help=f"hf, ct2, or of {', '.join(PEERS)}")
    add("--batch_sizes", type=_integers, default="1,8,32", help="(default: %(default)s)")
    add("--prompt_tokens", type=_integers, default="32,128,512", help="(default: %(default)s)")
    add("--new_tokens", type=_integers, default="32,128,256", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all but int8")
    add("--repeats", type=_count, default=5, help="of each case (default: %(default)s)")
    add("--threads", type=_count, default=os.cpu_count(), help="of other libraries, on a CPU")
    add("--output", type=_json_file, default="bench.json", help="(default: %(default)s)")
    add("--profile", action="store_true", help="also write a trace of L2S on the last case")
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
        setup = _setup(options, stack.enter_context(tempfile.TemporaryDirectory()))
        failures: dict[str, str] = {}
        remotes: dict[str, Remote] = {}
        for name in (*OURS, *options.peers, BANDWIDTH):
            reasons = [unfit(name, setup, case) for case in cases]
            if all(reasons):
                failures[name] = reasons[0]
                continue
            remotes[name] = Remote(name)
            stack.callback(remotes[name].close)
            try:
                remotes[name].start(setup)
            except RuntimeError as error:
                _fail(failures, remotes, name, error)
        report = {
            "llm": options.llm,
            "slm": options.slm,
            "weights": "of the checkpoints" if setup.real_weights else "random, of real geometry",
            "repeats": options.repeats,
            "not_measured": failures,
            "environment": _environment(options.threads),
        }
        rows: list[dict[str, Any]] = []
        for case in tqdm(cases, desc="cases", file=sys.stderr):
            rows += _measure(case, setup, options.repeats, remotes, failures)
            # Whatever stops a long run, the cases before it are there.
            write_report({**report, "rows": rows, "floor": _floor(rows)}, stem)
        if options.profile:
            remotes["l2s"].ask("trace", os.path.abspath(f"{stem}-trace"))


def _setup(options: argparse.Namespace, folder: str) -> Setup:
    paths = {"llm": options.llm, "slm": options.slm}
    real = all(os.path.isdir(path) for path in paths.values())
    for name, path in paths.items():
        if not os.path.isdir(path):
            paths[name] = os.path.join(folder, name)
            write_random(path, paths[name])
    return Setup(
        **paths, dtype=options.dtype, threads=options.threads, folder=folder, real_weights=real
    )


def _measure(
    case: Case,
    setup: Setup,
    repeats: int,
    remotes: dict[str, Remote],
    failures: dict[str, str],
) -> list[dict[str, Any]]:
    """A record per contestant: the case, its facts, and medians of its measurements."""
    facts: dict[str, dict[str, Any]] = {}
    for name in list(remotes):
        if reason := unfit(name, setup, case):
            failures.setdefault(name, reason)
            continue
        try:
            facts[name] = remotes[name].ask("prepare", *case)
        except RuntimeError as error:
            _fail(failures, remotes, name, error)
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in facts}
    for _ in range(repeats):
        for name in facts:
            samples[name].append(remotes[name].ask("measure"))
    medians = {
        name: {key: statistics.median(s[key] for s in runs) for key in runs[0]}
        for name, runs in samples.items()
    }
    bandwidth = medians.pop(BANDWIDTH)["gb_per_s"]
    return [
        {
            "system": name,
            "dtype": "int8" if name.endswith("int8") else setup.dtype,
            "encoder_dtype": next(
                (dtype for dtype in ("int8", "bfloat16") if name.endswith(dtype)), setup.dtype
            ),
            **case._asdict(),
            **facts[name],
            **times,
            "tokens_per_s": case.batch_size * case.new_tokens / times["total_ms"] * 1e3,
            "peak_memory_mb": remotes[name].ask("memory")["peak_bytes"] / 1e6,
            "version": metadata.version(CONTESTANTS[name][1]),
            "gb_per_s": bandwidth,
            **(
                {"floor_ms_per_token": facts[name]["bytes_read_per_token"] / bandwidth / 1e6}
                if "bytes_read_per_token" in facts[name]
                else {}
            ),
        }
        for name, times in medians.items()
    ]


def _floor(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median bandwidth, and of the first case the time in which it reads what a token needs."""
    floor = {"gb_per_s": statistics.median(row["gb_per_s"] for row in rows)}
    for name in ("l2s", "llm"):
        first = next(row for row in rows if row["system"] == name)
        floor[f"{name}_ms_per_token"] = first["bytes_read_per_token"] / floor["gb_per_s"] / 1e6
    return floor


def _fail(
    failures: dict[str, str], remotes: dict[str, Remote], name: str, error: Exception
) -> None:
    """Another library that cannot do it is a result; one of ours is an error."""
    if name in (*OURS, BANDWIDTH):
        raise ValueError(f"{name}: {error}") from error
    log.warning("%s: not measured: %s", name, error)
    failures[name] = str(error)
    remotes.pop(name, None)


def _environment(threads: int) -> dict[str, Any]:
    import jax

    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cpu_cores": os.cpu_count(),
        "threads": threads,
        "python": sys.version.split()[0],
        **versions,
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs; the exit status."""
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    options = _parser().parse_args(argv)
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
