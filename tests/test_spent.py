"""On what time is spent: each second once, in shares that sum to one, over runs that continue."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
import small
import train_child
from stop_child import CHANGES
from test_distributed import lines_of

from l2s_jax.training import meter, spent


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(spent.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_a_second_counts_once_for_one_stage_and_one_kind(tmp_path, clock):
    outer, inner = tmp_path / "l2s", tmp_path / "labels"
    for folder in (outer, inner):
        folder.mkdir()
    with spent.on("steps"):  # of no stage
        clock.pass_(9)
    with spent.on_stage(str(outer)):
        clock.pass_(1)
        with spent.on("steps"):
            clock.pass_(2)
            with spent.on("data"):
                clock.pass_(4)
            with spent.on_stage(str(inner), "evaluating"):
                clock.pass_(8)
                assert spent.is_on(str(inner)) and not spent.is_on(str(outer))
            clock.pass_(16)
    assert spent.taken() == {}
    seconds = spent.seconds_of(str(outer))
    assert {k: v for k, v in seconds.items() if v} == {"other": 1, "steps": 18, "data": 4}
    assert spent.seconds_of(str(inner))["evaluating"] == 8
    # A run that goes on adds, unless the stage is made anew; one that fails keeps what it kept.
    with pytest.raises(KeyError), spent.on_stage(str(outer)):
        clock.pass_(32)
        spent.keep()
        clock.pass_(64)
        raise KeyError
    assert spent.seconds_of(str(outer))["other"] == 33
    with spent.on_stage(str(outer), anew=True):
        clock.pass_(3)
    assert spent.seconds_of(str(outer)) == dict.fromkeys(spent.KINDS, 0.0) | {"other": 3}


def test_what_jax_says_of_compiling_is_compiling(tmp_path, compilations):
    with spent.on_stage(str(tmp_path)):
        began = time.perf_counter()
        with spent.on("steps"):

            @jax.jit
            def twice(x):
                time.sleep(0.3)  # while it is traced
                return jax.jit(lambda y: 2 * y)(x)

            twice(jnp.ones(3)).block_until_ready()
            time.sleep(0.2)
        seconds, passed = spent.taken(), time.perf_counter() - began
    assert compilations
    assert seconds["compiling"] >= 0.3 + sum(compilations) - 0.01
    assert seconds["steps"] >= 0.2
    assert sum(seconds.values()) == pytest.approx(passed, abs=0.01)


def test_shares_sum_to_all():
    seconds = dict(zip(spent.KINDS, (1 / 3, 1 / 3, 1 / 3, 0.0, 1e-9, 2.0), strict=True))
    assert sum(spent.shares(seconds).values()) == pytest.approx(1)
    # The remainders, a ninth and two thirds: the last one gets the per cent that is missing.
    words = "3.0 s: compiling 11 %, data 11 %, steps 11 %, other 67 %"
    assert spent.line(seconds) == words
    assert spent.shares(dict.fromkeys(spent.KINDS, 0.0)) == {}
    assert spent.line(dict.fromkeys(spent.KINDS, 0.0)) == "0.0 s"


def test_a_training_says_it_at_its_end_and_continues_to_add(tmp_path):
    def run(wrap=lambda batches: batches):
        with spent.on_stage(str(tmp_path)):
            return train_child.run(str(tmp_path), wrap=wrap, **CHANGES | {"evaluate_every": 8})

    with pytest.raises(small.Stop):
        run(lambda batches: small.Stopping(batches, 11))
    before = spent.seconds_of(str(tmp_path))
    assert before["compiling"] > 0 and before["steps"] > 0 and before["saving"] > 0
    run()
    after = spent.seconds_of(str(tmp_path))
    assert all(after[kind] >= before[kind] for kind in spent.KINDS)
    assert after["evaluating"] > 0 and after["data"] > 0 and after["other"] > 0
    *_, last = (tmp_path / "metrics.jsonl").read_text().splitlines()
    shares = {k: v for k, v in json.loads(last).items() if k.startswith("time_")}
    assert shares.keys() == {f"time_{kind}" for kind in spent.KINDS} <= set(meter.TIMES)
    assert sum(shares.values()) == pytest.approx(1)
    assert lines_of(tmp_path)[-1].keys() == {"step", "val_loss", "val_perplexity", "val_accuracy"}
