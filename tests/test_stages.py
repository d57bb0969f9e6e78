"""Stages: found again where nothing that matters has changed, made anew where something has."""

import json
import operator
import shutil
import subprocess
import sys

import corpus
import numpy as np
import pytest
import tiny
import tokenizers
import transformers
from safetensors.numpy import load_file

from l2s_jax import models
from l2s_jax.cluster import distributed
from l2s_jax.config import default
from l2s_jax.data import batches
from l2s_jax.evaluation.generators import generator_of
from l2s_jax.evaluation.stage import EvaluationStage
from l2s_jax.experiment import token_files, toy
from l2s_jax.experiment import tokenizers as tokenizer_stage
from l2s_jax.experiment.context import Context
from l2s_jax.experiment.experiment import Experiment
from l2s_jax.experiment.grid import not_varied
from l2s_jax.experiment.label_files import Keys, LabelFiles
from l2s_jax.experiment.labels import LabelStage
from l2s_jax.experiment.tokenizers import TokenizerStage
from l2s_jax.experiment.workdir import read_config, write_config
from l2s_jax.tokenizers import load_tokenizer
from l2s_jax.tokenizers.huggingface import HuggingFaceTokenizer


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config's path, finished workdir) of a run with labels by an LLM from a directory."""
    root = tmp_path_factory.mktemp("job")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    toy.write_checkpoint(str(root / "llm"), family="t5", texts=texts)
    arguments = (
        f"--config.llm.path={root / 'llm'}",
        "--config.llm.train.steps=0",
        "--config.tokenizer.train_vocab_size=0",
        "--config.labels.source=llm",
        "--config.labels.max_new_tokens=8",
    )
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}", *arguments) == 0
    return root


@pytest.fixture
def copy(job, tmp_path):
    """A copy of all that the job has: its config is in the workdir, with paths of the copy."""
    root = tmp_path / "copy"
    shutil.copytree(job, root)
    path = root / "run/config.json"
    path.write_text(path.read_text().replace(str(job), str(root)))
    (root / "run/hashes.json").unlink()
    return root


def states(root, **changes):
    """{stage: (state, why)} of what is on disk, for a config with other values of some keys."""
    config = read_config(str(root / "run"))
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    experiment = Experiment(config, str(root / "run"), "look")
    stages = [*experiment.stages, EvaluationStage(experiment)]
    return {stage.name: stage.state() for stage in stages if stage.is_used()}


def stale(root, **changes):
    """Names of the stages that are not done."""
    return [name for name, (state, _) in states(root, **changes).items() if state != "done"]


def test_a_finished_run_is_done_and_has_no_stage_that_it_does_not_use(copy):
    assert states(copy) == dict.fromkeys(("labels", "slm", "l2s", "evaluation"), ("done", ""))


def test_a_validation_takes_the_parts_of_a_step(copy, monkeypatch):
    taken, make = [], batches.validation_batches

    def noted(data, **settings):
        taken.append((settings["batch_size"], len(settings["rows"])))
        return make(data, **settings)

    monkeypatch.setattr(batches, "validation_batches", noted)
    config = read_config(str(copy / "run"))
    with config.unlocked():
        config.slm.train.update(accumulation=2, batch_size=16)  # on eight devices
    Experiment(config, str(copy / "run")).make("slm")
    assert taken == [(8, 8)]


@pytest.mark.parametrize(
    "changes",
    [
        {"slm.train.log_every": 7},
        {"slm.train.evaluate_every": 1, "l2s.train.evaluate_every": 1},
        {"slm.train.accumulation": 2, "l2s.train.remat": True},
        {"buckets": ((16, 16), (32, 32))},
        {"dtype": "bfloat16", "llm.encoder_dtype": "float32"},
        {"labels.batch_size": 4, "decoding.batch_size": 2},
        {"mesh.data": 1, "scan_layers": True},
        {"decoding.mesh.tensor": 2, "features.mesh.fsdp": 4, "labels.mesh.tensor": 8},
        {"train_seed": 0},
    ],
)
def test_what_does_not_define_a_model_leaves_it_valid(copy, changes):
    assert stale(copy, **changes) == []


