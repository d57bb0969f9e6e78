"""Measures L2S, its LLM and SLM and other libraries' on one machine, in one run.

python -m l2s_jax.bench --llm=t5-large --slm=t5-small --peers=hf,ct2 --output=bench.json

--llm and --slm name a folder in Hugging Face's format, a GGUF file, a repository on the hub, or a
published geometry, which gets random weights. Every contestant has a process of its own; they take
turns, in an order drawn for each repeat, and what is reported are medians and quartiles. Another
library is measured with the settings with which it is fastest: these are found first, on the first
case of each batch size. Beside FILE.json come FILE.md and plots, and with --profile a trace. Exit
status: 0; 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import os
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from l2s_jax.arguments import Parser, count, integers, share
from l2s_jax.bench import machine
from l2s_jax.bench.contest import Contest
from l2s_jax.bench.contestants import CONTESTANTS, OURS, PEERS, Case, Setup, unfit
from l2s_jax.bench.geometry import write_random
from l2s_jax.bench.report import write_report
from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import libtpu
from l2s_jax.gguf_file import is_gguf
from l2s_jax.hub import find, is_name
from l2s_jax.messages import one_line
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.tokenizers import load_tokenizer

log = logging.getLogger("l2s_jax")

_LIBRARIES = ("l2s_jax", "jax", "torch", "transformers", "ctranslate2")
# What their processes convert is a checkpoint on the disk.
_CONVERTERS = ("ct2", "openvino")


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
            expected = ", ".join(("hf", "ct2", "ov", *PEERS))
            raise argparse.ArgumentTypeError(f"no {word!r}, expected some of {expected}")
        chosen.update(dict.fromkeys(names))
    return list(chosen)


def _json_file(text: str) -> str:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(f"{text!r}: expected the name of a .json file")
    return text


def _python(text: str) -> str:
    found = shutil.which(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a Python that can be run")
    return os.path.abspath(found)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m l2s_jax.bench",
        description="Measures L2S, its LLM and SLM and other libraries' side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--llm", default="t5-large", help="a checkpoint, or a published geometry")
    add("--slm", default="t5-small", help="likewise")
    add("--ours", type=_ours, default="l2s,l2s-bfloat16,llm,slm", help=f"of {', '.join(OURS)}")
    add("--peers", type=_peers, default="hf,ct2", help=f"hf, ct2, ov, or of {', '.join(PEERS)}")
    add("--batch_sizes", type=integers, default="1,8,32", help="(default: %(default)s)")
    add("--prompt_tokens", type=integers, default="32,128,512", help="(default: %(default)s)")
    add("--new_tokens", type=integers, default="32,128,256", help="(default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all but int8")
    add("--vocabulary", type=count, default=0, help="pieces that l2s-cut and slm-cut write with")
    add("--acceptance", type=share, help="exact: the share of drafts that pass, by chance")
    add("--draft_tokens", type=count, default=4, help="exact: at once (default: %(default)s)")
    add("--repeats", type=count, default=5, help="of each case (default: %(default)s)")
    add("--threads", type=count, default=machine.cores(), help="CPU cores of each (default: all)")
    add(
        "--tune",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="vary the peers' settings and keep the best (default: yes)",
    )
    add("--peer_python", type=_python, help="the Python of the ov peers' environment")
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
    names = (*options.ours, *options.peers)
    with contextlib.ExitStack() as stack:
        setup, weights = _setup(options, stack.enter_context(tempfile.TemporaryDirectory()))
        contest = Contest(
            setup, options.repeats, stack, tune=options.tune, peer_python=options.peer_python
        )
        traced = [name for name in options.ours if not unfit(name, contest.setup, cases[-1])][:1]
        if options.profile and not traced:
            raise ValueError("--profile: expected one of --ours that fits the last case")
        report = {
            "llm": options.llm,
            "slm": options.slm,
            "dtype": options.dtype,
            "weights": weights,
            "repeats": options.repeats,
            **({} if options.acceptance is None else {"acceptance": options.acceptance}),
            "not_measured": contest.failures,
            "environment": _environment(contest.device, options.threads),
        }
        rows: list[dict[str, Any]] = []
        for case in tqdm(cases, desc="cases", file=sys.stderr):
            rows += contest.measure(names, case)
            if rows:
                # Whatever stops a long run, the cases before it are there.
                write_report({**report, "rows": rows, "floor": _floor(rows)}, stem)
        if not rows:
            reasons = (f"{name}: {reason}" for name, reason in contest.failures.items())
            raise ValueError(f"nobody was measured ({'; '.join(reasons)})")
        for name in traced if options.profile else ():
            contest.ask(name, "trace", os.path.abspath(f"{stem}-trace"))


def _setup(options: argparse.Namespace, folder: str) -> tuple[Setup, str]:
    """What all share, and what the weights are."""
    paths: dict[str, str] = {}
    weights: dict[str, str] = {}
    configs: dict[str, Any] = {}
    written = any(CONTESTANTS[name].module in _CONVERTERS for name in options.peers)
    for name in ("llm", "slm"):
        given = getattr(options, name)
        paths[name] = os.path.join(folder, name)
        real = os.path.exists(given) or (given not in GEOMETRIES and is_name(given))
        if real:
            paths[name] = _checkpoint(given, paths[name])
        weights[name] = "of the checkpoint" if real else "random, of real geometry"
        if not real:
            write_random(given, paths[name], weights=written)
        configs[name] = pretrained.read_config(paths[name])
    pieces = configs["slm"].vocab_size
    if options.vocabulary > pieces:
        raise ValueError(
            f"--vocabulary={options.vocabulary}: expected at most {pieces}, all of the SLM's"
        )
    setup = Setup(
        llm=paths["llm"],
        slm=paths["slm"],
        dtype=options.dtype,
        threads=options.threads,
        folder=folder,
        vocab_size=min(config.vocab_size for config in configs.values()),
        real_weights=set(weights.values()) == {"of the checkpoint"},
        vocabulary=options.vocabulary,
        draft_tokens=options.draft_tokens,
        acceptance=options.acceptance,
        accelerator=False,
        fast_bfloat16=machine.has_fast_bfloat16(),
        **{f"{name}_positions": getattr(c, "max_positions", None) for name, c in configs.items()},
    )
    if len(set(weights.values())) == 1:
        return setup, weights["llm"]
    return setup, ", ".join(f"{name.upper()}: {kind}" for name, kind in weights.items())


def _checkpoint(given: str, folder: str) -> str:
    """The folder of a checkpoint; a GGUF file, of which the peers read none, becomes `folder`."""
    found = find(given)
    if not is_gguf(found):
        return found
    tokenizer = load_tokenizer(found)
    module, params = pretrained.load(found)
    pretrained.save_hf(module.config, params, folder)
    tokenizer.save(folder)
    return folder


def _floor(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The median bandwidth, and of the first case the time in which it reads what a token needs."""
    read = [row for row in rows if "gb_per_s" in row]
    floor = {}
    if read:
        floor["gb_per_s"] = statistics.median(row["gb_per_s"] for row in read)
    for name in ("l2s", "llm"):
        for first in itertools.islice((row for row in read if row["system"] == name), 1):
            floor[f"{name}_ms_per_token"] = first["floor_ms_per_token"]
    return floor


def _environment(device: Mapping[str, Any], threads: int) -> dict[str, Any]:
    return {
        **device,
        **machine.cpu(),
        "cpu_cores": os.cpu_count(),
        "threads": threads,
        **machine.versions(_LIBRARIES),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the arguments and runs; the exit status."""
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    parser = _parser()
    options = parser.parse_args(argv)
    libtpu.prepare()
    if options.profile and not options.ours:
        parser.error("--profile: expected one of ours in --ours")
    if options.threads > machine.cores():
        parser.error(
            f"--threads={options.threads}: expected at most {machine.cores()}, the cores here"
        )
    # The contestants' processes end with this one in an orderly way, whoever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # This process only makes checkpoints: the accelerator is left to those that are measured.
    jax.config.update("jax_platforms", "cpu")
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    with open(options.output.removesuffix(".json") + ".md", encoding="utf-8") as file:
        print(file.read())
    return 0


if __name__ == "__main__":
    sys.exit(main())
