"""The feature cache: what it holds, that training from it is the same, and what it refuses."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest import mock

import features_child
import jax
import ml_dtypes
import numpy as np
import pytest
import small
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.checkpoints import pretrained
from l2s_jax.data import batches
from l2s_jax.data.batches import training_batches, validation_batches
from l2s_jax.experiment import feature_cache, feature_files
from l2s_jax.experiment.record_files import RecordFiles, Records, distinct
from l2s_jax.models.lora import Lora
from l2s_jax.training import loop, update

TESTS = os.path.dirname(os.path.abspath(__file__))
PAIRS = small.random_pairs(19, 7)
SYSTEMS = (*small.FUSIONS, "two vocabularies", "lora")
# H is rounded to 8 bits.
ROUNDED = 2.0**-8


def make_case(name):
    """(system, trained, frozen, frozen where batches hold H)."""
    system = small.make_system(name if name in small.FUSIONS else "add")
    if name == "two vocabularies":
        system = dataclasses.replace(system, shared_vocabulary=False)
    trained, frozen = small.make_params(system)
    beside = {entry: frozen[entry] for entry in system.beside_hidden}
    if name != "lora":
        return system, trained, frozen, beside
    lora = Lora(system, rank=2, alpha=4.0, pattern=".*attention/.*kernel")
    trained, base = lora.split(trained, jax.random.key(0))
    return lora, trained, *({"base": base, "inner": inner} for inner in (frozen, beside))


def encode_with(system, frozen, data, directory, mesh=(1, 1, 1), llm_hash="a" * 64):
    mesh = small.mesh_of(*mesh)
    return feature_cache.cached(
        data,
        str(directory),
        features_child.FACTS | {"llm_hash": llm_hash},
        lambda: feature_cache.Encoder(system.llm_config, frozen, mesh),
        mesh=mesh,
        split="train",
        width=system.llm_config.width,
        buckets=[8],
        batch_size=8,
    )


def test_it_holds_what_the_llm_makes_of_each_prompt_whatever_the_mesh(tmp_path):
    system, _, frozen, _ = make_case("add")
    data = small.make_data(PAIRS, (8, 8))
    mesh = (2, 2, 1) if jax.device_count() >= 4 else (1, 1, 1)
    kept = encode_with(system, frozen, data, tmp_path, mesh)
    ids, mask = data.padded_prompts(np.arange(19), 8)
    hidden = np.asarray(jax.jit(system.encode)({}, frozen, ids, mask))
    for index, length in enumerate(data.prompt_lengths):
        assert kept[index].shape == (length, 24) and kept[index].dtype == ml_dtypes.bfloat16
        np.testing.assert_allclose(
            kept[index].astype(np.float32), hidden[index, :length], rtol=ROUNDED, atol=1e-5
        )
    indices = np.array([3, -1, 0])
    padded = kept.padded(indices, 8)
    for row, index in zip(padded, indices, strict=True):
        length = data.prompt_lengths[index] if index >= 0 else 0
        np.testing.assert_array_equal(row[:length], kept[int(index)][:length])
        assert not row[length:].any()


@pytest.mark.parametrize("name", SYSTEMS)
def test_losses_are_those_of_encoding_and_padding_means_nothing(name):
    system, trained, frozen, beside = make_case(name)
    batch = small.make_batch(system)
    inner = system.system if name == "lora" else system
    llm = frozen["inner"] if name == "lora" else frozen
    encode = jax.jit(inner.encode, compiler_options=small.QUICK_COMPILATION)
    hidden = encode({}, llm, batch["llm_ids"], batch["llm_mask"])
    hidden = np.asarray(hidden).astype(ml_dtypes.bfloat16)
    mask = batch["llm_mask"][..., None]
    zeros, noise = (np.where(mask, hidden, x).astype(hidden.dtype) for x in (0, 1e3 * hidden[::-1]))
    assert not mask.all()

    def loss(trained, frozen, batch):
        return update.batch_loss(system, trained, frozen, batch, None, 0.0)[0]

    loss = jax.jit(loss, compiler_options=small.QUICK_COMPILATION)
    expected = float(loss(trained, frozen, batch))
    found, other = (float(loss(trained, beside, batch | {"llm_hidden": x})) for x in (zeros, noise))
    assert other == found
    assert found != expected  # it is read, and rounded
    assert found == pytest.approx(expected, rel=4 * ROUNDED)


def make_batches(data, **settings):
    settings = {"prompt_name": "llm", "buckets": ((4, 4), (8, 8)), "batch_size": 8} | settings
    return training_batches(data, seed=3, **settings)


def test_batches_hold_it_and_continue_where_they_were_and_processes_read_their_rows(tmp_path):
    data = small.make_data(PAIRS, (8, 8))
    plain = make_batches(data)
    expected = [next(plain) for _ in range(5)]
    data.hidden = features_child.cache(str(tmp_path), data=data)
    batches = make_batches(data)
    found = [next(batches) for _ in range(2)]
    state = batches.get_state()
    found += [next(batches) for _ in range(3)]
    for batch, other in zip(found, expected, strict=True):
        hidden = batch["llm_hidden"]
        assert hidden.dtype == ml_dtypes.bfloat16
        encoded = features_child.Encoder(tmp_path)(batch["llm_ids"], batch["llm_mask"])
        np.testing.assert_array_equal(hidden, np.where(batch["llm_mask"][..., None], encoded, 0))
        small.assert_same({k: v for k, v in batch.items() if k != "llm_hidden"}, other)
    again = make_batches(data)
    again.set_state(state)
    small.assert_same([next(again) for _ in range(3)], found[2:])

    rows = np.array([1, 4, 5])
    own = make_batches(data, rows=rows)
    for batch in found:
        small.assert_same(next(own), {key: value[rows] for key, value in batch.items()})
    settings = {"prompt_name": "llm", "buckets": ((4, 4), (8, 8)), "batch_size": 8}
    whole = validation_batches(data, rows=np.arange(8), **settings)
    parts = validation_batches(data, rows=rows, **settings)
    for _ in range(2):  # as often as there is a validation
        pairs = list(zip(whole, parts, strict=True))
        assert len(pairs) == 3
        for batch, part in pairs:
            small.assert_same(part, {key: value[rows] for key, value in batch.items()})
            assert batch["llm_hidden"].shape == (*batch["llm_mask"].shape, 24)


def test_a_run_from_the_cache_is_the_run_that_encodes(tmp_path):
    system, trained, frozen, beside = make_case("add")
    data, validation = small.make_data(PAIRS, (8, 8)), small.make_data(PAIRS[:5], (8, 8))
    config = small.make_train_config(6, evaluate_every=3)

    def run(name, frozen):
        settings = {"prompt_name": "llm", "buckets": ((8, 8),), "batch_size": 8}
        loop.fit(
            system,
            frozen,
            trained,
            config,
            batches=training_batches(data, seed=0, **settings),
            validation=validation_batches(validation, rows=np.arange(8), **settings),
            directory=str(tmp_path / name),
            fingerprint="f",
            seed=0,
            mesh=small.mesh_of(),
        )
        with open(tmp_path / name / "metrics.jsonl") as file:
            return [json.loads(line) for line in file]

    expected = run("encoding", frozen)
    for split in (data, validation):
        split.hidden = encode_with(system, frozen, split, tmp_path / "features")
    found = run("cached", beside)
    assert len(found) == 8
    for line, other in zip(found, expected, strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=8 * ROUNDED), name
    assert any(a["loss"] != b["loss"] for a, b in zip(found, expected, strict=True) if "loss" in a)


def test_killed_at_any_moment_it_continues_without_encoding_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 0)
    features_child.small_shards()
    whole = features_child.cache(str(tmp_path / "whole"), data=features_child.DATA)
    directory = tmp_path / "killed"
    directory.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.path.dirname(TESTS), *sys.path]),
    }
    asked = directory / "asked.txt"
    delays = []
    for kills in range(1, 3):
        child = subprocess.Popen(
            [sys.executable, os.path.join(TESTS, "features_child.py"), str(directory)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        while child.poll() is None and not (asked.exists() and asked.stat().st_size):
            time.sleep(0.005)
        delays.append(random.uniform(0, 8 * features_child.SECONDS))
        time.sleep(delays[-1])
        child.send_signal(signal.SIGKILL)
        error = child.communicate()[1]
        assert child.returncode == -signal.SIGKILL, f"before kill {kills}: {delays} {error}"
        asked.unlink()
    (folder,) = (directory / "features").iterdir()
    written = set(folder.glob("*.array_record"))
    before = {path: path.stat().st_mtime_ns for path in written}
    # As a kill between two system calls would leave it.
    (folder / "features-00001-01234567.array_record.0123.tmp").write_bytes(b"half")
    (folder / "features-00001-01234567.index").write_bytes(b"k" * 16)
    store = feature_files.FeatureFiles(str(folder))
    there = set(store.keys([str(path) for path in written]).tolist())
    wanted = set(features_child.DATA.prompt_keys.tolist())
    kept = features_child.cache(str(directory), data=features_child.DATA)
    assert len(asked.read_text().splitlines()) == len(wanted - there), delays
    assert {path: path.stat().st_mtime_ns for path in written} == before, delays
    for index in range(98):
        np.testing.assert_array_equal(kept[index], whole[index])
    assert not list(folder.glob("*.tmp")), delays
    assert set(store.keys(store.files()).tolist()) == wanted, delays


def never(*_):
    raise AssertionError("all of it is there")


@pytest.fixture
def filled(tmp_path, monkeypatch):
    """(directory of a cache of 19 prompts in four shards, its one subfolder, the data)."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1200)
    data = small.make_data(PAIRS, (8, 8))
    features_child.cache(str(tmp_path), data=data)
    (folder,) = (tmp_path / "features").iterdir()
    assert len(list(folder.glob("*.array_record"))) > 3
    return tmp_path, folder, data


