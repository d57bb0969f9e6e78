"""Runs that are asked to end, by SIGTERM, Ctrl-C or JAX's notice, and saves by the clock."""

import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import label_child
import numpy as np
import pytest
import small
import train_child
from stop_child import CHANGES, Long, Signalling
from test_distributed import assert_same_lines, ended, free_port, lines_of, peers, start

from l2s_jax.cluster.stopping import Stopped, deferred, handled
from l2s_jax.experiment import label_files
from l2s_jax.training import clock

TESTS = Path(__file__).parent


def start_run(directory, seconds, rate=0.01, when=("never",)):
    """A run; of as many processes as `when` has, if more than one."""
    child = [sys.executable, TESTS / "stop_child.py", directory, seconds, rate]
    where = f"127.0.0.1:{free_port()}"
    places = [(where, len(when), i) for i in range(len(when))] if len(when) > 1 else [()]
    commands = [[*child, one, *place] for one, place in zip(when, places, strict=True)]
    return [start([*map(str, command)]) for command in commands]


def step_of(results, directory):
    """The step that the last lines of a run name, which has saved all steps until then."""
    for status, line in results:
        assert status == 143, results
        found = re.fullmatch(
            rf"error: (process \d: )?terminated after step (\d+) of {directory.name}, which is "
            "saved; the same command continues",
            line,
        )
        assert found, results
    step = int(found[2])
    assert newest(directory) == step
    assert [line["step"] for line in lines_of(directory)] == list(range(2, step + 1, 2))
    return step


def newest(directory):
    return max(int(path.name) for path in (directory / "checkpoints").iterdir())


def interrupted(directory, batch=None, **settings):
    """A run in this process that Ctrl-C comes to while it waits for a batch, if one is given."""

    def wrap(batches):
        return Signalling(batches, signal.SIGINT, batch=batch)

    settings = CHANGES | settings
    # Whoever runs the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    with pytest.raises(Stopped) as error, handled():
        train_child.run(str(directory), wrap=wrap, **settings)
    signal.signal(signal.SIGINT, before)
    assert error.value.status == 130
    return str(error.value)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    return train_child.run(str(directory), **CHANGES), lines_of(directory)


def test_a_run_that_is_asked_to_end_saves_its_last_step_and_continues_exactly(
    uninterrupted, tmp_path
):
    (child,) = start_run(tmp_path, 0.15)
    metrics = tmp_path / "metrics.jsonl"
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.4))
    child.send_signal(signal.SIGTERM)
    step = step_of(ended([child]), tmp_path)
    assert f"interrupted after step {step + 3} of" in interrupted(tmp_path, 3)
    assert newest(tmp_path) == step + 3 < train_child.STEPS
    small.assert_same(train_child.run(str(tmp_path), **CHANGES), uninterrupted[0])
    assert lines_of(tmp_path) == uninterrupted[1]


def test_two_processes_save_the_same_step_and_continue(uninterrupted, tmp_path):
    for name in ("parts", "wild"):
        (tmp_path / name).mkdir()
    parts = tmp_path / "parts"
    wild = start_run(tmp_path / "wild", 0, 1e30, when=("never", "never"))
    interrupted(parts, 5)
    # While the first step is compiled, of a run that goes on from another one.
    children = start_run(parts, 0.15, when=("never", "first"))
    assert 5 < step_of(ended(children), parts) < train_child.STEPS
    # After the last step, where there is no other to agree on.
    for status, line in ended(start_run(parts, 0, when=("save", "never"))):
        assert status == 143 and " terminated" in line and "the same command continues" in line
    assert newest(parts) == train_child.STEPS
    weights = train_child.run(str(parts), **CHANGES)
    small.assert_same(weights, uninterrupted[0], rtol=1e-3, atol=1e-5)
    assert_same_lines(parts, uninterrupted[1])
    # A loss that is not finite ends both, too.
    for status, line in ended(wild):
        assert status == 1 and re.match(r"error: (process \d: )?wild: step \d+: .*grad norm", line)


