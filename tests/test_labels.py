"""The labels that an LLM gives: through interruptions and kills, and by several processes."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import label_child
import pytest

from l2s_jax.data.tasks import Example
from l2s_jax.experiment import labels
from l2s_jax.serving.generator import Output

TESTS = os.path.dirname(os.path.abspath(__file__))


class Counting:
    """A generator that answers with the number of prompts seen before, and can be killed."""

    def __init__(self, fail_after=None):
        self.seen, self.fail_after = 0, fail_after

    def generate(self, prompts, *, description=""):
        if self.fail_after is not None and self.seen >= self.fail_after:
            raise KeyboardInterrupt
        self.seen += len(prompts)
        return [Output(f"answer to {prompt}", 1, False) for prompt in prompts]


def test_labels_continue_after_an_interruption_without_repeating_or_losing_any(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(labels, "SHARD", 4)
    examples = [Example(f"prompt {i}", "old", ("old",)) for i in range(11)]
    with pytest.raises(KeyboardInterrupt):
        labels.label(examples, lambda: Counting(fail_after=4), str(tmp_path))
    second = Counting()
    labelled = labels.label(examples, lambda: second, str(tmp_path))
    assert second.seen == 7
    assert [e.prompt for e in labelled] == [e.prompt for e in examples]
    assert [e.response for e in labelled] == [f"answer to {e.prompt}" for e in examples]

    def never():
        raise AssertionError("all labels are there")

    assert labels.label(examples, never, str(tmp_path)) == labelled


def test_killed_at_any_moment_it_continues_without_repeating_or_losing_any(tmp_path):
    def start():
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([os.path.dirname(TESTS), *sys.path]),
        }
        child = [sys.executable, os.path.join(TESTS, "label_child.py"), str(tmp_path)]
        return subprocess.Popen(child, env=environment, stderr=subprocess.PIPE, text=True)

    asked = tmp_path / "asked.txt"
    delays = []
    for kills in range(1, 4):
        child = start()
        while child.poll() is None and not (asked.exists() and asked.stat().st_size):
            time.sleep(0.005)
        # At least one file a life, so that the last of them has something left to do.
        delays.append(random.uniform(0, 4 * label_child.SECONDS))
        time.sleep(delays[-1])
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert child.returncode == -signal.SIGKILL, f"it ended before kill {kills}: {delays}"
        written = set(tmp_path.glob("train-*.jsonl"))
        before = {path: path.stat().st_mtime_ns for path in written}
        asked.unlink()
    child = start()
    errors = child.communicate()[1]
    assert child.returncode == 0, f"killed after {delays}: {errors}"

    expected = [f"answer to {example.prompt}" for example in label_child.EXAMPLES]
    assert json.loads((tmp_path / "labelled.json").read_text()) == expected, delays
    # What was there is not made again, and only what was missing is asked for.
    assert {path: path.stat().st_mtime_ns for path in written} == before, delays
    missing = len(label_child.EXAMPLES) - label_child.SHARD * len(written)
    assert len(asked.read_text().splitlines()) == missing, delays


class Unsliceable(Sequence):
    """Random access and a length, as TFDS gives."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        assert isinstance(index, int)
        if index >= len(self.examples):
            raise IndexError
        return self.examples[index]


def test_processes_share_the_labelling(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "SHARD", 2)
    barrier = threading.Barrier(2)
    monkeypatch.setattr(labels.distributed, "barrier", lambda _: barrier.wait(timeout=60))
    examples = Unsliceable([Example(f"prompt {i}", "old", ("old",)) for i in range(9)])
    generators = [Counting(), Counting()]

    def run(index):
        return labels.label(
            examples,
            lambda: generators[index],
            str(tmp_path),
            process_index=index,
            process_count=2,
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(run, range(2))
    assert [generator.seen for generator in generators] == [5, 4]
    assert first == second
    assert [e.response for e in first] == [f"answer to prompt {i}" for i in range(9)]


def test_a_label_file_with_a_wrong_count_is_refused(tmp_path):
    path = tmp_path / "train-00000.jsonl"
    path.write_text(json.dumps({"response": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"train-00000\.jsonl: 1 labels, expected 2"):
        labels.label([Example("a", "b", ("b",))] * 2, Counting, str(tmp_path))
