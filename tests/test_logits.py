"""The LLM's distributions on disk: what they hold, how batches hold them, and through kills."""

import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import logits_child
import numpy as np
import pytest
import small
from test_features import rewritten, shortened

from l2s_jax.data.batches import training_batches, validation_batches
from l2s_jax.experiment import logit_files, scoring
from l2s_jax.experiment.record_files import distinct
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LanguageModel

TESTS = os.path.dirname(os.path.abspath(__file__))
PAIRS = small.random_pairs(19, 7)


def make_llm(family):
    if family == "t5":
        return small.make_system("llm")
    config = GPT2Config(
        vocab_size=small.VOCABULARY, width=16, num_heads=2, num_layers=1, max_positions=32
    )
    return LanguageModel("llm", config)


def read_with(system, params, data, directory, *, k, temperature=1.0, mesh=(1, 1, 1)):
    mesh = small.mesh_of(*mesh)
    return scoring.scored(
        data,
        str(directory),
        lambda: scoring.Scorer(system, params, mesh, top_k=k, temperature=temperature),
        top_k=k,
        vocabulary=small.VOCABULARY,
        buckets=((4, 4), (8, 8)),
        batch_size=8,
        mesh=mesh,
    )


@pytest.mark.parametrize(
    ("family", "temperature", "mesh"),
    [("t5", 1.0, (1, 1, 1)), ("gpt2", 2.0, (1, 1, 1)), ("t5", 1.0, (2, 2, 2))],
)
def test_it_holds_what_the_llm_finds_likeliest_at_each_token(family, temperature, mesh, tmp_path):
    system = make_llm(family)
    params, _ = small.make_params(system)
    data = small.make_data(PAIRS, (8, 8))
    settings = {"temperature": temperature, "mesh": mesh}
    kept = read_with(system, params, data, tmp_path, k=5, **settings)
    logits = jax.jit(small.logits_of(system))
    shares = []
    for index, (prompt, response) in enumerate(data[i] for i in range(len(data))):
        # Padded in another way, and alone.
        batch = data.padded(np.array([index]), 8, 9, "llm")
        scores = np.asarray(logits(params, {}, batch))[0, : len(response)].astype(np.float64)
        expected = scores / temperature
        expected -= np.log(np.exp(expected).sum(-1, keepdims=True))
        ids, log_probs = kept[index]
        assert ids.shape == (len(response), 5) and log_probs.shape == (len(response), 6)
        own = np.take_along_axis(expected, ids.astype(int), -1)
        np.testing.assert_allclose(own, -np.sort(-expected, -1)[:, :5], atol=1e-4)
        rest = 1 - np.exp(own).sum(-1, keepdims=True)
        true = np.concatenate([own, np.log(rest)], -1)
        # Each is rounded, and all are brought to a sum of one.
        error = np.abs(true).max(-1, keepdims=True) / 1024 + 1e-4
        assert np.all(np.abs(log_probs - true) < error), prompt
        np.testing.assert_allclose(np.exp(log_probs.astype(float)).sum(-1), 1, atol=1e-6)
        shares.append(rest[:, 0])
    shares = np.concatenate(shares)
    assert kept.left_out()["mean"] == pytest.approx(shares.mean(), rel=1e-2)
    assert kept.left_out()["p99"] == pytest.approx(np.percentile(shares, 99), rel=1e-2)


def test_of_a_whole_vocabulary_nothing_is_left_out(tmp_path):
    system = make_llm("t5")
    params, _ = small.make_params(system)
    data = small.make_data(PAIRS[:3], (8, 8))
    kept = read_with(system, params, data, tmp_path, k=small.VOCABULARY)
    assert kept.left_out() == {"mean": 0.0, "p99": 0.0}
    ids, log_probs = kept[1]
    assert (np.sort(ids, -1) == np.arange(small.VOCABULARY)).all()
    assert np.isneginf(log_probs[:, -1]).all() and np.isfinite(log_probs[:, :-1]).all()


