"""Command line: one call per mode. Its flags are in flags.py.

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
from collections.abc import Iterator, Sequence
from typing import NoReturn

from absl import app
from absl.flags import adopt_module_key_flags
from ml_collections import ConfigDict

from l2s_jax import flags
from l2s_jax.cluster import libtpu
from l2s_jax.cluster.stopping import Stopped, handled
from l2s_jax.files import exit_status, read_text
from l2s_jax.messages import errors_once, one_line

# So that --help shows them as this command's.
adopt_module_key_flags(flags)
app.define_help_flags()

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

    if flags.COMPILATION_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", flags.COMPILATION_CACHE.value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    config = config or workdirs.read_config(workdir)
    distributed.check_same({"config": config.to_dict(), **flags.given()})
    if mode == "generate":
        generate_file(
            config,
            workdir,
            system=flags.SYSTEM.value,
            source=flags.INPUT.value,
            target=flags.OUTPUT.value,
            jsonl=flags.JSONL.value,
            search=flags.search_settings(),
            stop=flags.STOP.value,
            max_new_tokens=flags.MAX_NEW_TOKENS.value,
            seed=flags.SEED.value,
            stream=flags.STREAM.value,
            warm_up=flags.WARM_UP.value,
            weights=flags.WEIGHTS.value,
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

        compare(config, workdir, flags.VARY.value)
        _print_report(workdir, "compare.md")
        return
    if mode == "dial":
        from l2s_jax.evaluation.dial import dial

        dial(config, workdir)
        _print_report(workdir, "dial.md")
        return
    score = functools.partial(primary_score, config)
    experiment = Experiment(config, workdir, "make" if mode == "train" else "find", score)
    experiment.check(flags.UNTIL.value or "")
    distributed.on_primary(lambda: check_selection(config))
    if mode == "train":
        if flags.COMPILED.value:
            from l2s_jax.plan import kept

            experiment.context.compiled = kept.find(flags.COMPILED.value, config)
        distributed.on_primary(lambda: workdirs.write_config(workdir, config))
        workdirs.check_shared(workdir)
    if flags.UNTIL.value:
        experiment.make(flags.UNTIL.value)
        return
    EvaluationStage(experiment).remake()
    _print_report(workdir, "report.md")


def _print_report(workdir: str, name: str) -> None:
    from l2s_jax.cluster import distributed

    if distributed.is_primary():
        print(read_text(os.path.join(workdir, name)))


def _job() -> contextlib.AbstractContextManager[None]:
    if flags.MODE.value in ("plan", "status"):
        # One process does it; a plan says how many devices it has before JAX asks for them.
        return contextlib.nullcontext()
    from l2s_jax.cluster.job import job

    return job(
        flags.COORDINATOR.value,
        flags.NUM_PROCESSES.value,
        flags.PROCESS_ID.value,
        detect=flags.DISTRIBUTED.value,
        limits=flags.limits(),
    )


@contextlib.contextmanager
def _verified() -> Iterator[None]:
    """With --verify: all of the workdir that has a hash is checked, and hashes are made anew."""
    if not flags.VERIFY.value:
        yield
        return
    from l2s_jax import sealed
    from l2s_jax.cluster import distributed

    with sealed.anew():
        distributed.on_primary(lambda: sealed.check_below(flags.WORKDIR.value))
        yield


def _status(config: ConfigDict | None, workdir: str) -> None:
    from l2s_jax.evaluation.stage import EvaluationStage
    from l2s_jax.experiment import workdir as workdirs
    from l2s_jax.experiment.experiment import Experiment
    from l2s_jax.experiment.stage import status

    experiment = Experiment(config or workdirs.read_config(workdir), workdir, "look")
    print(status([*experiment.stages, EvaluationStage(experiment)]))


def _plan(config: ConfigDict | None, workdir: str) -> None:
    from l2s_jax.experiment import workdir as workdirs

    if not flags.TOPOLOGY.value:
        raise ValueError("--mode=plan: expected --topology, such as v5e:4x4 or cpu:8")
    try:
        batch_sizes = [int(size) for size in flags.BATCH_SIZES.value]
    except ValueError:
        raise ValueError(
            f"--batch_sizes={','.join(flags.BATCH_SIZES.value)}: expected numbers above 0"
        ) from None
    # Nothing runs: a TPU or GPU that this machine may have is left to those who use it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from l2s_jax.plan.command import plan

    text = plan(
        config or workdirs.read_config(workdir),
        workdir,
        flags.TOPOLOGY.value,
        programs=flags.PROGRAMS.value,
        price=flags.PRICE.value,
        mfu=flags.MFU.value,
        examples=flags.EXAMPLES.value,
        response_tokens=flags.RESPONSE_TOKENS.value,
        sweep=flags.SWEEP.value,
        batch_sizes=batch_sizes,
        compiled=flags.COMPILED.value or "",
    )
    print(text)


def main(argv: Sequence[str]) -> int:
    """Parses the flags and runs; the exit status."""
    logging.basicConfig(format="%(levelname).1s %(asctime)s %(message)s", datefmt="%H:%M:%S")
    log.setLevel(logging.INFO)
    try:
        flags.parse(argv)
        config = flags.config()
        libtpu.prepare()
        with errors_once(), handled(), _job(), _verified():
            run(config, flags.WORKDIR.value, flags.MODE.value)
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
