"""Logit distillation in whole runs: the stage of logits, what is learnt, the report, bad input."""

import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
from safetensors.numpy import load_file, save_file
from test_stages import rewrite, stale, states

from l2s_jax.experiment import toy
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.workdir import read_config


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Data, an LLM from a directory, and a finished run that learns labels and distributions."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    toy.write_checkpoint(str(root / "llm"), family="t5", texts=texts)
    toy.write_checkpoint(str(root / "gpt2"), family="gpt2", texts=texts)
    arguments = (
        *(f"--config.llm.path={root / 'llm'}", "--config.llm.train.steps=0"),
        "--config.tokenizer.train_vocab_size=0",
        *("--config.distillation.weight=0.5", "--config.distillation.top_k=4"),
        *("--config.distillation.temperature=2", "--config.distillation.batch_size=16"),
    )
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}", *arguments) == 0
    return root


@pytest.fixture
def copy(job, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(job, root)
    path = root / "run/config.json"
    path.write_text(path.read_text().replace(str(job), str(root)))
    (root / "run/hashes.json").unlink()
    return root


def metrics_of(run, stage):
    lines = (run / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_the_slm_alone_and_l2s_learn_the_distributions_and_are_validated_on_labels(job):
    for stage in ("slm", "l2s"):
        lines = metrics_of(job / "run", stage)
        training = [line for line in lines if "loss" in line]
        assert len(training) == 4
        assert all(0 < 0.5 * 4 * line["divergence"] < line["loss"] for line in training)
        validations = [line for line in lines if "val_loss" in line]
        assert len(validations) == 2 and not any("divergence" in line for line in validations)
    record = json.loads((job / "run/l2s/stage.json").read_text())
    assert (record["distillation"]["weight"], record["distillation"]["top_k"]) == (0.5, 4)


def test_the_report_and_the_card_say_what_top_k_leaves_out(job):
    run = job / "run"
    task = json.loads((run / "report.json").read_text())["task"]
    settings = task["distillation"]
    left_out = settings.pop("left_out")
    assert settings == {"weight": 0.5, "temperature": 2.0, "top_k": 4}
    # A random LLM finds all of its 56 tokens about as likely.
    assert 0.5 < left_out["mean"] < left_out["p99"] < 1
    line = (
        "the responses in the data and, for 50% of the loss, on the LLM's distributions over their "
        "tokens at temperature 2 (the 4 likeliest tokens, which leave out "
        f"{100 * left_out['mean']:.2g}% of its probability "
        f"({100 * left_out['p99']:.2g}% at the 99th percentile))"
    )
    assert line in (run / "report.md").read_text()
    assert line.partition(" and")[2] in (run / "l2s/model/README.md").read_text()


def test_the_stage_is_there_only_where_it_is_used(copy):
    used = ("logits", "slm", "l2s", "evaluation")
    assert states(copy) == dict.fromkeys(used, ("done", ""))
    off = {"distillation.weight": 0.0}
    assert states(copy, **off).keys() == {"slm", "l2s", "evaluation"}
    config = read_config(str(copy / "run"))
    config.distillation.weight = 0.0
    experiment = Experiment(config, str(copy / "run"), "look")
    # Nothing that was made before there was distillation is stale.
    for stage in (experiment.slm, experiment.l2s):
        assert "distill" not in json.dumps(stage.inputs())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"distillation.batch_size": 8, "buckets": ((16, 16), (32, 32))}, []),
        ({"distillation.weight": 0.7}, ["slm", "l2s", "evaluation"]),
        ({"distillation.weight": 0.0}, ["slm", "l2s", "evaluation"]),
        ({"distillation.top_k": 5}, ["logits", "slm", "l2s", "evaluation"]),
        ({"distillation.temperature": 1.0}, ["logits", "slm", "l2s", "evaluation"]),
        ({"max_response_tokens": 8}, ["logits", "slm", "l2s", "evaluation"]),
        ({"l2s.fusion": "cross"}, ["l2s", "evaluation"]),
    ],
)
def test_what_defines_logits_makes_them_and_what_learns_them_stale(copy, changes, expected):
    assert stale(copy, **changes) == expected
    if "distillation.top_k" in changes:
        assert states(copy, **changes)["logits"] == ("stale", "top_k changed")
    if "max_response_tokens" in changes:
        # Responses that are not cut by it are there already.
        assert states(copy, **changes)["logits"][0] == "begun"


def test_a_response_that_is_new_is_all_that_the_llm_reads(copy, caplog):
    caplog.set_level("INFO")
    run = copy / "run"
    shards = set((run / "logits").glob("*.array_record"))
    rewrite(copy / "data/train.jsonl", lambda r: [{"words": "ten one", "reversed": "x"}, *r[::-1]])
    state, more = states(copy)["logits"]
    assert state == "begun" and more.endswith(" responses")
    assert tiny.run(f"--workdir={run}", "--until=logits") == 0
    assert "logits: the LLM reads 1 of " in caplog.text
    assert "likeliest tokens leave out" in caplog.text
    assert states(copy)["logits"] == ("done", "")
    assert states(copy)["slm"] == ("stale", "data.train changed")
    assert shards < set((run / "logits").glob("*.array_record"))
    caplog.clear()
    # A shard that somebody has removed is made again, by whoever needs it.
    for path in shards:
        path.unlink()
    assert tiny.run(f"--workdir={run}", "--until=slm") == 0
    assert "logits: the LLM reads " in caplog.text
    assert len(list((run / "logits").glob("*.array_record"))) == 2


