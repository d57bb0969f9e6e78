"""Stage folders: found again when nothing changed, moved aside when something did."""

import json
from pathlib import Path

import pytest

from l2s_jax import files
from l2s_jax.config import default, model_config
from l2s_jax.experiment import workdir


def test_a_stage_with_the_same_inputs_is_found_again(tmp_path):
    inputs = {"train": {"steps": 3, "buckets": ((8, 8), (16, 16))}, "seed": 0}
    directory = workdir.open_stage(str(tmp_path), "llm", inputs)
    (tmp_path / "llm/result").write_text("kept")
    again = {"seed": 0, "train": {"buckets": [[8, 8], [16, 16]], "steps": 3}}
    assert workdir.open_stage(str(tmp_path), "llm", again) == directory
    assert (tmp_path / "llm/result").read_text() == "kept"


def test_changed_inputs_move_what_was_there_aside_each_time(tmp_path, caplog):
    caplog.set_level("INFO")
    for steps in (1, 2, 3):
        workdir.open_stage(str(tmp_path), "llm", {"train": {"steps": steps}, "seed": 0})
        assert list((tmp_path / "llm").iterdir()) == [tmp_path / "llm/stage.json"]
        (tmp_path / "llm/result").write_text(str(steps))
    assert (tmp_path / "llm.old1/result").read_text() == "1"
    assert (tmp_path / "llm.old2/result").read_text() == "2"
    assert (tmp_path / "llm/result").read_text() == "3"
    assert "train.steps changed" in caplog.text
    assert "seed" not in caplog.text


def test_atomic_directory_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    with pytest.raises(RuntimeError), files.atomic_directory(str(target)) as temporary:
        Path(temporary, "half").write_text("half")
        raise RuntimeError(temporary)
    assert not list(tmp_path.iterdir())
    with files.atomic_directory(str(target)) as temporary:
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