def test_a_prompt_is_found_again_and_another_llm_has_a_folder_of_its_own(filled, monkeypatch):
    directory, folder, data = filled
    facts = json.loads((folder / "features.json").read_text())
    assert facts["llm_hash"] == "a" * 64 and facts["width"] == 24
    files = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    for made, change in enumerate(({"llm_hash": "b" * 64}, {"layer": 2.0}), start=2):
        features_child.cache(str(directory), data=data, **change)
        assert len(list((directory / "features").iterdir())) == made
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == files
    # A prompt that is new is all that is encoded.
    asked = directory / "asked.txt"
    asked.unlink()
    changed = small.make_data([("3 4 5", "6"), *PAIRS[1:]], (8, 8))
    features_child.cache(str(directory), data=changed)
    assert len(asked.read_text().splitlines()) == 1
    assert files.items() <= {p: p.stat().st_mtime_ns for p in folder.iterdir()}.items()
    monkeypatch.setattr(features_child.Encoder, "__call__", never)
    expected = features_child.cache(str(directory), data=data)
    # Responses are no part of it, nor is the order.
    turned = small.make_data([(prompt, "7") for prompt, _ in reversed(PAIRS)], (8, 8))
    found = features_child.cache(str(directory), data=turned)
    for index in range(len(PAIRS)):
        np.testing.assert_array_equal(found[index], expected[len(PAIRS) - 1 - index])


