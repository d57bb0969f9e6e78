"""Damaged files of a workdir: one line that names the file, what was written, or made again."""

import gc
import json
import subprocess
import sys

import corpus
import jax
import ml_dtypes
import numpy as np
import pytest
import small
from corpus import Trial
from test_damaged_models import check

from l2s_jax import sealed
from l2s_jax.config import default
from l2s_jax.evaluation.answers import read_answers
from l2s_jax.experiment import workdir
from l2s_jax.experiment.feature_files import FeatureFiles, Features
from l2s_jax.experiment.hashes import Hashes
from l2s_jax.experiment.label_files import Keys, Label, LabelFiles
from l2s_jax.experiment.logit_files import LogitFiles, Logits, encoded
from l2s_jax.files import write_json_lines
from l2s_jax.messages import errors_once
from l2s_jax.training import checksums, optim, update
from l2s_jax.training.checkpoint import Checkpoints
from l2s_jax.training.progress import MetricWriter


def equals(expected):
    return lambda found, _: found == expected


def lines_of(path, flips=300):
    """The content of a file with each of its lines damaged as JSON."""
    content = path.read_bytes()
    line = content.splitlines()[1]
    for variants in (corpus.json_texts(line), corpus.json_values(json.loads(line))):
        for variant in variants:
            new = content.replace(line, variant.content)
            yield corpus.Variant(variant.name, new, variant.key, variant.value)
    yield from corpus.cut(content)
    yield from corpus.flips(content, flips)


def test_damaged_labels(tmp_path):
    store, keys = LabelFiles(str(tmp_path)), Keys(["a", "b", "c"], sampled=False)
    labels = [Label("one", False), Label('two\n"x', True), Label("drei ü", False)]
    store.write(0, keys, labels)
    (path,) = tmp_path.iterdir()
    expected = dict(zip(keys, labels, strict=True))

    def read():
        return dict(store.read(store.files()))

    trial = Trial()
    # A label that is no longer there is made again; none is another one.
    trial.read(lines_of(path), path, read, same=lambda found, _: found.items() <= expected.items())
    check(trial, 350)
    # Of older versions, which wrote no hash.
    old = [{"prompt": key, "response": text} for key, (text, _) in expected.items()]
    write_json_lines(str(path), old)
    assert read() == {key: Label(text, False) for key, (text, _) in expected.items()}
    trial.read(lines_of(path), path, read, same=lambda *_: True)
    check(trial, 700)


@pytest.mark.parametrize("kind", ["features", "logits"])
def test_damaged_shards(kind, tmp_path):
    data = small.make_data(small.random_pairs(5, 4), (8, 8))
    random = np.random.default_rng(0)
    if kind == "features":
        store, keys = FeatureFiles(str(tmp_path)), data.prompt_keys
        values = [random.random((n, 6)).astype(ml_dtypes.bfloat16) for n in data.prompt_lengths]
    else:
        store, keys, values = LogitFiles(str(tmp_path)), data.pair_keys, []
        for tokens in data.response_lengths:
            ids = random.integers(0, small.VOCABULARY, (tokens, 3))
            values.append(encoded(ids, np.log(np.full((tokens, 4), 0.25)), small.VOCABULARY))
    store.write(0, keys, values)
    (path,) = tmp_path.glob("*.array_record")
    index = path.with_suffix(".index")

    def read():
        if kind == "features":
            kept = Features(store, store.files(), data, 6)
            return [kept[i].tobytes() for i in range(len(kept))]
        kept = Logits(store, store.files(), data, 3, small.VOCABULARY)
        return [
            (ids.tobytes(), shares.tobytes()) for ids, shares in map(kept.__getitem__, range(5))
        ]

    expected, trial, content = read(), Trial(), path.read_bytes()
    # The rest of its blocks is empty.
    used = len(content.rstrip(b"\0"))
    trial.read(corpus.flips(content, 120, 0, used), path, read, same=equals(expected))
    trial.read(corpus.cut(content), path, read, same=equals(expected))
    keys_there = index.read_bytes()
    for variants in (corpus.flips(keys_there, len(keys_there)), corpus.cut(keys_there)):
        trial.read(variants, index, read, same=lambda *_: False)
    more = [corpus.Variant("a key more", keys_there + b"x" * 16)]
    trial.read(iter(more), index, read, same=lambda *_: False)
    assert not trial.faults, trial.faults
    assert trial.tried > 200 and trial.lines > 90


