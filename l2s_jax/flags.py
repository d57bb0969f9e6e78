"""The flags of the command `python -m l2s_jax.main`, and what a command line says by them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from l2s_jax.arguments import at_home
from l2s_jax.cluster.limits import Limits
from l2s_jax.config import complaint, settled, unknown_key
from l2s_jax.settings.moved import MOVED

MODES = ("train", "evaluate", "generate", "plan", "status", "compare", "dial")

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment; default: that of the workdir.", lock_config=True
)
WORKDIR = flags.DEFINE_string("workdir", "", "Where results are, or will be; always needed.")
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train (and evaluate), evaluate, generate, plan, status, compare, or dial.",
)
UNTIL = flags.DEFINE_string(
    "until",
    None,
    "train: the stage after which to stop, without an evaluation; --mode=status names them.",
)
VARY = flags.DEFINE_multi_string(
    "vary", [], "compare: a setting and its values, as in l2s.fusion=add,cross; repeatable."
)
SYSTEM = flags.DEFINE_enum(
    "system", "l2s", ("llm", "slm", "l2s", "exact"), "generate: the system that answers."
)
INPUT = flags.DEFINE_string(
    "input", "-", "generate: prompts, one per line, or records in a .jsonl file; -: stdin."
)
OUTPUT = flags.DEFINE_string("output", "-", "generate: where the responses go; -: stdout.")
SEARCH = flags.DEFINE_list(
    "search", [], "generate: how tokens are chosen, as in num_beams=4,num_return=2."
)
STOP = flags.DEFINE_multi_string("stop", [], "generate: a text that ends a response; repeatable.")
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens",
    None,
    "generate: at most config.decoding.max_new_tokens, the default.",
    lower_bound=1,
)
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ("float", "int8"), "generate: other than config.decoding.weights."
)
SEED = flags.DEFINE_integer(
    "seed",
    0,
    "generate: of the first prompt; the others' follow on.",
    lower_bound=0,
    upper_bound=2**32 - 1,
)
STREAM = flags.DEFINE_bool("stream", False, "generate: write responses as they are decoded.")
WARM_UP = flags.DEFINE_bool("warmup", False, "generate: compile everything first.")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder for compiled programs, which later runs on this machine start from.",
)
VERIFY = flags.DEFINE_bool(
    "verify",
    False,
    "Read all files that a SHA256SUMS of the workdir names, and the checkpoints, for their hashes, "
    "and trust none that is remembered.",
)
JSONL = flags.DEFINE_bool("jsonl", False, "generate: input is JSON Lines, whatever its name.")
TOPOLOGY = flags.DEFINE_string("topology", None, "plan: the slice, such as v5e:4x4 or cpu:8.")
PROGRAMS = flags.DEFINE_list(
    "programs",
    ["train", "encode", "prefill", "decode", "run"],
    "plan: what is compiled; run: all stages of a run.",
)
MFU = flags.DEFINE_float(
    "mfu", None, "plan: share of the chips' peak FLOPs that a run reaches, for an estimate."
)
EXAMPLES = flags.DEFINE_integer(
    "examples", None, "plan: examples of the train split; default: those of the data, if at hand."
)
RESPONSE_TOKENS = flags.DEFINE_float(
    "response_tokens",
    None,
    "plan: tokens of a response that a model of the run writes, on average; default: as many as it "
    "may have.",
)
PRICE = flags.DEFINE_float("price", None, "plan: dollars per chip-hour.")
SWEEP = flags.DEFINE_bool(
    "sweep", False, "plan: try every mesh over the slice, its sequence as it is set."
)
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", [], "plan: those that a sweep tries; default: the config's."
)

COMPILED = flags.DEFINE_string(
    "compiled",
    None,
    "plan: a folder, where the training steps of a run on that slice are kept, compiled; train: "
    "one, of your own, from which they are taken.",
)

_PATHS = (CONFIG, WORKDIR, INPUT, OUTPUT, COMPILATION_CACHE, COMPILED)

# What says nothing to other modes.
_OF_MODES: dict[tuple[str, ...], tuple[flags.FlagHolder[Any], ...]] = {
    ("train",): (UNTIL,),
    ("compare",): (VARY,),
    ("generate",): (
        SYSTEM, INPUT, OUTPUT, SEARCH, STOP, MAX_NEW_TOKENS, WEIGHTS, SEED, STREAM, WARM_UP, JSONL,
    ),
    ("plan",): (
        TOPOLOGY, PROGRAMS, MFU, EXAMPLES, RESPONSE_TOKENS, PRICE, SWEEP, BATCH_SIZES,
    ),
    ("plan", "train"): (COMPILED,),
    tuple(mode for mode in MODES if mode != "plan"): (VERIFY,),
}  # fmt: skip

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of a job of several processes: HOST:PORT of process 0, a free port."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the job has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Whether to join the job that the cluster describes (Slurm, Open MPI, Cloud TPU, GKE; with the "
    "package mpi4py also Open MPI 5, MPICH, Intel MPI); default: if the environment has several "
    "processes.",
)
JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout",
    Limits.join_s,
    "Seconds that process 0 waits for the others; they wait twice as long for it.",
    lower_bound=1,
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    Limits.heartbeat_s,
    "Seconds without a sign of life after which a process counts as lost, and the others end.",
    lower_bound=2,
)
BARRIER_TIMEOUT = flags.DEFINE_integer(
    "barrier_timeout",
    Limits.barrier_s,
    "Seconds that processes wait for one that is late; process 0 may work alone for hours.",
    lower_bound=1,
)


def parse(argv: Sequence[str]) -> None:
    """Parses the command line.

    Raises:
      ValueError: a flag, a config file or a config key that doesn't exist, or a value that doesn't
        fit.
    """
    for argument in argv:
        flag, _, key = argument.partition("=")[0].partition(".")
        if flag == "--config" and key in MOVED:
            raise ValueError(f"{argument}: config.{key} is now config.{MOVED[key]}")
    paths = {flag.name for flag in _PATHS}
    argv = [at_home(arg) if arg.partition("=")[0].lstrip("-") in paths else arg for arg in argv]
    try:
        rest = flags.FLAGS(argv)[1:]
        # (A file that is not there is an error at the first look at its config.)
        is_config = not CONFIG.present or hasattr(CONFIG.value, "to_dict")
    except Exception as error:
        if line := complaint(error):
            raise ValueError(line) from error
        path = _config_path(argv)
        if isinstance(error, OSError) and not os.path.isfile(path.partition(":")[0]):
            raise ValueError(f"--config={path}: no such file") from error
        if isinstance(error, flags.Error):
            raise ValueError(str(error)) from error
        if not isinstance(error, AttributeError | KeyError | TypeError):
            raise
        # How ml_collections reports an override of a key that the config does not have.
        overrides = [arg for arg in argv if arg.startswith("--config.")]
        line = unknown_key(overrides) or f"unknown config key {error} in {' '.join(overrides)}"
        raise ValueError(line) from error
    if not is_config:
        kind = type(CONFIG.value).__name__
        raise ValueError(
            f"--config: get_config() gave no config but a {kind}, expected the config that it made"
        )
    _check_job()
    if not WORKDIR.value:
        raise ValueError("--workdir: expected a folder for results, as in --workdir=runs/NAME")
    for modes, own in _OF_MODES.items():
        for flag in own:
            if flag.present and MODE.value not in modes:
                said = flag.value if isinstance(flag.value, list) else [str(flag.value)]
                raise ValueError(
                    f"--{flag.name}={','.join(said)}: expected --mode={' or '.join(modes)}, not "
                    f"{MODE.value}"
                )
    if rest:
        raise ValueError(f"unexpected arguments: {' '.join(rest)}")


def _check_job() -> None:
    """The three flags of a job's place fit each other, or none is there."""
    where, count, number = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if where is count is number is None:
        return
    if where is None or count is None or number is None:
        raise ValueError(
            "--coordinator, --num_processes and --process_id: expected all three, or none"
        )
    if not re.fullmatch(r".+:\d{1,5}", where):
        raise ValueError(f"--coordinator={where}: expected HOST:PORT")
    if not 0 <= number < count:
        raise ValueError(
            f"--process_id={number}, --num_processes={count}: expected a number from 0 to one less "
            "than that of the processes"
        )


def limits() -> Limits:
    """How long processes of a job wait for each other."""
    return Limits(JOIN_TIMEOUT.value, HEARTBEAT_TIMEOUT.value, BARRIER_TIMEOUT.value)


def _config_path(argv: Sequence[str]) -> str:
    """What --config says, in one argument or in two; an override of a key may be parsed before."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, path = argument.partition("=")
        if flag in ("--config", "-config"):
            return path if equals else following
    return ""


def config() -> ConfigDict | None:
    """The settings of --config and of what changes it, checked one by one; None without it.

    Raises:
      ValueError: one does not fit, or has no effect.
    """
    if not CONFIG.value:
        return None
    return settled(CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"]))


def given() -> dict[str, Any]:
    """The flags that all processes of a job have in common, but for the config."""
    own = ("config", "process_id", "compilation_cache")
    ours = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {f"--{flag.name}": flag.value for flag in ours if flag.name not in own}


def search_settings() -> dict[str, str]:
    """--search, by name.

    Raises:
      ValueError: one has no value.
    """
    pairs = [setting.partition("=") for setting in SEARCH.value]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--search: {name!r}: expected settings such as num_beams=4")
    return {name: value for name, _, value in pairs}