def refused(directory, data, **facts):
    """The one line that says why."""
    with pytest.raises(ValueError) as error:
        features_child.cache(str(directory), data=data, **facts)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_features_of_another_llm_under_this_ones_name_are_refused(filled, tmp_path):
    directory, folder, data = filled
    features_child.cache(str(directory), data=data, llm_hash="b" * 64)
    (other,) = set((directory / "features").iterdir()) - {folder}
    shutil.rmtree(folder)
    other.rename(folder)
    line = refused(directory, data)
    assert line.startswith(f"{folder}/features.json: another LLM's features, llm_hash is 'bbb")
    assert "expected 'aaa" in line and "remove the folder, and the same command makes it" in line
    with pytest.raises(ValueError, match=r"holds what one LLM \(content hash b{12}\) made of"):
        feature_cache.check_folder(str(folder))
    feature_cache.check_folder(str(directory / "features"))
    feature_cache.check_folder(str(directory / "nothing yet"))
    with pytest.raises(ValueError, match=r"hdfs://host/x': expected a folder, gs:// or s3://"):
        feature_cache.check_folder("hdfs://host/x")


def test_other_facts_and_none_are_refused(filled):
    directory, folder, data = filled
    path = folder / "features.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"width": 25}))
    assert "other features, width is 25, expected 24; remove the folder" in refused(directory, data)
    path.write_text("{")
    assert "features.json: not readable as JSON" in refused(directory, data)
    path.unlink()
    assert "features.json: no such file" in refused(directory, data)


def shortened(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path):
    path.write_bytes(b"")


def replaced(path):
    path.write_text("something else entirely\n" * 100)