def test_a_damaged_config_of_a_workdir(tmp_path):
    workdir.write_config(str(tmp_path), default())
    path = tmp_path / "config.json"
    content = path.read_bytes()

    def read():
        return workdir.read_config(str(tmp_path))

    few = {name: corpus.HOSTILE[name] for name in ("list", "30 digits", "NaN", "text")}
    trial = Trial()
    trial.read(corpus.json_texts(content), path, read, same=lambda *_: True)
    # What a setting may be, any may say; what it may not is refused.
    trial.read(corpus.json_values(json.loads(content), few), path, read, same=lambda *_: True)
    check(trial, 1000)


def test_a_damaged_record_of_a_stage(tmp_path):
    inputs = {"seed": 0, "train": {"steps": 4, "rate": 0.5}, "data": {"train": "a" * 64}}
    record = workdir.Record(str(tmp_path), "llm")
    record.write(inputs, 1)
    path, run = tmp_path / "llm/stage.json", record.run
    content = path.read_bytes()

    def read():
        found = record.read()
        changed = workdir.changes(found, inputs, {}, 1)
        longer = workdir.only_longer(found, inputs, changed)
        return changed, longer, found.get("run")

    trial = Trial()

    for variants in (corpus.json_texts(content), corpus.json_values(json.loads(content))):
        trial.read(variants, path, read, same=equals(([], False, run)))
    assert not trial.faults, trial.faults
    assert trial.tried > 150


