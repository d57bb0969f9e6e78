"""Stage folders: found again when nothing changed, moved aside when something did."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from l2s_jax import files
from l2s_jax.config import default, model_config
from l2s_jax.experiment import workdir
from l2s_jax.experiment.stage import RecordedStage
from l2s_jax.settings.declare import Section, recorded, setting
from l2s_jax.training.trackers import Trackers


class Made(RecordedStage):
    """A stage whose result is its inputs."""

    def __init__(self, directory, inputs, mode="make", shared=""):
        models = {name: SimpleNamespace(path="") for name in ("llm", "slm")}
        followed = Trackers((), str(directory), {})
        context = SimpleNamespace(
            workdir=str(directory),
            mode=mode,
            config=models,
            shared=shared,
            trackers=followed,
            sources=dict,
        )
        super().__init__(context, "llm")
        self.given, self.asked_to_go_on = inputs, []

    def inputs(self):
        return self.given

    def old_inputs(self):
        return {"task": "t"}

    @property
    def result(self):
        return Path(self.record.directory, "result")

    def is_made(self):
        return self.result.exists()

    def make(self):
        self.result.write_text(json.dumps(self.given))

    def progress(self):
        return "half"

    def reopen(self, steps):
        self.asked_to_go_on.append(steps)
        self.result.unlink()


def test_a_stage_with_the_same_inputs_is_found_again(tmp_path):
    inputs = {"train": {"steps": 3, "buckets": ((8, 8), (16, 16))}, "seed": 0}
    directory = Made(tmp_path, inputs).made()
    run = Made(tmp_path, inputs).record.run
    again = {"seed": 0, "train": {"buckets": [[8, 8], [16, 16]], "steps": 3}}
    for mode in ("make", "find"):
        assert Made(tmp_path, again, mode).made() == directory
    assert Made(tmp_path, again).state() == ("done", "")
    assert Made(tmp_path, again).record.run == run
    # What is not known here is taken as found.
    assert Made(tmp_path, {**again, "seed": None}, "find").made() == directory


def test_what_a_stage_is_no_longer_made_from_has_changed(tmp_path):
    Made(tmp_path, {"seed": 0, "lora": {"rank": 2, "alpha": 1.0}}).made()
    assert Made(tmp_path, {"seed": 0}, "look").state() == ("stale", "lora changed")
    less = {"seed": 0, "lora": {"rank": 2}}
    assert Made(tmp_path, less, "look").state() == ("stale", "lora.alpha changed")


def test_changed_inputs_move_what_was_there_aside_each_time(tmp_path, caplog):
    caplog.set_level("INFO")
    for rate in (1, 2, 3):
        stage = Made(tmp_path, {"train": {"rate": rate}, "seed": 0})
        stage.open()
        assert list((tmp_path / "llm").iterdir()) == [tmp_path / "llm/stage.json"]
        assert stage.state() == ("begun", "half")
        stage.make()
    for name, rate in (("llm.old1", 1), ("llm.old2", 2), ("llm", 3)):
        assert json.loads((tmp_path / name / "result").read_text())["train"]["rate"] == rate
    assert "train.rate changed" in caplog.text
    assert "seed" not in caplog.text
    mended = Made(tmp_path, {"train": {"rate": 3}, "seed": 0})
    mended.version = 2
    assert mended.state() == ("stale", "the code changed")
    with pytest.raises(ValueError, match=r"other settings of train\.rate; --mode=train makes"):
        Made(tmp_path, {"train": {"rate": 4}, "seed": 0}, "find").made()
    with pytest.raises(ValueError, match="elsewhere/llm: no such stage; expected the workdir"):
        Made(tmp_path / "elsewhere", {}, "find").made()


def test_an_input_that_is_gone_makes_a_stage_stale(tmp_path):
    Made(tmp_path, {"seed": 0, "lora": {"rank": 4}}).made()
    assert Made(tmp_path, {"seed": 0}).state() == ("stale", "lora changed")
    assert Made(tmp_path, {"seed": 0, "lora": None}).state() == ("done", "")


def test_more_steps_are_the_same_run_and_fewer_are_another(tmp_path):
    run = Made(tmp_path, {"train": {"steps": 3}}).made() and Made(tmp_path, {}).record.run
    longer = Made(tmp_path, {"train": {"steps": 5}})
    longer.made()
    assert longer.asked_to_go_on == [3] and longer.record.run == run
    assert json.loads(longer.result.read_text()) == {"train": {"steps": 5}}
    shorter = Made(tmp_path, {"train": {"steps": 4}})
    shorter.made()
    assert shorter.asked_to_go_on == [] and shorter.record.run != run
    assert (tmp_path / "llm.old1/result").exists()


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_a_training_that_was_extended_is_not_one_in_one_go(tmp_path, caplog, schedule):
    def made(steps, folder=tmp_path, **settings):
        stage = Made(folder, {"train": {"steps": steps, "schedule": schedule}}, **settings)
        stage.made()
        return stage

    made(3)
    for steps in (5, 9, 9):
        made(steps)
    record = json.loads((tmp_path / "llm/stage.json").read_text())
    assert record["extended"] == [3, 5]
    warned = [one for one in caplog.records if one.levelname == "WARNING"]
    assert len(warned) == (2 if schedule == "cosine" else 0)
    assert all("is not that of" in one.getMessage() for one in warned)
    made(9, mode="find")
    # A comparison beside it makes its own, in one go, where that is another.
    variants = [made(9, tmp_path / "compare" / name, shared=str(tmp_path)) for name in "ab"]
    (folder,) = {Path(variant.record.directory).resolve() for variant in variants}
    assert (folder == tmp_path / "llm") == (schedule == "constant")
    assert ("extended" in json.loads((folder / "stage.json").read_text())) == (
        schedule == "constant"
    )
    # What goes on from an extended training was extended itself.
    other = made(2, tmp_path / "other")
    for _ in range(2):
        other.record.follow(variants[0].record)
        other.record.follow(Made(tmp_path, {}).record)
    assert other.record.read()["extended"] == [3, 5]
    # What is made anew was not.
    made(4)
    assert "extended" not in json.loads((tmp_path / "llm/stage.json").read_text())


def test_a_record_of_version_0_1_stays_where_all_that_it_holds_agrees(tmp_path):
    old = {"seed": 0, "task": "t", "buckets": [8], "train": {"rate": 1, "log_every": 10}}
    inputs = {"seed": 0, "data": "hash", "train": {"rate": 1}}
    (tmp_path / "llm").mkdir()
    path = tmp_path / "llm/stage.json"
    path.write_text(json.dumps(old))
    (tmp_path / "llm/result").write_text("{}")
    for other in ({**inputs, "seed": 1}, {**inputs, "train": {"rate": 2}}):
        assert Made(tmp_path, other, "look").state()[0] == "stale"
    Made(tmp_path, inputs, "find").made()
    assert json.loads(path.read_text()) == old
    stage = Made(tmp_path, inputs)
    stage.made()
    # Its checkpoints have the name that they had.
    assert stage.record.run == workdir.fingerprint(old)
    assert Made(tmp_path, {**inputs, "data": "other"}).state() == ("stale", "data changed")
    path.write_text(json.dumps(old | {"task": "another"}))
    assert Made(tmp_path, inputs).state() == ("stale", "task changed")


@dataclasses.dataclass(frozen=True)
class Grown(Section):
    rate: int = setting(1, "There from the beginning.", at_least=0)
    bend: int = setting(0, "Came later.", at_least=0, added=True)


def test_a_setting_that_has_come_since_makes_nothing_stale_at_its_default(tmp_path):
    def stage(**values):
        return Made(tmp_path, {"train": recorded(Grown, dataclasses.asdict(Grown(**values)))})

    Made(tmp_path, {"train": {"rate": 1}}).made()
    assert stage().state() == ("done", "")
    assert stage(bend=2).state() == ("stale", "train.bend changed")
    assert stage(rate=2).state() == ("stale", "train.rate changed")
    stage(bend=2).made()
    assert stage(bend=2).state() == ("done", "")
    assert stage().state() == ("stale", "train.bend changed")


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), files.atomic_directory(str(target)) as temporary:
        Path(temporary, "half").write_text("half")
        raise RuntimeError(temporary)
    assert not list(tmp_path.iterdir())
    with files.atomic_directory(f"{target}/") as temporary:
        Path(temporary, "whole").write_text("whole")
        assert not target.exists()
    assert [path.name for path in target.iterdir()] == ["whole"]
    assert list(tmp_path.iterdir()) == [target]


def test_config_round_trip(tmp_path):
    config = default()
    config.buckets = ((8, 16), (128, 128))
    config.task.splits.update(train="train.tsv")
    workdir.write_config(str(tmp_path / "run"), config)
    assert workdir.read_config(str(tmp_path / "run")) == config
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        workdir.read_config(str(tmp_path))


def test_a_config_from_before_a_setting_has_its_default(tmp_path):
    config = default()
    config.slm.model = model_config("gpt2")
    config.decoding.search.num_beams = 4
    config.l2s.train.steps = 7
    workdir.write_config(str(tmp_path), config)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    del saved["scan_layers"], saved["features"], saved["decoding"]["weights"]
    del saved["l2s"]["train"]["remat"], saved["decoding"]["search"]["min_p"]
    path.write_text(json.dumps(saved))
    assert workdir.read_config(str(tmp_path)) == config


@pytest.mark.parametrize("source", ["data", "llm"])
def test_labels_of_a_config_from_before_they_had_a_section_are_made_as_they_were(tmp_path, source):
    config = default()
    config.decoding.update(max_new_tokens=40, batch_size=16, weights="int8")
    config.decoding.search.update(num_beams=4, length_penalty=0.6)
    workdir.write_config(str(tmp_path), config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"labels": source}))
    config.labels.source = source
    if source == "llm":
        config.labels.update(max_new_tokens=40, batch_size=16)
        config.labels.search.update(num_beams=4, length_penalty=0.6)
    assert workdir.read_config(str(tmp_path)) == config


def test_what_is_no_setting_in_a_config_is_refused(tmp_path):
    workdir.write_config(str(tmp_path), default())
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"temperature": 0.0', '"temperature": -1'))
    with pytest.raises(ValueError, match=r"config\.json: config\.\w+\.search\.temperature=-1"):
        workdir.read_config(str(tmp_path))