def rewritten(records):
    def write(path):
        writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shortened, "not readable"),
        (emptied, "not readable"),
        (replaced, "not readable"),
        (rewritten([b"xy"]), "1 records, expected"),
    ],
)
def test_a_damaged_shard_is_one_line_before_training(damage, message, filled):
    directory, folder, data = filled
    path = sorted(folder.glob("*.array_record"))[1]
    damage(path)
    line = refused(directory, data)
    assert line.startswith(f"{path}: {message}")
    assert line.endswith("remove it, and the same command makes it again")
    path.unlink()
    features_child.cache(str(directory), data=data)


def flipped(path):
    content = bytearray(path.read_bytes())
    content[200] ^= 1  # in the first record
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (rewritten([b"xy"] * 4), r"2 bytes for prompt \d+, expected"),
        (flipped, "not readable: .*hash mismatch"),
    ],
)
def test_what_shows_only_while_training_is_one_line_too(damage, message, filled):
    directory, folder, data = filled
    path = sorted(folder.glob("*.array_record"))[0]
    assert len(feature_files.FeatureFiles(str(folder)).index(str(path))) == 4
    damage(path)
    data.hidden = features_child.cache(str(directory), data=data)
    with pytest.raises(ValueError, match=message) as error:
        list(zip(make_batches(data), range(3), strict=False))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(("most", "ahead"), [(1 << 30, 8), (5 * 8 * 8 * 48, 5), (1, 1)])
def test_of_large_batches_fewer_are_read_ahead(filled, monkeypatch, most, ahead):
    directory, _, data = filled
    monkeypatch.setattr("l2s_jax.data.batches._AHEAD_BYTES", most)
    data.hidden = features_child.cache(str(directory), data=data)
    options = batches._read_ahead(data, ((4, 8), (8, 8)), rows=8)
    assert options.prefetch_buffer_size == ahead
    data.hidden = None
    assert batches._read_ahead(data, ((8, 8),), rows=8).prefetch_buffer_size == 8


def test_a_full_disk_is_found_out_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    data = small.make_data(PAIRS, (8, 8))
    line = refused(tmp_path, data)
    tokens = int(data.prompt_lengths.sum())
    assert "0.0 GB are free there" in line and f"{tokens:,} prompt tokens of the train" in line
    assert not list((tmp_path / "features").iterdir())


def test_only_what_training_reads_of_an_llm_is_loaded(tmp_path):
    system = make_case("two vocabularies")[0]
    params = small.t5_params(system.llm_config)
    pretrained.save_hf(system.llm_config, params, str(tmp_path))
    whole, encoder = pretrained.load_encoder(str(tmp_path))
    module, nothing = pretrained.load_encoder(str(tmp_path), entries=())
    assert nothing == {} and module.config == whole.config
    stacked = {"mesh": small.mesh_of(), "scan_layers": True}
    assert pretrained.load_encoder(str(tmp_path), entries=(), **stacked)[1] == {}
    _, table = pretrained.load_encoder(str(tmp_path), entries=system.beside_hidden, **stacked)
    small.assert_same(table, {"token_embedding": encoder["token_embedding"]})


keys = st.lists(st.integers(0, 40), max_size=60)


@settings(deadline=None, max_examples=100)
@given(wanted=keys, there=st.lists(keys, max_size=3))
def test_what_is_missing_is_found_as_by_sets(wanted, there):
    """Keys of which some end in zeros, or are equal in their first half."""

    def array(numbers):
        return np.frombuffer(b"".join(n.to_bytes(1) * 8 + bytes(8) for n in numbers), "V16")

    store = RecordFiles("", "x")
    with mock.patch.object(RecordFiles, "index", lambda _, path: array(there[int(path)])):
        found = store.missing([*map(str, range(len(there)))], array(wanted))
    known, expected = {key for part in there for key in part}, []
    for place, key in enumerate(wanted):
        if key not in known:
            known.add(key)
            expected.append(place)
    assert found.tolist() == expected
    assert distinct(array(wanted)) == len(set(wanted))


def test_a_key_that_no_shard_has_is_no_other_record(tmp_path):
    store = RecordFiles(str(tmp_path), "x")
    keys = np.frombuffer(bytes(range(64)), "V16")
    store.write(0, keys[:3], [np.full(4, value, np.uint8) for value in range(3)])
    kept = Records(store, store.files(), keys[[2, 0]], "prompt")
    assert kept.read(np.array([1, 0]), np.array([4, 4])) == [bytes(4), bytes([2] * 4)]
    with pytest.raises(ValueError, match=r"^prompt 1 is in none of 1 shards$"):
        Records(store, store.files(), keys[[1, 3]], "prompt")