def test_a_comparison_varies_what_defines_a_model(copy):
    other = {bool: operator.not_, int: lambda v: v + 1, float: lambda v: v + 0.125}
    other |= {str: lambda _: "other", tuple: lambda _: ("other",)}
    train = read_config(str(copy / "run")).slm.train.to_dict()
    keys = {f"slm.train.{name}": other[type(value)](value) for name, value in train.items()}
    keys |= {"dtype": "bfloat16", "scan_layers": True, "buckets": ((16, 16), (32, 32))}
    for key, value in keys.items():
        assert bool(not_varied(key)) == (stale(copy, **{key: value}) == []), key


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"slm.train.learning_rate": 0.5}, ["slm", "evaluation"]),
        ({"l2s.fusion": "cross"}, ["l2s", "evaluation"]),
        ({"train_seed": 1}, ["slm", "l2s", "evaluation"]),
        ({"slm.model.width": 24}, ["slm", "l2s", "evaluation"]),
        ({"decoding.search.num_beams": 2}, ["evaluation"]),
        ({"labels.search.num_beams": 2}, ["labels", "slm", "l2s", "evaluation"]),
        ({"max_prompt_tokens": 16}, ["labels", "slm", "l2s", "evaluation"]),
        ({"task.cut_responses": "drop"}, ["slm", "l2s", "evaluation"]),
        ({"task.truncate.words": "start"}, ["labels", "slm", "l2s", "evaluation"]),
        ({"evaluation.comet": "folder"}, ["evaluation"]),
    ],
)
def test_what_defines_a_stage_makes_it_and_what_needs_it_stale(copy, changes, expected):
    assert stale(copy, **changes) == expected


def test_a_mended_model_makes_all_that_it_made_stale(copy, monkeypatch):
    monkeypatch.setattr(models, "VERSION", models.VERSION + 1)
    assert states(copy)["labels"] == ("stale", "models changed")
    assert stale(copy) == ["labels", "slm", "l2s", "evaluation"]


def test_labels_by_other_code_are_other_labels_for_those_who_learn_them(copy, monkeypatch):
    monkeypatch.setattr(LabelStage, "version", LabelStage.version + 1)
    assert states(copy)["labels"] == ("stale", "the code changed")
    assert tiny.run(f"--workdir={copy / 'run'}", "--until=labels") == 0
    assert states(copy)["labels"] == ("done", "")
    assert states(copy)["slm"] == ("stale", "labels.version changed")
    assert stale(copy) == ["slm", "l2s", "evaluation"]


def test_another_tokenizer_in_the_llms_directory_makes_its_labels_stale(copy):
    words = [f"repeat: {a} {b}" for a in tiny.WORDS for b in tiny.WORDS]
    toy.train_sentencepiece(words, vocab_size=46, directory=str(copy / "llm"), model_type="bpe")
    assert states(copy)["labels"] == ("stale", "tokenizer changed")
    assert stale(copy) == ["labels", "slm", "l2s", "evaluation"]


def rewrite(path, change):
    """Has the records of a JSON Lines file changed."""
    records = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_other_responses_in_the_data_make_what_learns_them_stale(copy):
    train = copy / "data/train.jsonl"
    rewrite(train, lambda records: [r | {"reversed": "nothing"} for r in records])
    # The LLM's own answers are learnt.
    assert stale(copy) == []
    assert states(copy, **{"labels.source": "data", "labels.max_new_tokens": 0})["slm"] == (
        "stale",
        "data.train, labels changed",
    )
    validation = copy / "data/validation.jsonl"
    rewrite(validation, lambda records: records[::-1])
    assert states(copy)["slm"] == ("stale", "data.validation changed")


def evaluation(root, forget="", **changes):
    """State of the evaluation; before that its record may forget an input that is new."""
    config = read_config(str(root / "run"))
    config.update_from_flattened_dict(changes)
    stage = EvaluationStage(Experiment(config, str(root / "run"), "find"))
    if forget:
        inputs = {name: value for name, value in stage.inputs().items() if name != forget}
        stage.record.write(inputs, stage.version)
    return EvaluationStage(Experiment(config, str(root / "run"), "look")).state()


