"""Workdirs and bundles that version 0.1.0 wrote (old/write.py) continue, evaluate and load."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

import l2s_jax
from l2s_jax.serving import bundle

ARCHIVE = Path(__file__).parent / "old/v0.1.tar.xz"
SYSTEMS = ("llm", "slm", "l2s", "l2s_mismatched")
# What version 0.1 took from the settings of decoding, labels have in a section of their own.
OWN = (
    "--config.labels.source=llm",
    "--config.labels.max_new_tokens=8",
    "--config.slm.tokenizer.train_vocab_size=28",
)


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The folder that the archive was made of; commands run in it, since its data is in data/."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def state_of(workdir, *patterns):
    """Content and age of what a run must not touch."""
    paths = [path for pattern in patterns for path in workdir.glob(pattern) if path.is_file()]
    assert paths
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_finished_workdir_evaluates_as_it_did(old, capfd):
    workdir = old / "finished"
    predictions = {n: (workdir / f"predictions/{n}.jsonl").read_bytes() for n in SYSTEMS}
    models = state_of(workdir, "*/model/*.safetensors", "*/checkpoints/**/*", "tokenizer/*")
    scores = json.loads((workdir / "report.json").read_text())["systems"]
    assert tiny.run("--mode=evaluate", "--workdir=finished") == 0, capfd.readouterr().err
    assert {n: (workdir / f"predictions/{n}.jsonl").read_bytes() for n in SYSTEMS} == predictions
    assert state_of(workdir, "*/model/*.safetensors", "*/checkpoints/**/*", "tokenizer/*") == models
    for name, system in json.loads((workdir / "report.json").read_text())["systems"].items():
        assert system["quality"] == scores[name]["quality"]
    assert not list(workdir.glob("*.old*"))


def test_a_finished_workdir_is_found_again_by_its_config(old, caplog):
    caplog.set_level("INFO")
    models = state_of(old / "finished", "*/model/*.safetensors", "*/metrics.jsonl")
    assert tiny.run("--config=config.py", "--workdir=finished") == 0
    assert "training on" not in caplog.text
    assert state_of(old / "finished", "*/model/*.safetensors", "*/metrics.jsonl") == models
    assert not list((old / "finished").glob("*.old*"))


def test_an_interrupted_workdir_continues_to_the_model_it_was_to_be(old, capfd, caplog):
    caplog.set_level("INFO")
    done = ("llm/model/*.safetensors", "slm/model/*.safetensors", "llm/metrics*")
    before = state_of(old / "interrupted", *done)
    labels = lines_of(old / "interrupted/labels/train-00000.jsonl")
    assert tiny.run("--mode=status", "--workdir=interrupted") == 0
    states = [line.split()[:2] for line in capfd.readouterr().out.splitlines()]
    names = ("tokenizer", "slm_tokenizer", "llm", "labels", "slm")
    assert states[:5] == [[name, "done"] for name in names]
    assert states[5:] == [["l2s", "begun"], ["evaluation", "waiting"]]
    assert tiny.run("--config=config.py", "--workdir=interrupted", *OWN) == 0
    assert state_of(old / "interrupted", *done) == before
    told = caplog.text
    assert "labels: of version 0.1, which did not record the content of its data" in told
    keyed = lines_of(old / "interrupted/labels/train-00000.jsonl")
    assert [line["response"] for line in keyed] == [line["response"] for line in labels]
    assert "llm: training" not in told and "slm: training" not in told
    steps = {line["step"] for line in lines_of(old / "interrupted/l2s/metrics.jsonl")}
    assert sorted(steps) == list(range(1, 241))
    assert not list((old / "interrupted").glob("*.old*"))
    # It is validated as it was begun, on the data's responses.
    assert not list((old / "interrupted/labels").glob("validation-*"))
    # And it drops what it would have dropped, where a new training draws other masks.
    record = json.loads((old / "interrupted/l2s/stage.json").read_text())
    assert "version" in record and "prng" not in record
    found = load_file(old / "interrupted/l2s/model/params.safetensors")
    expected = load_file(old / "expected/l2s.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Not bit by bit only since processors and devices differ in how they add up.
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_generation_from_a_workdir_and_a_bundle_gives_what_it_gave(old):
    expected = (old / "expected/answers.jsonl").read_text()
    run = ("--mode=generate", "--workdir=finished", "--input=data/test.jsonl")
    assert tiny.run(*run, "--output=answers.jsonl") == 0
    assert (old / "answers.jsonl").read_text() == expected
    prompts = [f"reverse: {record['words']}" for record in lines_of(old / "data/test.jsonl")]
    for directory in ("bundle", "finished/l2s/model"):
        outputs = l2s_jax.load(directory).generate(prompts)
        answers = [json.loads(line)["response"] for line in expected.splitlines()]
        assert [output.text for output in outputs] == answers


def test_parameters_of_a_bundle_are_those_in_its_file(old):
    _, trained, _ = bundle.load("bundle")
    for name, value in load_file(old / "bundle/params.safetensors").items():
        leaf = trained
        for part in name.split("/"):
            leaf = leaf[part]
        np.testing.assert_array_equal(leaf, value)