def test_ids_of_a_large_vocabulary_take_four_bytes(tmp_path):
    ids = np.array([[65535, 3], [151000, 65536]], np.int32)
    log_probs = np.log(np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])).astype(np.float16)
    data = small.make_data([("3", "4")], (8, 8))  # and its end: two tokens
    for vocabulary, size in ((1 << 16, 2 * (2 * 2 + 3 * 2)), (151936, 2 * (2 * 4 + 3 * 2))):
        own = np.minimum(ids, vocabulary - 1)
        content = logit_files.encoded(own, log_probs, vocabulary)
        assert content.nbytes == size == 2 * logit_files.token_bytes(2, vocabulary)
        folder = tmp_path / str(vocabulary)
        folder.mkdir()
        store = logit_files.LogitFiles(str(folder))
        store.write(0, data.pair_keys, [content])
        kept = logit_files.Logits(store, store.files(), data, 2, vocabulary)
        np.testing.assert_array_equal(kept[0][0], own)
        np.testing.assert_allclose(kept[0][1], log_probs.astype(np.float32), atol=1e-3)


def test_batches_hold_them_beside_the_responses(tmp_path):
    data = small.make_data(PAIRS, (8, 8))
    data.teacher = logits_child.read(str(tmp_path), data=data)
    settings = {"prompt_name": "llm", "buckets": ((4, 4), (8, 8)), "batch_size": 4}
    batches = training_batches(data, seed=0, **settings)
    by_ids = {(tuple(p), tuple(r)): i for i, (p, r) in enumerate(data[i] for i in range(19))}
    for batch, _ in zip(batches, range(8), strict=False):
        assert batch["teacher_ids"].dtype == np.int32
        assert batch["teacher_log_probs"].dtype == np.float32
        mask = batch["response_mask"]
        assert batch["teacher_ids"].shape == (*mask.shape, logits_child.K)
        for row in range(4):
            prompt = batch["llm_ids"][row][batch["llm_mask"][row]]
            response = batch["response_ids"][row][mask[row]]
            ids, log_probs = data.teacher[by_ids[tuple(prompt), tuple(response)]]
            np.testing.assert_array_equal(batch["teacher_ids"][row][mask[row]], ids)
            kept = batch["teacher_log_probs"][row][mask[row]]
            np.testing.assert_array_equal(kept, log_probs[:, :-1])
            assert (batch["teacher_ids"][row][~mask[row]] == -1).all()
            assert np.isfinite(batch["teacher_log_probs"][row]).all()
    # Rows without an example have none; who has no teacher has no such keys.
    assert (data.padded(np.array([-1]), 4, 4, "llm")["teacher_ids"] == -1).all()
    plain = small.make_data(PAIRS, (8, 8))
    (first, *_) = validation_batches(plain, rows=np.arange(4), **settings)
    assert not [name for name in first if name.startswith("teacher")]