def test_a_report_is_of_its_references(copy):
    rewrite(copy / "data/test.jsonl", lambda records: [r | {"more": ["right"]} for r in records])
    assert evaluation(copy) == ("done", "")
    more = {"task.references": "more"}
    assert evaluation(copy, **more) == ("stale", "references.test changed")
    # What had no record of them is taken as found.
    assert evaluation(copy, "references", **more) == ("done", "")


def test_a_control_of_before_is_none_where_prompts_repeat(copy):
    rewrite(
        copy / "data/test.jsonl", lambda records: list({r["words"]: r for r in records}.values())
    )
    assert evaluation(copy, "control") == ("done", "")
    rewrite(copy / "data/test.jsonl", lambda records: [*records, records[0]])
    assert evaluation(copy, "control") == ("stale", "control changed")
    assert evaluation(copy, "nothing") == ("done", "")
    (copy / "data/test.jsonl").unlink()  # then there is no telling
    assert evaluation(copy) == ("done", "")


def test_labels_of_data_in_another_order_are_those_of_its_prompts(copy, caplog):
    caplog.set_level("INFO")
    (file,) = (copy / "run/labels").glob("train-*.jsonl")
    lines = file.read_text().splitlines()
    # Without the hash that a line has: it is not what the LLM said.
    rewrite(
        file,
        lambda rs: [{"prompt": r["prompt"], "response": f"answer {i}"} for i, r in enumerate(rs)],
    )
    assert len(lines) > 50
    before = LabelFiles(str(copy / "run/labels"))
    before = dict(before.read(before.files()))
    rewrite(copy / "data/train.jsonl", lambda records: records[::-1])
    assert states(copy)["labels"] == ("done", "")
    assert states(copy)["slm"] == ("stale", "data.train changed")
    experiment = Experiment(read_config(str(copy / "run")), str(copy / "run"))
    labelled = experiment.labels.examples()
    assert "the LLM answers" not in caplog.text
    keys = Keys([example.prompt for example in labelled], sampled=False)
    assert [example.response for example in labelled] == [before[key].response for key in keys]


def test_a_prompt_that_is_new_is_all_that_the_llm_answers(copy, caplog):
    caplog.set_level("INFO")
    rewrite(copy / "data/train.jsonl", lambda r: [{"words": "ten one", "reversed": "x"}, *r])
    assert states(copy)["labels"][0] == "begun"
    assert tiny.run(f"--workdir={copy / 'run'}", "--until=labels") == 0
    assert "labels: the LLM answers 1 of " in caplog.text
    assert states(copy)["labels"] == ("done", "")
    assert states(copy)["slm"][0] == "stale"


def test_what_is_validated_with_has_labels_of_its_own(copy, caplog):
    caplog.set_level("INFO")
    path = copy / "run/labels/validation-00000.jsonl"
    keys = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    rows = [json.loads(line) for line in (copy / "data/validation.jsonl").read_text().splitlines()]
    prompts = [f"reverse: {row['words']}" for row in rows]
    assert sorted(keys) == sorted(set(Keys(prompts, sampled=False)))
    train = (copy / "run/labels/train-00000.jsonl").read_bytes()
    path.unlink()
    assert states(copy)["labels"][0] == "begun"
    assert tiny.run(f"--workdir={copy / 'run'}", "--until=labels") == 0
    assert f"answers {len(keys)} of {len(keys)} prompts of validation" in caplog.text
    assert "prompts of train" not in caplog.text
    assert (copy / "run/labels/train-00000.jsonl").read_bytes() == train
    assert stale(copy) == []