def test_evaluating_asks_for_no_logits(copy, caplog):
    caplog.set_level("INFO")
    shutil.rmtree(copy / "run/logits")
    assert tiny.run("--mode=evaluate", f"--workdir={copy / 'run'}") == 0
    assert "the LLM reads" not in caplog.text and not (copy / "run/logits").exists()
    assert "(the 4 likeliest tokens)" in (copy / "run/report.md").read_text()


def test_a_decoder_only_llms_labels_and_distributions_are_learnt_and_a_run_goes_on(job, tmp_path):
    flags = (
        *(f"--config={job / 'data/tiny.py'}", f"--config.llm.path={job / 'gpt2'}"),
        *("--config.llm.train.steps=0", "--config.tokenizer.train_vocab_size=0", "--until=slm"),
        *("--config.labels.source=llm", "--config.labels.max_new_tokens=8"),
        *("--config.distillation.weight=1", "--config.distillation.top_k=1000"),
        *("--config.slm.train.accumulation=2", "--config.slm.train.schedule=constant"),
        *("--config.slm.lora.rank=2", "--config.slm.train.parameter_scale=False"),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert tiny.run(*flags, f"--workdir={whole}") == 0
    # With nothing but the divergence, and nothing left out, since no vocabulary has 1000 tokens.
    left_out = json.loads((whole / "logits/logits.json").read_text())["left_out"]
    assert left_out == {"mean": 0.0, "p99": 0.0}
    lines = [line for line in metrics_of(whole, "slm") if "loss" in line]
    assert all(line["loss"] == pytest.approx(line["divergence"], rel=1e-6) for line in lines)
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "slm")
    for steps in (2, 4):
        assert tiny.run(*flags, f"--workdir={parts}", f"--config.slm.train.steps={steps}") == 0
    again = [line for line in metrics_of(parts, "slm") if "loss" in line]
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    for line, other in zip(again, lines, strict=True):
        assert line["loss"] == other["loss"] and line["grad_norm"] == other["grad_norm"]


def refused(capfd, *flags):
    """The one line that says why."""
    capfd.readouterr()
    assert tiny.run(*flags, "--config.distillation.weight=0.5") == 2
    lines = [x for x in capfd.readouterr().err.splitlines() if x.startswith("error:")]
    assert len(lines) == 1
    return lines[0]


def test_another_vocabulary_is_one_line_before_anything_is_trained(job, tmp_path, capfd):
    run = tmp_path / "run"
    flags = (f"--config={job / 'data/tiny.py'}", f"--workdir={run}")
    line = refused(capfd, *flags, "--config.slm.tokenizer.train_vocab_size=30")
    assert "config.slm.tokenizer.train_vocab_size=30: the SLM's vocabulary is then not" in line
    assert not run.exists()
    line = refused(capfd, *flags, f"--config.slm.path={job / 'llm'}")
    assert f"config.slm.path='{job / 'llm'}' makes other tokens than the LLM's" in line
    assert not (run / "llm").exists() and not (run / "slm").exists()
    line = refused(capfd, *flags, "--config.distillation.batch_size=9")
    assert "config.distillation.batch_size=9: mesh data=8" in line


def test_another_end_of_responses_is_another_vocabulary(job):
    experiment = Experiment(read_config(str(job / "run")), str(job / "run"), "find")
    experiment.logits.check()
    same = experiment.llm_tokenizer.tokenizer
    other = SimpleNamespace(fingerprint=same.fingerprint, eos_id=same.eos_id + 1)
    experiment.slm_tokenizer.__dict__["tokenizer"] = other
    with pytest.raises(ValueError, match="ends responses with another token than the LLM's"):
        experiment.logits.check()


def test_an_llm_that_only_encodes_has_nothing_to_learn(job, tmp_path, capfd):
    encoder = tmp_path / "encoder"
    shutil.copytree(job / "llm", encoder)
    path = encoder / "model.safetensors"
    tensors = {k: v for k, v in load_file(path).items() if k.startswith(("encoder.", "shared."))}
    save_file(tensors, path, {"format": "pt"})
    line = refused(
        capfd,
        *(f"--config={job / 'data/tiny.py'}", f"--workdir={tmp_path / 'run'}"),
        *(f"--config.llm.path={encoder}", "--config.llm.train.steps=0"),
        "--config.tokenizer.train_vocab_size=0",
    )
    assert f"{encoder}: the model has no head or decoder" in line
    assert line.endswith("expected config.distillation.weight=0")
    assert not (tmp_path / "run/slm").exists()


def test_a_label_store_without_logits_is_what_they_are_made_of(job, copy, caplog):
    caplog.set_level("INFO")
    flags = (f"--config={copy / 'data/tiny.py'}", f"--workdir={copy / 'other'}")
    flags += (f"--config.llm.path={copy / 'llm'}", "--config.llm.train.steps=0")
    flags += ("--config.tokenizer.train_vocab_size=0", "--config.labels.source=llm")
    flags += ("--config.labels.max_new_tokens=8",)
    assert tiny.run(*flags, "--until=labels") == 0
    labels = {p: p.stat().st_mtime_ns for p in (copy / "other/labels").iterdir()}
    caplog.clear()
    assert tiny.run(*flags, "--config.distillation.weight=0.5", "--until=logits") == 0
    assert "logits: the LLM reads" in caplog.text and "the LLM answers" not in caplog.text
    assert labels == {p: p.stat().st_mtime_ns for p in (copy / "other/labels").iterdir()}
