"""A small training run, alone or one process of a job, for test_stopping to send signals to.

python tests/stop_child.py DIRECTORY SECONDS_PER_STEP LEARNING_RATE WHEN [COORDINATOR PROCESSES
PROCESS]

WHEN it sends itself SIGTERM: "first", before the first step, "save", when a checkpoint is saved, or
"never". The others have a validation of minutes after step 4: "validate" sends SIGINT there,
"validated" nothing.
"""

import contextlib
import functools
import os
import signal
import sys
import time

import jax
import train_child

from l2s_jax.cluster.job import job
from l2s_jax.cluster.limits import Limits
from l2s_jax.cluster.stopping import Stopped, handled

CHANGES = {"name": "slm", "accumulation": 1, "evaluate_every": 1000, "log_every": 2}


class Signalling:
    """Batches that send this process a signal: with one of them, or when they are saved."""

    def __init__(self, batches, number, *, batch=None, at_save=False):
        self.batches, self.number, self.left, self.at_save = batches, number, batch, at_save

    def __next__(self):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), self.number)
        return next(self.batches)

    def get_state(self):
        if self.at_save:
            os.kill(os.getpid(), self.number)
        return self.batches.get_state()

    def set_state(self, state):
        self.batches.set_state(state)


class Long:
    """A validation of many batches; with a number, this process sends itself the signal in one."""

    def __init__(self, batch, count, seconds=0.0, number=None):
        self.batch, self.count, self.seconds, self.number = batch, count, seconds, number

    def __iter__(self):
        for _ in range(self.count):
            if self.number:
                os.kill(os.getpid(), self.number)
                self.number = None
            time.sleep(self.seconds)
            yield self.batch


WHEN = {"first": {"batch": 1}, "save": {"at_save": True}}
VALIDATION = {"validate": signal.SIGINT, "validated": None}


def main(directory, seconds, rate, when, coordinator=None, processes=None, process=None):
    place = (coordinator, processes and int(processes), process and int(process))
    joined = contextlib.nullcontext()
    if coordinator:
        joined = job(*place, limits=Limits(heartbeat_s=10))
    changes = {}
    if when in VALIDATION:
        # Whoever runs the tests in the background has them ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        number = VALIDATION[when]
        changes = {"evaluate_every": 4, "validate": lambda batch: Long(batch, 600, 0.2, number)}
    with handled(), joined:
        train_child.run(
            directory,
            float(seconds),
            functools.partial(Signalling, number=signal.SIGTERM, **WHEN.get(when, {})),
            mesh=(jax.device_count(), 1, 1),
            learning_rate=float(rate),
            **CHANGES | changes,
        )


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except Stopped as stopped:
        print(f"error: {stopped}", file=sys.stderr, flush=True)
        os._exit(stopped.status)