def test_a_run_of_before_labels_of_validation_stays_and_goes_on_as_it_was(copy, caplog):
    caplog.set_level("INFO")
    run = copy / "run"

    def record_of(stage):
        record = json.loads((run / f"{stage}/stage.json").read_text())
        return record, record if stage == "labels" else record["labels"]

    for stage in ("labels", "slm", "l2s"):
        record, labels = record_of(stage)
        assert labels.pop("splits") == ["train", "validation"]
        del record["sha256"]
        (run / f"{stage}/stage.json").write_text(json.dumps(record))
    (run / "labels/validation-00000.jsonl").unlink()
    assert stale(copy) == []
    config = read_config(str(run))
    config.slm.train.steps = 8
    Experiment(config, str(run)).make(until="slm")
    assert "goes on from 4 steps" in caplog.text and "the LLM answers" not in caplog.text
    assert "splits" not in record_of("slm")[1]
    assert Experiment(config, str(run), "look").slm.state() == ("done", "")
    # What is made anew is made as it is now.
    config.slm.train.learning_rate = 0.5
    Experiment(config, str(run)).make(until="slm")
    assert (run / "labels/validation-00000.jsonl").exists()
    assert record_of("slm")[1]["splits"] == ["train", "validation"]
    experiment = Experiment(config, str(run), "look")
    assert [s.state()[0] for s in (experiment.labels, experiment.slm)] == ["done", "done"]


def test_training_can_be_extended_and_goes_on_where_it_was(copy):
    config = read_config(str(copy / "run"))
    config.slm.train.steps = 8
    run = copy / "run"
    old = load_file(run / "slm/model/model.safetensors")
    begun = states(copy, **{"slm.train.steps": 8})["slm"]
    assert begun == ("begun", "goes on from 4 steps")
    assert states(copy, **{"slm.train.steps": 3})["slm"] == ("stale", "train.steps changed")
    Experiment(config, str(run)).make(until="slm")
    steps = [
        json.loads(line)["step"] for line in (run / "slm/metrics.jsonl").read_text().splitlines()
    ]
    assert sorted(set(steps)) == list(range(1, 9)) and steps.count(4) == 2
    kept = load_file(run / "slm/model.4/model.safetensors")
    new = load_file(run / "slm/model/model.safetensors")
    assert all(np.array_equal(kept[name], old[name]) for name in old)
    # The best of all steps, which may be one of the old ones.
    assert new.keys() == old.keys() and (run / "slm/checkpoints/8").exists()
    assert not list(run.glob("*.old*"))
    assert Experiment(config, str(run), "look").slm.state() == ("done", "")


def test_stages_and_runs_find_the_tokens_that_are_there(copy, monkeypatch, caplog):
    """SLM and L2S have one tokenizer here, so that they learn the same tokens."""
    files = sorted((copy / "run/tokens").glob("*/*"))
    assert [path.suffix for path in files] == [".arrow", ".json"] * 2
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "_made", None)
        config = read_config(str(copy / "run"))
        for section in (config.slm, config.l2s):
            section.train.steps = 6
        Experiment(config, str(copy / "run")).make(until="l2s")
    assert sorted((copy / "run/tokens").glob("*/*")) == files
    # Another label is other data, though no setting has changed.
    path = copy / "run/labels/train-00000.jsonl"
    rewrite(path, lambda rs: [{"prompt": r["prompt"], "response": "one"} for r in rs])
    config.slm.train.steps = 7
    experiment = Experiment(config, str(copy / "run"))
    data = experiment.slm._tokenized(experiment.slm.examples())
    assert len({data[i][1].tobytes() for i in range(len(data))}) == 1
    assert len(sorted((copy / "run/tokens").glob("*/*"))) == len(files) + 2


@pytest.mark.parametrize("is_primary", [False, True])
def test_one_process_hashes_the_data_for_all(copy, is_primary, monkeypatch):
    told = []

    def on_primary(action):
        told.append(action() if is_primary else "what process 0 says")
        return told[-1]

    monkeypatch.setattr(distributed, "on_primary", on_primary)
    context = Experiment(read_config(str(copy / "run")), str(copy / "run")).context
    assert context.content("train") == context.content("train") == told[0] and len(told) == 1
    files = list(map(str, (copy / "run/labels").glob("*.jsonl")))
    assert context.files_hash("labels", lambda: files) == told[1]
    assert (copy / "run/hashes.json").exists() == is_primary
    assert context.examples("train").is_read == is_primary


def test_one_length_cuts_prompts_everywhere(copy):
    config = read_config(str(copy / "run"))
    config.max_prompt_tokens = 6
    experiment = Experiment(config, str(copy / "run"))
    experiment.make(until="l2s")
    for stage in experiment.systems:
        assert generator_of(experiment, stage).prompt_lengths == (6,)
    assert experiment.labels._generator().prompt_lengths == (6,)
    fields = json.loads((copy / "run/l2s/model/config.json").read_text())
    assert fields["generation"]["prompt_lengths"] == [6]