def test_damaged_hashes_are_made_again(tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("text")
    path = tmp_path / "hashes.json"
    computed = "b" * 64

    def read():
        return Hashes(str(tmp_path), keep=False).of("data", [str(data)], lambda: computed)

    Hashes(str(tmp_path), keep=True).of("data", [str(data)], lambda: computed)
    content, trial = path.read_bytes(), Trial()
    computed = "b" * 64
    for variants in (
        corpus.json_texts(content),
        corpus.json_values(json.loads(content)),
        corpus.flips(content, len(content)),
    ):
        trial.read(variants, path, read, same=equals("b" * 64))
    assert not trial.faults, trial.faults
    assert trial.tried > 400


def test_damaged_answers_and_metrics(tmp_path):
    answers, metrics = tmp_path / "predictions.jsonl", tmp_path / "metrics.jsonl"
    write_json_lines(str(answers), [{"response": f"r{i}", "cut": False} for i in range(3)])
    write_json_lines(str(metrics), [{"step": i, "loss": 1.0} for i in range(3)])

    def write():
        MetricWriter(str(tmp_path), total_steps=9, start_step=4).close()

    trial = Trial()
    for path, read in ((answers, lambda: read_answers(str(tmp_path))), (metrics, write)):
        trial.read(lines_of(path, 30), path, read, same=lambda *_: True)
    check(trial, 200)
    responses = read_answers(str(tmp_path))
    content = answers.read_bytes()
    with sealed.writing(str(tmp_path), answers.name):
        pass
    trial = Trial()
    flips = corpus.flips(content, len(content))
    trial.read(flips, answers, lambda: read_answers(str(tmp_path)), same=equals(responses))
    assert not trial.faults, trial.faults


CONFIG = small.make_train_config(10)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(folder, abstract state) of one of an SLM, or of as much as there need be."""
    directory = tmp_path_factory.mktemp("checkpoints")
    table = np.random.default_rng(0).standard_normal((20, 30), np.float32)
    params = {"slm": {"token_embedding": {"embedding": table}}}
    optimizer = optim.optimizer(CONFIG, params)
    shardings = update.state_shardings(params, optimizer, CONFIG, small.mesh_of())
    state = jax.device_put(update.init_state(params, optimizer, CONFIG), shardings)
    with Checkpoints(str(directory), best_metric=None) as checkpoints:
        checkpoints.save(
            3,
            trees=trees_of(state),
            data={"next": 3},
            config={"fingerprint": "f"},
            metrics=None,
        )
    # TensorStore's threads may still say of one array that it is damaged when another one has ended
    # the read, and the test.
    with errors_once():
        yield directory, update.abstract_state(params, optimizer, CONFIG, shardings)


def trees_of(state):
    return {**state.params, "opt": {"step": state.step, "opt_state": state.opt_state}}


def restored(directory, abstract):
    with errors_once(), Checkpoints(str(directory), best_metric=None) as checkpoints:
        config = checkpoints.config(3)
        found = checkpoints.restore(3, trees_of(abstract))
    return config, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found)]


# What TensorStore's threads say of a read that has failed, once nobody waits for it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_training_checkpoint(checkpoint):
    directory, abstract = checkpoint

    def read():
        return restored(directory, abstract)

    expected, trial = read(), Trial()
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        content = path.read_bytes()
        count = 12 if len(content) > 1000 and content[:1] != b"{" else 2
        variants = [*list(corpus.cut(content))[2:3], *corpus.flips(content, count)]
        if content[:1] == b"{" and path.parent.name in ("config", "data"):
            variants += list(corpus.json_texts(content))[6:12]
        trial.read(iter(variants), path, read, same=equals(expected), named=str(directory))
    gc.collect()
    assert not trial.faults, trial.faults
    assert trial.tried > 60


def test_a_checkpoint_without_sums_is_read_as_it_is(checkpoint):
    """As older versions left it."""
    directory, abstract = checkpoint
    path = directory / "3/config/metadata"
    before, expected = path.read_bytes(), restored(directory, abstract)
    path.write_text(json.dumps({"fingerprint": "f"}))
    assert restored(directory, abstract) == expected
    path.write_bytes(before)


def test_sums_do_not_depend_on_how_arrays_lie():
    random = np.random.default_rng(0)
    tree = {
        "a": random.random((8, 6)).astype(np.float32),
        "b": random.random((4, 2)).astype(ml_dtypes.bfloat16),
        "c": np.int32(7),
        "d": np.zeros((0, 3), np.float32),
    }
    expected = checksums.checksums(tree)
    axes = jax.sharding.PartitionSpec
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = small.mesh_of(*sizes)
        for names in ((), ("data",), ("data", "tensor"), (None, "tensor"), (("data", "fsdp"),)):
            where = jax.sharding.NamedSharding(mesh, axes(*names))
            placed = tree | {name: jax.device_put(tree[name], where) for name in "ab"}
            assert checksums.checksums(placed) == expected
    for name, change in (("a", lambda x: x[::-1]), ("b", lambda x: -x), ("c", lambda x: x + 1)):
        found = checksums.checksums(tree | {name: change(tree[name])})
        assert checksums.different(found, expected) == [f"['{name}']"]
    # A turned bit of any number.
    for place in range(0, tree["a"].nbytes, 7):
        content = bytearray(tree["a"].tobytes())
        content[place] ^= 1 << place % 8
        turned = np.frombuffer(bytes(content), np.float32).reshape(8, 6)
        assert checksums.checksums({"a": turned})["['a']"] != expected["['a']"]


@pytest.mark.parametrize("name", ["config.json", "labels"])
def test_a_command_says_one_line_and_has_status_2(name, tmp_path):
    if name == "config.json":
        (tmp_path / name).write_text('{"llm": ' + "[" * 100_000)
        command = ["l2s_jax.main", "--mode=status", f"--workdir={tmp_path}"]
    else:
        (tmp_path / "config.json").write_text('{"format": "l2s_jax", "family": "l2s", "slm": 1}')
        command = ["l2s_jax.convert", f"--input={tmp_path}", "--output=out"]
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert str(tmp_path / "config.json") in done.stderr
