"""Runs that are followed from afar: by wandb and trackio themselves, offline, and by none."""

import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from l2s_jax.experiment import checks
from l2s_jax.training import trackers
from l2s_jax.training.progress import MetricWriter
from l2s_jax.training.trackers import Trackers

CONFIG = {"seed": 3, "llm": {"path": "x"}}
PATIENCE = trackers._PATIENCE_SECONDS


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))


def follow(workdir, *names, steps=(1, 2), results=None):
    """One run of a training in two stages."""
    with trackers.closing():
        followed = Trackers(names, str(workdir), CONFIG)
        for stage in ("slm", "l2s"):
            followed.stage(stage)
            with MetricWriter(
                str(workdir / stage), total_steps=9, name=stage, trackers=followed
            ) as writer:
                for step in steps:
                    writer.write(step, {"loss": step / 4, "norm": float("nan")})
        followed.results({"report/quality_ratio": 0.75, **(results or {})})


def leveldb_records(data, block=32768, header=7):
    """The records of a log in LevelDB's format, in which wandb writes, after a head of 7 bytes."""
    records, parts, place = [], [], header
    while place + header <= len(data):
        if block - place % block < header:  # too little for a record's head
            place += block - place % block
            continue
        size, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts.append(data[place + header : place + header + size])
        place += header + size
        if kind in (1, 4):  # whole, or the last part
            records.append(b"".join(parts))
            parts = []
    return records


def wandb_records(workdir):
    """What an offline run of wandb holds: (ids, config, rows of history, summary)."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, config, rows, summary = [], {}, [], {}
    for path in sorted(workdir.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.append(record.run.run_id)
                updates = record.run.config.update
                config |= {u.key: json.loads(u.value_json) for u in updates if u.key}
            items = record.history.item
            key = lambda item: item.key or "/".join(item.nested_key)  # noqa: E731
            if items:
                rows.append({key(item): json.loads(item.value_json) for item in items})
            summary |= {key(u): json.loads(u.value_json) for u in record.summary.update}
    return ids, config, rows, summary


def test_wandb_and_trackio_have_config_stages_metrics_and_results(tmp_path):
    workdir = tmp_path / "run"
    for steps in ((1, 2), (3,)):  # the second run continues the first
        follow(workdir, "wandb", "trackio", "tensorboard", steps=steps)
    number = json.loads((workdir / "trackers.json").read_text())["id"]

    ids, config, rows, summary = wandb_records(workdir)
    assert set(ids) == {number} and len(ids) >= 2
    assert config["seed"] == 3 and config["llm"] == {"path": "x"}
    losses = [(r["l2s/step"], r["l2s/loss"]) for r in rows if "l2s/loss" in r]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert not any("slm/norm" in row for row in rows)
    assert summary["stages"] == "slm, l2s" and summary["report/quality_ratio"] == 0.75

    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, metrics from metrics order by id").fetchall()
        (settings,) = connection.execute("select config from configs").fetchone()
    assert {name for name, _ in found} == {f"run-{number}"}
    rows = [json.loads(text) for _, text in found]
    losses = [(r["slm/step"], r["slm/loss"]) for r in rows if "slm/loss" in r]
    assert losses == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert json.loads(settings)["seed"] == 3
    assert any(row.get("report/quality_ratio") == 0.75 for row in rows)
    assert any(row.get("stage") == "l2s" for row in rows)

    for stage in ("slm", "l2s"):
        assert list((workdir / stage).glob("*tfevents*"))


def test_without_tensorboard_there_are_no_files_for_it(tmp_path):
    follow(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run/slm").iterdir()} == {"metrics.jsonl"}
    assert not (tmp_path / "run/trackers.json").exists()


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("('wandb',)", "the package wandb is missing; expected pip install 'l2s-jax[wandb]'"),
        ("('mlflow',)", "there is no 'mlflow'; expected some of ('tensorboard', 'wandb', "),
        ("({},)", "there is no {}; expected some of ('tensorboard', 'wandb', "),
        ("('wandb','wandb')", "expected some of ('tensorboard', 'wandb', 'trackio'), each once"),
    ],
)
def test_what_cannot_follow_is_said_before_any_work(tmp_path, capsys, monkeypatch, value, line):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = tiny.write_task(tmp_path / "data")
    arguments = [f"--config={config}", f"--workdir={tmp_path / 'run'}"]
    assert tiny.run(*arguments, f"--config.trackers={value}") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: config.trackers=") and line in said
    assert not (tmp_path / "run").exists()
    assert checks.trackers is trackers


FAKES = {
    "gone": "raise SystemExit('no network')",
    "hangs": "import time; time.sleep(600)",
}


@pytest.mark.parametrize("kind", FAKES)
def test_a_tracker_that_fails_costs_one_warning(tmp_path, caplog, monkeypatch, kind):
    monkeypatch.setattr(trackers, "_PATIENCE_SECONDS", 2.0)
    real = subprocess.Popen

    def start(command, **settings):
        return real([sys.executable, "-c", FAKES[kind]], **settings)

    monkeypatch.setattr(trackers.subprocess, "Popen", start)
    opened = []
    monkeypatch.setattr(trackers, "_open", opened)
    workdir = tmp_path / "run"
    began = time.monotonic()
    with trackers.closing():
        followed = Trackers(["wandb"], str(workdir), CONFIG)
        (process,) = opened
        if kind == "gone":
            process._child.wait()
        for step in range(3000):
            followed.metrics("slm", step, {"loss": 1.0})
        assert time.monotonic() - began < 10
    (said,) = [record.getMessage() for record in caplog.records]
    why = {"gone": "no network", "hangs": "has not taken all within 2 s"}[kind]
    assert said == f"wandb: {why}; the run goes on without it"
    if kind == "hangs":
        os.kill(process._child.pid, 9)


def test_more_than_waits_for_a_tracker_is_too_much(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "_MOST_WAITING", 50)
    monkeypatch.setattr(trackers, "_open", [])
    real = subprocess.Popen
    sleeps = [sys.executable, "-c", FAKES["hangs"]]
    monkeypatch.setattr(trackers.subprocess, "Popen", lambda _, **s: real(sleeps, **s))
    followed = Trackers(["trackio"], str(tmp_path), CONFIG)
    for step in range(5000):
        followed.metrics("slm", step, {"loss": 1.0})
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "trackio: it takes no more; the run goes on without it"
    (process,) = followed._processes
    process._child.kill()
    process._child.wait()


def test_a_killed_run_leaves_what_it_told(tmp_path):
    """The tracker's process ends by itself, and Ctrl-C is not for it."""
    code = (
        "import os, sys, time; from l2s_jax.training.trackers import Trackers\n"
        "followed = Trackers(['trackio'], sys.argv[1], {'seed': 1})\n"
        "followed.metrics('slm', 5, {'loss': 0.5}); time.sleep(1)\n"
        "print(followed._processes[0]._child.pid, flush=True); os.kill(os.getpid(), 9)\n"
    )
    root = Path(trackers.__file__).parent.parent.parent
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], cwd=root, capture_output=True, text=True
    )
    pid = int(killed.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        ((text,),) = connection.execute("select metrics from metrics").fetchall()
    assert json.loads(text)["slm/loss"] == 0.5
