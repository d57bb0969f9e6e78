"""The models of a plan: those that a run finds, each looked up once."""

from __future__ import annotations

import dataclasses
import logging

import pytest

from l2s_jax.experiment import early
from l2s_jax.models.geometries import GEOMETRIES
from l2s_jax.plan.command import plan
from l2s_jax.plan.models import models_of
from tests.test_plan import devices, small_config

__all__ = ["devices"]  # a fixture that every test here has


def test_what_a_model_is_taken_for_is_said_once(tmp_path, monkeypatch, caplog):
    config = small_config(data=4)
    small = early.models_of(config)["llm"]
    for name in ("one", "other"):
        monkeypatch.setitem(GEOMETRIES, name, dataclasses.replace(small, vocab_size=48))
    config.llm.path, config.slm.path = "one", "other"
    config.llm.train.steps = 0
    config.slm.vocabulary = "task"
    with caplog.at_level(logging.INFO):
        plan(config, str(tmp_path), "cpu:4", programs=("encode",))
    lines = [record.getMessage() for record in caplog.records]
    for line in (
        "config.llm.path: no folder one, planned with the published geometry",
        "config.slm.path: no folder other, planned with the published geometry",
        "slm: planned with its whole vocabulary, since no text is read",
    ):
        assert lines.count(line) == 1, lines


@pytest.mark.parametrize("cut", [{}, {"num_decoder_layers": 1, "feed_forward_width": 32}])
def test_a_plan_and_a_run_have_the_same_models_but_for_the_vocabulary(cut):
    config = small_config()
    config.llm.model.update(num_decoder_layers=3)
    config.slm.cut.update(cut)
    found, expected = models_of(config), early.models_of(config)
    assert expected["slm"].num_decoder_layers == 1
    config.tokenizer.train_vocab_size, config.slm.tokenizer.train_vocab_size = 300, 200
    sizes = {"llm": 300, "slm": 300 if cut else 200}
    for name, other in models_of(config).items():
        assert other.vocab_size == sizes[name]
        changed = dataclasses.replace(other, vocab_size=64)
        assert changed == dataclasses.replace(found[name], vocab_size=64) == expected[name]


def test_an_slm_is_made_with_the_pieces_of_an_llm_that_is_there():
    config = small_config()
    config.tokenizer.train_vocab_size, config.llm.path = 0, "t5-small"
    assert models_of(config)["slm"].vocab_size == GEOMETRIES["t5-small"].vocab_size
    config.llm.path = ""
    with pytest.raises(ValueError, match=r"config\.llm: expected a path"):
        models_of(config)
