"""A comparison's variants: what --vary says, and what is refused before any work."""

import os
import shutil
from types import SimpleNamespace

import pytest
import tiny

from l2s_jax.config import default, settled
from l2s_jax.experiment import room, toy
from l2s_jax.experiment.grid import make_grid
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.experiment.workdir import Record


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config of which runs could be made."""
    config = default()
    config.llm.train.steps = 1
    config.tokenizer.train_vocab_size = 100
    return settled(config)


def test_every_combination_is_a_variant_and_the_base_comes_first(config):
    grid = make_grid(config, ["l2s.fusion=cross,replace", "l2s.stack=0,2", "seed=3,5"])
    assert grid.base == {"l2s.fusion": "add", "l2s.stack": 0}
    # The base was not asked for.
    expected = [("add", 0)] + [(f, n) for f in ("cross", "replace") for n in (0, 2)]
    found = [(v.config.l2s.fusion, v.config.l2s.stack, v.config.train_seed) for v in grid.variants]
    assert found == [(*values, seed) for values in expected for seed in (3, 5)]
    assert [v.name for v in grid.variants[:2]] == [
        "l2s.fusion=add,l2s.stack=0,seed=3",
        "l2s.fusion=add,l2s.stack=0,seed=5",
    ]
    # The LLM, its labels and the tokenizers are those of the config's own seed.
    assert {v.config.seed for v in grid.variants} == {config.seed}
    assert [len(seeds) for seeds in grid.settings()] == [2] * 5
    assert len({v.folder for v in grid.variants}) == 10


@pytest.mark.parametrize(
    ("flag", "key", "values"),
    [
        ("l2s.layers=(),((1,),),[[1,2],[3]]", "l2s.layers", [(), ((1,),), ((1, 2), (3,))]),
        ("l2s.train.learning_rate=1e-2,0.5,1", "l2s.train.learning_rate", [1e-2, 0.5, 1.0]),
        ("l2s.normalize=false,True", "l2s.normalize", [False, True]),
        ("slm.vocabulary=all,task,300", "slm.vocabulary", ["all", "task", "300"]),
        ("task.prompt=,'a, {b}',\"it's\"", "task.prompt", ["", "a, {b}", "it's"]),
    ],
)
def test_values_are_of_the_settings_kind(config, flag, key, values):
    variants = make_grid(config, [flag]).variants
    assert [variant.values[key] for variant in variants] == values
    for variant in variants:
        found = variant.config
        for part in key.split("."):
            found = found[part]
        assert found == variant.values[key] and type(found) is type(variant.values[key])
        assert set(variant.folder) <= set(
            "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._=,+-"
        )
    assert len({variant.folder for variant in variants}) == len(values)


def test_what_a_value_turns_off_takes_its_own_settings_with_it(config):
    base = settled(config)
    base.labels.source, base.labels.max_new_tokens = "llm", 9
    grid = make_grid(base, ["labels.source=data"])
    assert [v.config.labels.max_new_tokens for v in grid.variants] == [9, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--mode=compare: expected --vary=KEY=VALUE,VALUE"),
        (["seed"], "--vary=seed: expected KEY=VALUE,VALUE"),
        (
            ["l2s.fusoin=add"],
            "--vary=l2s.fusoin=add: no such setting, 'fusoin', did you mean 'fusi",
        ),
        (["l2s.train=3"], "--vary=l2s.train=3: l2s.train is a section"),
        (["slm.model.num_layers=3"], "the config has no such setting"),
        (["l2s.stack=0,one"], "--vary=l2s.stack=0,one: 'one': expected an integer"),
        (["l2s.stack=0,1.5"], "'1.5': expected an integer"),
        (["l2s.stack=0,"], "'': expected an integer"),
        (["l2s.normalize=1"], "'1': expected true or false"),
        (["l2s.layers=1,2"], "'1': expected a tuple, in brackets"),
        (["l2s.layers=((1,2)"], "expected ')' at the end"),
        (["l2s.layers=1),2"], "')' closes nothing"),
        (["l2s.stack=1,2,1"], "1 is given twice"),
        (["seed=0,1", "seed=2"], "--vary=seed=2: seed is varied twice"),
        (["seed=0,1", "train_seed=2"], "seed is varied twice"),
        (["seed=-1"], "expected seeds from 0"),
        (["evaluation.split=test,validation"], "all variants are measured alike"),
        (["decoding.search.exact=false,true"], "L2S answers alone"),
        (["decoding.search.draft_tokens=2,4"], "L2S answers alone"),
        (["task.language=de,ja"], "all variants are measured alike"),
        (
            ["dtype=float32,bfloat16"],
            "--vary=dtype=float32,bfloat16: dtype is not varied: no model is made anew for it",
        ),
        (["scan_layers=false,true"], "no model is made anew for it"),
        (["buckets=((8,8),),((16,16),)"], "no model is made anew for it"),
        (["l2s.train.accumulation=1,2"], "no model is made anew for it"),
        (["slm.train.evaluate_every=1,2"], "no model is made anew for it"),
        (["labels.batch_size=1,2"], "all variants are measured alike"),
        (["decoding.mesh.tensor=1,2"], "all variants are measured alike, in the same place"),
        (
            ["l2s.fusion=add,sum"],
            "variant l2s.fusion=sum: config.l2s.fusion='sum': expected one of",
        ),
        (
            ["labels.source=llm,data", "labels.max_new_tokens=0,9"],
            "variant labels.source=data,labels.max_new_tokens=9: "
            "config.labels.max_new_tokens=9: no effect",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(config, flags, message):
    with pytest.raises(ValueError) as error:
        make_grid(config, flags)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary=l2s.layers=(),((7,),)"], "variant l2s.layers=((7,),): config.l2s.layers"),
        (
            ["--vary=task.splits.test=test.jsonl,validation.jsonl"],
            "variant task.splits.test=validation.jsonl: its test split has other references",
        ),
        (["--vary=l2s.train.batch_size=8,5"], "variant l2s.train.batch_size=5: config.l2s.train"),
        (
            ["--vary=l2s.train.batch_size=8,128"],
            "variant l2s.train.batch_size=128: config.l2s.train.batch_size is 128, expected at ",
        ),
        (
            ["--vary=task.splits.train=train.jsonl,nowhere.jsonl"],
            "variant task.splits.train=nowhere.jsonl: ",
        ),
        (
            ["--vary=task.splits.validation=validation.jsonl,nowhere.jsonl"],
            "variant task.splits.validation=nowhere.jsonl: ",
        ),
    ],
)
def test_a_variant_that_no_run_could_use_is_found_before_any_work(
    tmp_path, capfd, arguments, message
):
    path = tiny.write_task(tmp_path / "data")
    command = (f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--mode=compare")
    assert tiny.run(*command, *arguments) == 2
    (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("error:"))
    assert message in line
    assert not (tmp_path / "grid").exists()


def test_what_the_tokenizer_says_of_a_variant_is_found_before_a_model_is_trained(tmp_path, capfd):
    path = tiny.write_task(tmp_path / "data")
    command = (f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--mode=compare")
    assert tiny.run(*command, "--vary=slm.vocabulary=all,1000000") == 2
    assert "variant slm.vocabulary=1000000: config.slm.vocabulary" in capfd.readouterr().err
    (made,) = (path.name for path in (tmp_path / "grid/shared").iterdir())
    assert made.startswith("tokenizer-")


@pytest.mark.parametrize("key", ["tokenizer", "slm.tokenizer"])
def test_a_variants_tokenizer_that_the_text_does_not_give_is_found_before_a_model(
    key, tmp_path, capfd
):
    path = tiny.write_task(tmp_path / "data")
    command = (f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--mode=compare")
    key = f"{key}.train_vocab_size"
    assert tiny.run(*command, f"--vary={key}=30,5000") == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert f"variant {key}=5000: config.{key}=5000: a vocabulary of 5000 pieces is too " in line
    assert not list((tmp_path / "grid").glob("**/checkpoints"))


def test_two_vocabularies_of_a_variant_are_found_before_a_model_is_trained(tmp_path, capfd):
    path = tiny.write_task(tmp_path / "data")
    texts = toy.write_task(str(tmp_path / "toy"))
    other = toy.write_checkpoint(str(tmp_path / "other"), family="gpt2", texts=texts)
    command = (f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--mode=compare")
    vary = "--vary=distillation.weight=0.0,0.5"
    assert tiny.run(*command, f"--config.slm.path={other}", vary) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "variant distillation.weight=0.5: config.distillation.weight=0.5: " in line
    assert not list((tmp_path / "grid").glob("**/checkpoints"))


def test_no_room_on_the_disk_is_said_before_any_work(tmp_path, capfd, monkeypatch):
    path = tiny.write_task(tmp_path / "data")
    asked = []

    def usage(folder):
        asked.append(folder)
        return SimpleNamespace(free=1_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    command = (f"--config={path}", f"--workdir={tmp_path / 'grid'}", "--mode=compare")
    wide = ("--config.slm.model.width=256", "--config.slm.model.num_heads=32")
    assert tiny.run(*command, *wide, "--vary=l2s.fusion=add,cross", "--vary=seed=0,1") == 2
    (line,) = (x for x in capfd.readouterr().err.splitlines() if x.startswith("error:"))
    # One LLM, two SLMs alone, four L2S.
    assert "7 models are to be made" in line and "0.00 GB are free there" in line
    assert asked == [str(tmp_path / "grid")]
    assert not (tmp_path / "grid").exists()


def test_room_is_asked_for_what_the_files_take():
    """A model of float32, and its checkpoints with AdamW's two moments."""
    config = default()
    config.llm.train.steps = 1
    config.slm.train.update(steps=20, evaluate_every=10)
    config.l2s.train.evaluate_every = 100
    config.tokenizer.train_vocab_size = 30
    for section in (config.llm, config.slm):
        section.model.update(width=16, num_heads=2, head_width=8, feed_forward_width=32)
        section.model.update(num_encoder_layers=1, num_decoder_layers=1)
    grid = make_grid(settled(config), ["seed=0,1"])
    sizes = room.sizes(grid.variants[0].config)
    assert list(sizes) == ["llm", "slm", "l2s"]
    # Once validated, twice, and often: the newest three and the best are kept.
    assert sizes["llm"] * 7 == sizes["slm"] * 4
    # (64 pieces, since it is not known how many more the tokenizer has.)
    assert 5000 * 4 * 7 < sizes["slm"] < 9000 * 4 * 7
    assert sizes["l2s"] > sizes["slm"] / 7 * 13


def test_a_shared_folder_is_named_as_before_references_were_inputs(tmp_path):
    def link_of(variant, selection):
        stage = SimpleNamespace(
            name="slm",
            version=1,
            unnamed=TrainedStage.unnamed,
            context=SimpleNamespace(shared=str(tmp_path)),
            record=Record(str(tmp_path / "compare" / variant), "slm"),
            _changes=lambda found, inputs: [],
        )
        os.makedirs(tmp_path / "compare" / variant)
        inputs = {"train": {"steps": 1}, "selection": {"metric": "bleu", **selection}}
        RecordedStage._share(stage, inputs)
        return os.path.basename(os.path.realpath(stage.record.directory))

    before = link_of("a", {})
    assert before == link_of("b", {"references": "x", "comet": "y"})
    assert before != link_of("c", {"metric": "chrf"})
