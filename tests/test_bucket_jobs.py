"""Trainings in a bucket that are killed, and go on; who works in a workdir that is there."""

import os
import signal
import subprocess
import sys
import threading
import time

import emulator
import jax
import numpy as np
import pytest
import small
import test_buckets
import tiny
import train_child
from test_buckets import AT, TESTS, free_port, lines_of, store  # noqa: F401

from l2s_jax import buckets
from l2s_jax.cluster import bucket_lock, job, lock

STEPS = list(range(1, train_child.STEPS + 1))


def start(directory, seconds, *of_job):
    xla = os.environ["XLA_FLAGS"].split()
    environment = {
        **os.environ,
        "XLA_FLAGS": " ".join(flag for flag in xla if "device_count" not in flag),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
    }
    command = [sys.executable, str(TESTS / "bucket_child.py"), directory, str(seconds), *of_job]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(processes, path):
    while not buckets.is_object(path):
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_training_loses_nothing(processes, store, tmp_path):  # noqa: F811
    directory = f"{AT}/killed-{processes}"
    coordinator = f"127.0.0.1:{free_port()}"
    of_job = [[coordinator, "2", str(i)] for i in range(2)] if processes == 2 else [[]]
    children = [start(directory, 0.3, *one) for one in of_job]
    wait_for(children, f"{directory}/checkpoints/6/_CHECKPOINT_METADATA")
    for child in children:
        child.send_signal(signal.SIGKILL)
    for child in children:
        child.communicate()
    # A step that was being sent is none.
    buckets.write(f"{directory}/checkpoints/9/opt/half", b"")
    buckets.remove(f"{directory}/checkpoints/9/_CHECKPOINT_METADATA")
    weights = train_child.run(directory)
    expected = train_child.run(str(tmp_path))
    if processes == 1:
        jax.tree.map(np.testing.assert_array_equal, weights, expected)
        assert lines_of(directory) == lines_of(tmp_path)
    else:
        small.assert_same(weights, expected, rtol=1e-4, atol=1e-6)
    steps = [line["step"] for line in lines_of(directory) if "loss" in line]
    assert steps == STEPS
    kept = {int(name) for name in buckets.names(f"{directory}/checkpoints")}
    assert kept == {18, 21, 24}