def test_ids_may_have_other_places_in_the_slm(tmp_path):
    data = small.make_data(PAIRS, (8, 8))
    kept = logits_child.read(str(tmp_path), data=data)
    places = np.where(np.arange(small.VOCABULARY) % 3 == 0, -1, np.arange(small.VOCABULARY) // 3)
    indices = np.array([2, -1, 0])
    ids, log_probs = kept.padded(indices, 8)
    moved, same = kept.placed(places.astype(np.int32)).padded(indices, 8)
    np.testing.assert_array_equal(same, log_probs)
    np.testing.assert_array_equal(moved, np.where(ids < 0, -1, places[ids]))
    assert moved.dtype == np.int32 and (moved == -1).sum() > (ids == -1).sum()
    np.testing.assert_array_equal(kept.padded(indices, 8)[0], ids)


def test_killed_at_any_moment_it_continues_without_repeating_or_losing_any(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SHARD_BYTES", scoring.SHARD_BYTES)
    logits_child.small_shards()
    whole = logits_child.read(str(tmp_path))
    directory = tmp_path / "killed"
    directory.mkdir()
    asked, delays = directory / "asked.txt", []
    for kills in range(1, 3):
        environment = {"PYTHONPATH": os.pathsep.join([os.path.dirname(TESTS), *sys.path])}
        child = subprocess.Popen(
            [sys.executable, os.path.join(TESTS, "logits_child.py"), str(directory)],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        while child.poll() is None and not (asked.exists() and asked.stat().st_size):
            time.sleep(0.005)
        # At least one shard a life, so that the last of them has something left to do.
        delays.append(random.uniform(0, 6 * logits_child.SECONDS))
        time.sleep(delays[-1])
        child.send_signal(signal.SIGKILL)
        error = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL, f"before kill {kills}: {delays} {error}"
        asked.unlink()
    folder = directory / "logits"
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.array_record")}
    # As a kill between two system calls would leave it.
    (folder / "logits-00001-01234567.array_record.0123.tmp").write_bytes(b"half")
    store = logit_files.LogitFiles(str(folder))
    there = set(store.keys([*map(str, written)]).tolist())
    wanted = set(logits_child.DATA.pair_keys.tolist())
    kept = logits_child.read(str(directory))
    assert len(asked.read_text().splitlines()) == len(wanted - there), delays
    assert written.items() <= {p: p.stat().st_mtime_ns for p in folder.iterdir()}.items(), delays
    assert not list(folder.glob("*.tmp")), delays
    for index in range(len(logits_child.DATA)):
        for found, expected in zip(kept[index], whole[index], strict=True):
            np.testing.assert_array_equal(found, expected)


def test_a_run_that_continues_reads_the_batches_that_are_left(tmp_path, monkeypatch):
    """All batches but the last are full, whatever a shard holds, and none is put together anew."""
    monkeypatch.setattr(scoring, "SHARD_BYTES", scoring.SHARD_BYTES)
    logits_child.small_shards()

    class Noted(logits_child.Score):
        def __init__(self, directory, most=99):
            super().__init__(directory)
            self.batches, self.most = [], most

        def __call__(self, batch):
            if len(self.batches) == self.most:
                raise KeyboardInterrupt
            self.batches.append([row.tobytes() for row in np.asarray(batch["llm_ids"])])
            return super().__call__(batch)

    def read(score):
        monkeypatch.setattr(logits_child, "Score", lambda *_: score)
        logits_child.read(score.asked.removesuffix("asked.txt"), batch_size=5)

    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = Noted(str(tmp_path / "whole"))
    read(whole)
    assert sum(len(set(rows)) < 5 for rows in whole.batches) <= 1
    first, second = (Noted(str(tmp_path / "killed"), most) for most in (9, 99))
    with pytest.raises(KeyboardInterrupt):
        read(first)
    read(second)
    assert first.batches == whole.batches[:9]
    lost = len(first.batches) + len(second.batches) - len(whole.batches)
    assert second.batches == whole.batches[9 - lost :]
    assert 0 < lost < 4


def test_they_belong_to_prompt_and_response_whatever_their_order(tmp_path):
    data = small.make_data(PAIRS, (8, 8))
    first = logits_child.read(str(tmp_path), data=data)
    asked = tmp_path / "asked.txt"
    asked.unlink()
    # Another response to a prompt that was read is read; a pair that is there is not, even twice.
    other = small.make_data([(PAIRS[0][0], "9 9"), *PAIRS[::-1], PAIRS[3]], (8, 8))
    found = logits_child.read(str(tmp_path), data=other)
    assert len(asked.read_text().splitlines()) == 1
    for place, index in ((1, 18), (19, 0), (20, 3)):
        np.testing.assert_array_equal(found[place][1], first[index][1])


def refused(directory, data):
    """The one line that says why."""
    with pytest.raises(ValueError) as error:
        logits_child.read(str(directory), data=data)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_damaged_shard_is_one_line(tmp_path):
    data = small.make_data(PAIRS, (8, 8))
    logits_child.read(str(tmp_path), data=data)
    (path,) = (tmp_path / "logits").glob("*.array_record")
    shortened(path)
    line = refused(tmp_path, data)
    assert line.startswith(f"{path}: not readable")
    assert line.endswith("remove it, and the same command makes it again")
    rewritten([b"xy"] * distinct(data.pair_keys))(path)
    with pytest.raises(ValueError, match="2 bytes for response 0, expected"):
        logits_child.read(str(tmp_path), data=data)[0]
    path.unlink()
    logits_child.read(str(tmp_path), data=data)[0]


def test_a_full_disk_is_found_out_before_the_llm_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    data = small.make_data(PAIRS, (8, 8))
    line = refused(tmp_path, data)
    assert "0.0 GB are free there" in line and "smaller config.distillation.top_k" in line
    assert not list((tmp_path / "logits").iterdir()) and not (tmp_path / "asked.txt").exists()
