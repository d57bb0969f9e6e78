"""The labels that an LLM gives: through interruptions and kills, and by several processes."""

import collections
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from unittest import mock

import label_child
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.data.table import Example
from l2s_jax.experiment import label_files
from l2s_jax.experiment.label_files import Label
from l2s_jax.serving.generator import Output

TESTS = os.path.dirname(os.path.abspath(__file__))


class Counting:
    """A generator that answers two prompts at a time, the last ones first, and can be killed."""

    def __init__(self, fail_after=None):
        self.seen, self.fail_after = 0, fail_after

    def answered(self, prompts, *, description, part, seeds=None):
        assert part == (0, 1)
        order = range(len(prompts))[::-1]
        for start in range(0, len(prompts), 2):
            if self.fail_after is not None and self.seen >= self.fail_after:
                raise KeyboardInterrupt
            places = list(order[start : start + 2])
            self.seen += len(places)
            yield places, [self.output(prompts[i], seeds and seeds[i]) for i in places]

    def output(self, prompt, seed):
        return Output(f"answer to {prompt}", 1, False)


def lines_of_files(directory):
    return [path.read_text().splitlines() for path in sorted(directory.glob("train-*"))]


def test_labels_continue_after_an_interruption_without_repeating_or_losing_any(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(label_files, "SHARD", 4)
    examples = [Example(f"prompt {i}", "old", ("old",)) for i in range(11)]
    with pytest.raises(KeyboardInterrupt):
        label_child.label(examples, lambda: Counting(fail_after=6), str(tmp_path))
    # What was not in a whole file yet is lost, and nothing else.
    second = Counting()
    labelled = label_child.label(examples, lambda: second, str(tmp_path))
    assert second.seen == 7
    assert [len(lines) for lines in lines_of_files(tmp_path)] == [4, 4, 3]
    assert [e.prompt for e in labelled] == [e.prompt for e in examples]
    assert [e.response for e in labelled] == [f"answer to {e.prompt}" for e in examples]

    def never():
        raise AssertionError("all labels are there")

    assert list(label_child.label(examples, never, str(tmp_path))) == list(labelled)


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


def examples_of(*prompts):
    return Unsliceable([Example(prompt, "old", ("old",)) for prompt in prompts])


def test_labels_belong_to_prompts_whatever_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "SHARD", 2)
    label_child.label(examples_of("a", "b", "c", "b"), Counting, str(tmp_path))
    grown = Counting()
    labelled = label_child.label(examples_of("d", "c", "b", "a"), lambda: grown, str(tmp_path))
    assert grown.seen == 1
    assert [e.response for e in labelled] == [f"answer to {prompt}" for prompt in "dcba"]


def test_splits_have_files_of_their_own(tmp_path):
    label_child.label(examples_of("a", "b"), Counting, str(tmp_path))
    validation = Counting()
    labelled = label_child.label(
        examples_of("b", "c"), lambda: validation, str(tmp_path), split="validation"
    )
    assert validation.seen == 2
    assert [e.response for e in labelled] == ["answer to b", "answer to c"]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"train-00000.jsonl", "validation-00000.jsonl"}
    assert label_files.LabelFiles(str(tmp_path)).count() == 2


class Sampling(Counting):
    """A generator that answers with the seed."""

    def output(self, prompt, seed):
        return Output(f"{prompt} {seed}", 1, False)


def test_sampled_labels_have_seeds_of_their_places_in_the_split(tmp_path, monkeypatch):
    monkeypatch.setattr(label_files, "SHARD", 2)

    def label(seed, *prompts):
        directory = str(tmp_path / str(seed))
        os.makedirs(directory, exist_ok=True)
        labelled = label_child.label(examples_of(*prompts), Sampling, directory, seed=seed)
        return [example.response for example in labelled]

    first = label(0, "a", "a", "b", "a", "b")
    assert len({response.split()[1] for response in first}) == 5
    assert first == [f"{p} {label_files.seed_of(0, i)}" for i, p in enumerate("aabab")]
    assert not set(first) & set(label(1, "a", "a", "b", "a", "b"))
    # Each repetition keeps its own.
    assert label(0, "b", "a", "b", "a", "a") == [first[i] for i in (2, 0, 4, 1, 3)]


@pytest.mark.parametrize("line", ['{"response": "x"}', '{"prompt": "x"}', "3"])
def test_a_line_that_is_no_label_is_refused(line, tmp_path):
    (tmp_path / "train-00000.jsonl").write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"train-00000\.jsonl:1: .*expected"):
        label_child.label(examples_of("a"), Counting, str(tmp_path))
    (tmp_path / "train-00000.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"train-00000\.jsonl:1: not readable as JSON"):
        label_child.label(examples_of("a"), Counting, str(tmp_path))


def test_labels_without_prompts_are_given_those_at_their_places(tmp_path):
    for number, responses in enumerate((["1", "2"], ["3"])):
        lines = "".join(json.dumps({"response": response}) + "\n" for response in responses)
        (tmp_path / f"train-{number:05d}.jsonl").write_text(lines)
    store = label_files.LabelFiles(str(tmp_path))
    with pytest.raises(ValueError, match=r"train-00001\.jsonl: labels of more than the 2 prompts"):
        store.give_keys(["a", "b"])
    store.give_keys(label_files.Keys("abc", sampled=False))
    labelled = label_child.label(examples_of("c", "b", "a"), None, str(tmp_path))
    assert [example.response for example in labelled] == ["3", "2", "1"]


prompts = st.lists(st.sampled_from(["a", "b", "c", "ä\ud83d"]), max_size=12)


@settings(deadline=None, max_examples=100)
@given(prompts=prompts, there=st.lists(prompts, max_size=3), sampled=st.booleans())
def test_keys_are_hashes_of_prompts_and_numbers_of_their_likes(prompts, there, sampled):
    def keys_of(prompts):
        seen = collections.Counter()
        for prompt in prompts:
            key = hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:32]
            yield f"{key}-{seen[key]}" if sampled and seen[key] else key
            seen[key] += 1

    keys, expected = label_files.Keys(prompts, sampled=sampled), list(keys_of(prompts))
    assert list(keys) == expected and keys[1:-1] == expected[1:-1]
    lines = [[(key, Label("", False)) for key in keys_of(part)] for part in there]
    store = label_files.LabelFiles("")
    with mock.patch.object(store, "read", lambda files: itertools.chain(*lines)):
        missing = store.missing([], keys)
    known = {key for line in lines for key, _ in line}
    first = {key: place for place, key in reversed(list(enumerate(expected)))}
    assert missing.tolist() == sorted(place for key, place in first.items() if key not in known)


def test_of_a_prompt_with_two_labels_the_last_counts_and_one_without_is_named(tmp_path):
    store, keys = label_files.LabelFiles(str(tmp_path)), label_files.Keys("abab", sampled=False)
    store.write(0, keys[:2], [Label("first ä", True), Label("second", False)])
    store.write(1, [*keys[:1], "any text"], [Label("third ü\n", False), Label("", True)])
    labelled = label_files.Labelled([Example(p, "old", ("x",)) for p in "abab"], keys, store)
    expected = [Example(p, r, (r,)) for p, r in (("a", "third ü\n"), ("b", "second"))] * 2
    assert list(labelled) == expected == labelled[:] and labelled[-1] == expected[-1]
    more = label_files.Keys("abc", sampled=False)
    with pytest.raises(ValueError, match=f"no label of prompt {more[2]}"):
        label_files.Labelled([Example(p, "old", ("x",)) for p in "abc"], more, store)
