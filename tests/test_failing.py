"""Writes that fail: one line that names the file, exit status 1, and an end within seconds."""

import contextlib
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from l2s_jax import files
from l2s_jax.training import progress
from l2s_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def files_of_at_most(size):
    """Has a write beyond so many bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save(checkpoints, step, size):
    trees = {"llm": {"a": np.random.default_rng(step).normal(size=size)}}
    trees["opt"] = {"step": np.zeros((), np.int32)}
    checkpoints.save(step, trees=trees, data={}, config={}, metrics={})


def test_a_checkpoint_that_cannot_be_written_is_told_and_not_waited_for(tmp_path):
    begun = time.monotonic()
    with (
        pytest.raises(files.CannotWrite) as error,
        Checkpoints(str(tmp_path), best_metric=None) as checkpoints,
    ):
        save(checkpoints, 1, 10)
        assert checkpoints.best_step == 1
        with files_of_at_most(50_000):
            save(checkpoints, 2, 50_000)
            assert checkpoints.best_step == 2
    assert str(error.value) == f"{tmp_path}: a checkpoint cannot be written: File too large"
    assert files.exit_status(error.value) == 1
    assert time.monotonic() - begun < 60  # Orbax itself would wait for 20 minutes
    with Checkpoints(str(tmp_path), best_metric=None) as checkpoints:
        assert checkpoints.latest_step == 1


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    writer = progress.MetricWriter(str(tmp_path / "run"), total_steps=9)
    with files_of_at_most(10):
        with pytest.raises(OSError, match=r"File too large: '.*a\.json'") as error:
            files.write_json(str(tmp_path / "a.json"), list(range(99)))
        assert files.exit_status(error.value) == 1
        with pytest.raises(OSError, match=r"File too large: '.*metrics\.jsonl'"):
            writer.write(1, {"loss": 0.12345678})
    with pytest.raises(OSError, match="kept"), writer:
        raise OSError("the first error is kept")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert files.exit_status(FileNotFoundError(2, "No such file", "x")) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_tensorboards_thread_that_has_ended_is_no_reason_to_wait(tmp_path):
    writer = progress.MetricWriter(str(tmp_path), total_steps=9)
    thread = writer._tensorboard.file_writer.event_writer._worker
    writer._tensorboard.file_writer.event_writer._event_queue.put("what is no event")
    thread.join()
    with pytest.raises(files.CannotWrite, match="TensorBoard's file cannot be written"), writer:
        for step in range(1, 20_000):
            writer.write(step, {"loss": 1.0})
    events = writer._tensorboard.file_writer.event_writer
    events._ev_writer.close()
    events._closed = True  # so that nothing closes it again at the end of the process


def test_the_command_ends_within_seconds_with_one_line(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    command = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert tiny.run(*command, "--until=tokenizer") == 0
    limited = f"ulimit -f {(tmp_path / 'run/config.json').stat().st_size // 1024 + 1}; exec $0 $@"
    result = subprocess.run(
        ["bash", "-c", limited, sys.executable, "-m", "l2s_jax.main", *command, "--until=llm"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 1, result.stderr
    *before, line = result.stderr.splitlines()
    folder = tmp_path / "run/llm/checkpoints"
    assert line == f"error: {folder}: a checkpoint cannot be written: File too large"
    assert "Traceback" not in result.stderr and len(before) < 20