def test_a_validation_that_is_asked_to_end_is_made_by_the_run_that_continues(tmp_path):
    settings = {"evaluate_every": 8, "select": "best"}
    expected = train_child.run(str(tmp_path / "slm"), **CHANGES | settings)

    def ask(batch):
        return Long(batch, 1, number=signal.SIGINT)

    directory = tmp_path / "cut" / "slm"
    for _ in range(2):  # the second time in the validation that is made up for
        words = "interrupted after step 8 of slm, which is saved"
        assert words in interrupted(directory, validate=ask, **settings)
        assert newest(directory) == 8
    assert all("val_loss" not in line for line in lines_of(directory))
    # A kill between a line and the checkpoint that it belongs to leaves the line.
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "val_loss": 9.0}\n')
    small.assert_same(train_child.run(str(directory), **CHANGES | settings), expected)
    assert lines_of(directory) == lines_of(tmp_path / "slm")


def test_processes_end_a_long_validation_together_by_ctrl_c(tmp_path):
    results = ended(start_run(tmp_path, 0, when=("validated", "validate")))
    for status, line in results:
        words = f"interrupted after step 4 of {tmp_path.name}, which is saved"
        assert status == 130 and words in line, results
    assert newest(tmp_path) == 4
    assert all("val_loss" not in line for line in lines_of(tmp_path))


def test_a_process_that_waits_for_another_is_asked_to_end_too():
    jobs = [peers((2, 0), (2, 1), action="wait") for _ in range(2)]
    for process in (*jobs[0], *jobs[1]):
        assert process.stdout.readline() == "waiting\n"
    for victim, job in enumerate(jobs):
        job[victim].send_signal(signal.SIGTERM)
    begun = time.monotonic()
    for victim, job in enumerate(jobs):
        results = ended(job)
        words = "terminated; the same command continues with what is done"
        assert results[victim] == (143, f"error: {words}")
        assert results[1 - victim] == (143, f"error: process {victim}: {words}")
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stage_that_trains_nothing_ends_at_once_and_keeps_what_is_done(
    number, tmp_path, monkeypatch
):
    monkeypatch.setattr(label_files, "SHARD", 8)
    asked = []

    class Generator:
        def answered(self, prompts, **_):
            for first in range(0, len(prompts), 8):
                places = [*range(len(prompts))[first : first + 8]]
                asked.extend(prompts[i] for i in places)
                if len(asked) == 24:
                    os.kill(os.getpid(), number)
                yield places, [label_child.Output(prompts[i], 1, False) for i in places]

    before = signal.signal(number, signal.SIG_DFL)
    words = "the same command continues with what is done"
    with pytest.raises(Stopped, match=words) as error, handled():
        label_child.label(label_child.EXAMPLES, Generator, str(tmp_path))
    assert error.value.status == 128 + number
    assert signal.signal(number, before) == signal.SIG_DFL
    assert len(list(tmp_path.glob("train-*.jsonl"))) == 2
    label_child.label(label_child.EXAMPLES, Generator, str(tmp_path))
    prompts = [example.prompt for example in label_child.EXAMPLES]
    assert sorted(asked) == sorted([*prompts, *prompts[16:24]])


def test_the_first_signal_waits_for_a_step_and_the_second_does_not():
    def ask():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped), handled(), deferred() as asked:
        assert asked() is None
        ask()
        assert asked() is signal.SIGTERM
        ask()
        raise AssertionError("the second signal was not heard")
    # What comes at the very end is not forgotten.
    with pytest.raises(Stopped, match="terminated"), handled(), deferred():
        ask()


def test_the_clock_saves_the_newest_steps_and_changes_nothing(uninterrupted, tmp_path):
    always = {**CHANGES, "save_minutes": 1e-9}
    with pytest.raises(small.Stop):
        train_child.run(str(tmp_path), wrap=lambda b: small.Stopping(b, 11), **always)
    saved = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert saved == [9, 10, 11]
    small.assert_same(train_child.run(str(tmp_path), **CHANGES), uninterrupted[0])
    assert lines_of(tmp_path) == uninterrupted[1]


def test_the_clock_is_asked_seldom_and_is_not_late(monkeypatch):
    now, asked = [0.0], []
    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(
        clock.distributed, "on_primary", lambda action: asked.append(now[0]) or action()
    )
    timer, saves = clock.Clock(10.0, 0), []
    for step in range(1, 40_000):
        now[0] += 20.0 if step == 1 else 0.1 if step < 20_000 else 0.3
        if timer.is_due(step):
            saves.append(now[0])
            timer.restart(step)
    gaps = np.diff([0.0, *saves])
    assert len(saves) == int(now[0] / 600) and gaps.min() >= 600 and gaps.max() < 615
    assert len(asked) < 50 * len(saves)
    never = clock.Clock(0.0, 0)
    assert not any(never.is_due(step) for step in range(1, 99))