def test_evaluating_otherwise_asks_for_nothing_anew(copy, caplog):
    caplog.set_level("INFO")
    shutil.rmtree(copy / "run/labels")
    (copy / "data/train.jsonl").unlink()
    config = read_config(str(copy / "run"))
    config.decoding.search.num_beams = 2
    write_config(str(copy / "run"), config)
    assert tiny.run("--mode=evaluate", f"--workdir={copy / 'run'}") == 0
    assert caplog.text.count("the train split is taken to be the one of the run") == 1
    assert "training on" not in caplog.text
    assert not (copy / "run/labels").exists()


@pytest.mark.parametrize(
    ("until", "made"),
    [("slm_tokenizer", {"slm_tokenizer"}), ("labels", {"labels"}), ("slm", {"labels", "slm"})],
)
def test_a_run_stops_after_a_stage_and_the_status_says_what_is_left(job, tmp_path, until, made):
    workdir = tmp_path / "run"
    config = read_config(str(job / "run"))
    config.slm.tokenizer.train_vocab_size = 30 if until == "slm_tokenizer" else 0
    Experiment(config, str(workdir)).make(until)
    assert {path.parent.name for path in workdir.glob("*/stage.json")} == made
    experiment = Experiment(config, str(workdir), "look")
    for stage in experiment.stages:
        if stage.is_used():
            assert (stage.state()[0] == "done") == (stage.name in made), stage.name


def test_features_are_made_without_a_model_to_train(job, tmp_path):
    config = read_config(str(job / "run"))
    # It is there, with something else in it.
    config.features.cache = str(tmp_path)
    (tmp_path / "other").mkdir()

    def states():
        look = Experiment(config, str(tmp_path / "run"), "look")
        return {stage.name: stage.state()[0] for stage in look.stages if stage.is_used()}

    assert states()["features"] == "missing"
    Experiment(config, str(tmp_path / "run")).make("features")
    assert states()["features"] == "done"
    # What a model learnt from is no longer needed, and a run would find the model.
    shutil.copytree(job / "run/l2s", tmp_path / "run/l2s")
    l2s = Experiment(config, str(tmp_path / "run")).l2s
    l2s.record.write(l2s.inputs(), l2s.version)
    for folder in tmp_path.glob("*/features.json"):
        shutil.rmtree(folder.parent)
    assert (states()["features"], states()["labels"]) == ("missing", "missing")
    assert states()["l2s"] == "done"
    config.l2s.fusion = "replace"
    assert states()["l2s"] == "stale"
    config.l2s.fusion = "add"
    assert not (tmp_path / "run/slm/model").exists() and not (tmp_path / "run/labels").exists()
    config.llm.path = str(job / "run/slm/model")
    assert states()["features"] == "missing"


def test_models_stay_where_the_labels_that_they_learnt_are_gone(copy):
    shutil.rmtree(copy / "run/labels")
    assert stale(copy) == ["labels"]
    assert stale(copy, **{"labels.search.num_beams": 2}) == ["labels", "slm", "l2s", "evaluation"]
    why = states(copy, **{"labels.search.num_beams": 2})["slm"]
    assert why == ("stale", "labels.search.num_beams changed")


def test_another_runs_features_say_nothing_of_an_llm_that_is_still_to_be_trained(tmp_path, capfd):
    (tmp_path / "cache/other").mkdir(parents=True)
    (tmp_path / "cache/other/features.json").write_text('{"llm_hash": "of another run"}')
    config = f"--config={tiny.write_task(tmp_path / 'data')}"
    cache = f"--config.features.cache={tmp_path / 'cache'}"
    assert tiny.run("--mode=status", config, cache, f"--workdir={tmp_path / 'run'}") == 0
    lines = {line.split()[0]: line.split()[1:] for line in capfd.readouterr().out.splitlines()}
    assert lines["features"][:3] == ["waiting", "needs", "llm"]
    assert lines["l2s"][0] == "waiting"


