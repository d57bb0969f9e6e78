"""Command line: flags, then one call per mode.

python -m l2s_jax.main --config=configs/NAME.py --workdir=DIR [--config.path.to.key=value]
python -m l2s_jax.main --mode=generate --workdir=DIR --input=FILE [--output=FILE]
python -m l2s_jax.main --mode=status --workdir=DIR
python -m l2s_jax.main --mode=compare --config=... --workdir=DIR --vary=l2s.fusion=add,cross
python -m l2s_jax.main --mode=dial --workdir=DIR
python -m l2s_jax.main --mode=plan --config=configs/NAME.py --workdir=DIR --topology=v5e:4x4

Exit status: 0; 2 for bad input, 1 for a run that failed, such as a training that is no longer
finite, 130 for Ctrl-C, 143 for SIGTERM, each with one line that says what happened.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from l2s_jax.cluster.quiet import errors_once
from l2s_jax.cluster.stopping import Stopped, handled
from l2s_jax.config import complaint, settled, unknown_key
from l2s_jax.files import exit_status, one_line, read_text
from l2s_jax.settings.moved import MOVED

app.define_help_flags()

STAGES = (
    "tokenizer", "slm_tokenizer", "llm", "labels", "vocabulary", "logits", "slm", "features",
    "l2s_frozen", "l2s",
)  # fmt: skip
MODES = ("train", "evaluate", "generate", "plan", "status", "compare", "dial")

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment; default: that of the workdir.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Where results are, or will be; always needed.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    MODES,
    "train (and evaluate), evaluate, generate, plan, status, compare, or dial.",
)
_UNTIL = flags.DEFINE_enum(
    "until", None, STAGES, "train: the stage after which to stop, without an evaluation."
)
_VARY = flags.DEFINE_multi_string(
    "vary", [], "compare: a setting and its values, as in l2s.fusion=add,cross; repeatable."
)
_SYSTEM = flags.DEFINE_enum(
    "system", "l2s", ("llm", "slm", "l2s", "exact"), "generate: the system that answers."
)
_INPUT = flags.DEFINE_string(
    "input", "-", "generate: prompts, one per line, or records in a .jsonl file; -: stdin."
)
_OUTPUT = flags.DEFINE_string("output", "-", "generate: where the responses go; -: stdout.")
_SEARCH = flags.DEFINE_list(
    "search", [], "generate: how tokens are chosen, as in num_beams=4,num_return=2."
)
_STOP = flags.DEFINE_multi_string("stop", [], "generate: a text that ends a response; repeatable.")
_MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "generate: at most config.decoding.max_new_tokens, the default."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", None, ("float", "int8"), "generate: other than config.decoding.weights."
)
_SEED = flags.DEFINE_integer("seed", 0, "generate: of the first prompt; the others' follow on.")
_STREAM = flags.DEFINE_bool("stream", False, "generate: write responses as they are decoded.")
_WARM_UP = flags.DEFINE_bool("warmup", False, "generate: compile everything first.")
_COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Folder for compiled programs, which later runs on this machine start from.",
)
_JSONL = flags.DEFINE_bool("jsonl", False, "generate: input is JSON Lines, whatever its name.")
_TOPOLOGY = flags.DEFINE_string("topology", None, "plan: the slice, such as v5e:4x4 or cpu:8.")
_PROGRAMS = flags.DEFINE_list(
    "programs",
    ["train", "encode", "prefill", "decode", "run"],
    "plan: what is compiled; run: all stages of a run.",
)
_MFU = flags.DEFINE_float(
    "mfu", None, "plan: share of the chips' peak FLOPs that a run reaches, for an estimate."
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", None, "plan: examples of the train split; default: those of the data, if at hand."
)
_PRICE = flags.DEFINE_float("price", None, "plan: dollars per chip-hour.")
_SWEEP = flags.DEFINE_bool("sweep", False, "plan: try every mesh over the slice.")
_BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", [], "plan: those that a sweep tries; default: the config's."
)

_COMPILED = flags.DEFINE_string(
    "compiled",
    None,
    "plan: a folder, where the training steps of a run on that slice are kept, compiled; train: "
    "one, of your own, from which they are taken.",
)

_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Of a job of several processes: HOST:PORT of process 0, a free port."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the job has.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    None,
    "Whether to join the job that the cluster describes (Slurm, Open MPI, Cloud TPU, GKE; with the "
    "package mpi4py also Open MPI 5, MPICH, Intel MPI); default: if the environment has several "
    "processes.",
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
    "join_timeout",
    300,
    "Seconds that process 0 waits for the others; they wait twice as long for it.",
    lower_bound=1,
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
    "heartbeat_timeout",
    40,
    "Seconds without a sign of life after which a process counts as lost, and the others end.",
    lower_bound=2,
)
_BARRIER_TIMEOUT = flags.DEFINE_integer(
    "barrier_timeout",
    7 * 24 * 3600,
    "Seconds that processes wait for one that is late; process 0 may work alone for hours.",
    lower_bound=1,
)

log = logging.getLogger("l2s_jax")


def run(config: ConfigDict | None, workdir: str, mode: str) -> None:
    """One mode of the command."""
    if mode == "plan":
        return _plan(config, workdir)
    if mode == "status":
        return _status(config, workdir)
    # Imported here, so that --help and wrong flags don't wait for them.
    import jax

    from l2s_jax.cluster import distributed, lock
    from l2s_jax.experiment import workdir as workdirs
    from l2s_jax.serving.generate_file import generate_file
    from l2s_jax.training import trackers

    if _COMPILATION_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", _COMPILATION_CACHE.value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = config or workdirs.read_config(workdir)
    distributed.check_same({"config": config.to_dict(), **_given()}, "")
    if mode == "generate":
        generate_file(
            config,
            workdir,
            system=_SYSTEM.value,
            source=_INPUT.value,
            target=_OUTPUT.value,
            jsonl=_JSONL.value,
            search=_search_settings(),
            stop=_STOP.value,
            max_new_tokens=_MAX_NEW_TOKENS.value,
            seed=_SEED.value,
            stream=_STREAM.value,
            warm_up=_WARM_UP.value,
            weights=_WEIGHTS.value,
        )
        return
    with lock.of_job(workdir), trackers.closing():
        _work(config, workdir, mode)


def _work(config: ConfigDict, workdir: str, mode: str) -> None:
    """What changes a workdir."""
    from l2s_jax.cluster import distributed
    from l2s_jax.evaluation.evaluate import check_selection, primary_score
    from l2s_jax.evaluation.stage import EvaluationStage
    from l2s_jax.experiment import workdir as workdirs
    from l2s_jax.experiment.experiment import Experiment

    if mode == "compare":
        from l2s_jax.evaluation.compare import compare

        compare(config, workdir, _VARY.value)
        _print_report(workdir, "compare.md")
        return
    if mode == "dial":
        from l2s_jax.evaluation.dial import dial

        dial(config, workdir)
        _print_report(workdir, "dial.md")
        return
    score = functools.partial(primary_score, config)
    experiment = Experiment(config, workdir, "make" if mode == "train" else "find", score)
    experiment.check()
    distributed.on_primary(lambda: check_selection(config))
    if mode == "train":
        if _COMPILED.value:
            from l2s_jax.plan import kept

            experiment.context.compiled = kept.find(_COMPILED.value, config)
        distributed.on_primary(lambda: workdirs.write_config(workdir, config))
        workdirs.check_shared(workdir)
    if _UNTIL.value:
        experiment.make(_UNTIL.value)
        return
    EvaluationStage(experiment).remake()
    _print_report(workdir, "report.md")


def _print_report(workdir: str, name: str) -> None:
    from l2s_jax.cluster import distributed

    if distributed.is_primary():
        print(read_text(os.path.join(workdir, name)))


def _given() -> dict[str, Any]:
    """The flags that all processes of a job have in common, but for the config."""
    own = ("config", "process_id", "compilation_cache")
    ours = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    return {f"--{flag.name}": flag.value for flag in ours if flag.name not in own}


def _job() -> contextlib.AbstractContextManager[None]:
    if _MODE.value in ("plan", "status"):
        # One process does it; a plan says how many devices it has before JAX asks for them.
        return contextlib.nullcontext()
    from l2s_jax.cluster.job import job

    return job(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        detect=_DISTRIBUTED.value,
        timeout_s=_JOIN_TIMEOUT.value,
        heartbeat_s=_HEARTBEAT_TIMEOUT.value,
        barrier_s=_BARRIER_TIMEOUT.value,
    )


def _status(config: ConfigDict | None, workdir: str) -> None:
    from l2s_jax.evaluation.stage import EvaluationStage
    from l2s_jax.experiment import workdir as workdirs
    from l2s_jax.experiment.experiment import Experiment
    from l2s_jax.experiment.status import status

    experiment = Experiment(config or workdirs.read_config(workdir), workdir, "look")
    print(status([*experiment.stages, EvaluationStage(experiment)]))


def _plan(config: ConfigDict | None, workdir: str) -> None:
    from l2s_jax.experiment import workdir as workdirs

    if not _TOPOLOGY.value:
        raise ValueError("--mode=plan: expected --topology, such as v5e:4x4 or cpu:8")
    try:
        batch_sizes = [int(size) for size in _BATCH_SIZES.value]
    except ValueError:
        raise ValueError(
            f"--batch_sizes={','.join(_BATCH_SIZES.value)}: expected numbers above 0"
        ) from None
    # Nothing runs: a TPU or GPU that this machine may have is left to those who use it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from l2s_jax.plan.command import plan

    text = plan(
        config or workdirs.read_config(workdir),
        workdir,
        _TOPOLOGY.value,
        programs=_PROGRAMS.value,
        price=_PRICE.value,
        mfu=_MFU.value,
        examples=_EXAMPLES.value,
        sweep=_SWEEP.value,
        batch_sizes=batch_sizes,
        compiled=_COMPILED.value or "",
    )
    print(text)


def _search_settings() -> dict[str, str]:
    pairs = [setting.partition("=") for setting in _SEARCH.value]
    for name, equals, _ in pairs:
        if not equals:
            raise ValueError(f"--search: {name!r}: expected settings such as num_beams=4")
    return {name: value for name, _, value in pairs}


def parse_flags(argv: Sequence[str]) -> None:
    """Parses the command line.

    Raises:
      ValueError: a flag, a config file or a config key that doesn't exist, or a value that doesn't
        fit.
    """
    for argument in argv:
        flag, _, key = argument.partition("=")[0].partition(".")
        if flag == "--config" and key in MOVED:
            raise ValueError(f"{argument}: config.{key} is now config.{MOVED[key]}")
    try:
        rest = flags.FLAGS(argv)[1:]
        # (A file that is not there is an error at the first look at its config.)
        is_config = not _CONFIG.present or hasattr(_CONFIG.value, "to_dict")
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
        given = [arg for arg in argv if arg.startswith("--config.")]
        line = unknown_key(given) or f"unknown config key {error} in {' '.join(given)}"
        raise ValueError(line) from error
    if not is_config:
        kind = type(_CONFIG.value).__name__
        raise ValueError(
            f"--config: get_config() gave no config but a {kind}, expected the config that it made"
        )
    if not _WORKDIR.value:
        raise ValueError("--workdir: expected a folder for results, as in --workdir=runs/NAME")
    if _UNTIL.value and _MODE.value != "train":
        raise ValueError(f"--until={_UNTIL.value}: expected --mode=train, not {_MODE.value}")
    if _VARY.value and _MODE.value != "compare":
        raise ValueError(f"--vary={_VARY.value[0]}: expected --mode=compare, not {_MODE.value}")
    if _COMPILED.value and _MODE.value not in ("plan", "train"):
        raise ValueError(
            f"--compiled={_COMPILED.value}: expected --mode=plan or train, not {_MODE.value}"
        )
    if rest:
        raise ValueError(f"unexpected arguments: {' '.join(rest)}")


def _config_path(argv: Sequence[str]) -> str:
    """What --config says, in one argument or in two; an override of a key may be parsed before."""
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        flag, equals, path = argument.partition("=")
        if flag in ("--config", "-config"):
            return path if equals else following
    return ""


def main(argv: Sequence[str]) -> int:
    """Parses the flags and runs; the exit status."""
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        parse_flags(argv)
        config = _CONFIG.value and settled(
            _CONFIG.value, config_flags.get_override_values(flags.FLAGS["config"])
        )
        with errors_once(), handled(), _job():
            run(config, _WORKDIR.value, _MODE.value)
    except (ValueError, OSError, FloatingPointError) as error:
        log.debug("failed", exc_info=True)
        return _fail(str(error), exit_status(error))
    except Stopped as stopped:
        return _fail(str(stopped), stopped.status)
    return 0


def _leave(status: int) -> NoReturn:
    """Ends the process; after an error without its threads, which may wait for what has failed."""
    if status:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(0)


def _fail(message: str, status: int = 2) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    _leave(main(sys.argv))