def test_the_status_is_printed_without_jax(job):
    code = (
        "import sys; from l2s_jax import main; status = main.main(sys.argv);"
        "assert 'jax' not in sys.modules; sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "--mode=status", f"--workdir={job / 'run'}"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line.split() for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines] == [
        ["labels", "done"],
        ["slm", "done"],
        ["l2s", "done"],
        ["evaluation", "done"],
    ]
    assert lines[1][2:] == ["<-", "labels"]


def test_the_status_of_a_checkpoint_of_others_needs_no_transformers(tmp_path):
    """Its tokenizer is one that only transformers can read."""
    llm, workdir = tmp_path / "llm", tmp_path / "run"
    path = tiny.write_task(tmp_path / "data")
    texts = toy.write_task(str(tmp_path / "toy"))
    toy.write_checkpoint(str(llm), family="t5", texts=texts)
    for name in ("spiece.model", "SHA256SUMS"):
        (llm / name).unlink()
    pieces = {piece: id for id, piece in enumerate(["<pad>", "</s>", "<unk>", *tiny.WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    fast.save_pretrained(str(llm))
    arguments = (
        *(f"--config={path}", f"--config.llm.path={llm}", "--config.llm.train.steps=0"),
        *("--config.tokenizer.train_vocab_size=0", "--config.labels.source=llm"),
        *("--config.labels.max_new_tokens=4", f"--workdir={workdir}", "--until=labels"),
    )
    assert tiny.run(*arguments) == 0

    def status():
        code = (
            "import sys; from l2s_jax import main; status = main.main(sys.argv);"
            "print({'jax', 'transformers'} & sys.modules.keys()); sys.exit(status)"
        )
        command = [sys.executable, "-c", code, "--mode=status", f"--workdir={workdir}"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        labels, *_, imported = result.stdout.splitlines()
        return labels.split(maxsplit=2)[:2], imported

    assert status() == (["labels", "done"], "set()")
    # It is the content that counts: where files are new, they are read.
    settings = llm / "tokenizer_config.json"
    settings.write_text(settings.read_text() + "\n")
    assert status() == (["labels", "done"], "{'transformers'}")
    settings.write_text(settings.read_text().replace("<unk>", "</s>"))
    assert status() == (["labels", "stale"], "{'transformers'}")


def test_a_hash_of_a_tokenizer_that_was_read_in_another_way_is_forgotten(tmp_path, monkeypatch):
    llm, run, config = str(tmp_path / "llm"), str(tmp_path / "run"), default()
    config.task.update(name="t", source="jsonl", prompt="{x}", response="y")
    config.task.splits.update(train="t", validation="v", test="t")
    for name in ("llm", "run"):
        (tmp_path / name).mkdir()
    corpus.byte_level().save(f"{llm}/tokenizer.json")
    (tmp_path / "llm/config.json").write_text('{"model_type": "gpt2", "eos_token_id": 1}')

    def stage(mode):
        context = Context(config, run, mode)
        return TokenizerStage(context, "tokenizer", config.tokenizer, path=llm)

    with monkeypatch.context() as before:
        before.setattr(tokenizer_stage, "_READING", 1)
        before.setattr(HuggingFaceTokenizer, "identity", "another")
        assert stage("make").tokenizer.identity == stage("look").tokenizer.identity == "another"
    assert stage("look").tokenizer.identity == load_tokenizer(llm).identity


def test_a_stop_belongs_to_training_and_to_a_stage_that_is_there(job, tmp_path, capfd):
    assert tiny.run(f"--workdir={job / 'run'}", "--until=features") == 2
    assert "--until=features: the config has no such stage, but labels" in capfd.readouterr().err
    assert tiny.run("--workdir=nowhere", "--mode=evaluate", "--until=slm") == 2
    assert "--until=slm: expected --mode=train, not evaluate" in capfd.readouterr().err
    config = f"--config={job / 'data/tiny.py'}"
    assert tiny.run(config, f"--workdir={tmp_path / 'run'}", "--until=slmm") == 2
    words = "--until=slmm: the config has no such stage, but tokenizer, llm, slm, l2s"
    assert words in capfd.readouterr().err
    assert not (tmp_path / "run").exists()
