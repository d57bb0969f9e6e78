"""What the parts *train* and *quality* of the GPU kit make of their runs."""

from __future__ import annotations

import json
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import xla

from benchmarks.gpu import part, quality, train

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(name, *flags):
    command = [sys.executable, "-m", f"benchmarks.gpu.{name}", *flags]
    environment = {**os.environ, "XLA_FLAGS": xla.flags()}
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.parametrize("name", ["train", "quality"])
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the following arguments are required: --output"),
        (["--output=x.json", "--rehears"], "unrecognized arguments: --rehears"),
        (["--output=x.json", "--limit_s=soon"], "invalid float value: 'soon'"),
        (["--output=x.json"], "JAX sees no accelerator here"),
    ],
)
def test_bad_flags(name, flags, message, capsys, monkeypatch):
    if flags == ["--output=x.json"]:  # as the kit starts it
        finished = run(name, *flags)
        status, said = finished.returncode, finished.stderr
    else:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "benchmarks" / "gpu" / f"{name}.py"), run_name="__main__")
        status, said = ended.value.code, capsys.readouterr().err
    assert status == 2
    line = said.splitlines()[-1]
    assert line.startswith("error: ") and message in line


def steps_of(**milliseconds):
    """Rows of benchmarks/training.py with what the goals are about."""
    return [
        {"name": name, "step_ms": ms, "mfu": 0.4 if name == "l2s_jax" else 0.1}
        for name, ms in milliseconds.items()
    ]


@pytest.mark.parametrize(
    ("rows", "speed", "utilization"),
    [
        (steps_of(l2s_jax=10.0, eager=30.0, compiled=13.0), (1.3, "reached"), (0.4, "reached")),
        (steps_of(l2s_jax=10.0, compiled=12.9), (1.29, "not reached"), (0.4, "reached")),
        (steps_of(l2s_jax=10.0), (None, "not measured"), (0.4, "reached")),
        (steps_of(eager=10.0), (None, "not measured"), (None, "not measured")),
    ],
)
def test_goals_of_training(rows, speed, utilization):
    found = train.goals(train.Pair("a", "b", 1), rows)
    assert [(value, verdict) for _, _, value, verdict in found] == [
        (pytest.approx(speed[0]), speed[1]),
        (utilization[0], utilization[1]),
    ]


SCRIPT = """
import json, sys, time
(path,) = (word.removeprefix("--output=") for word in sys.argv if word.startswith("--output="))
row = {"step_ms": 2.0, "quartiles_ms": [1.0, 3.0], "tokens_per_s": 1.0, "tflops": 1.0, "mfu": 0.5,
       "speedup": None, "peak_gb": None, "compile_s": 1.0}
rows = [row | {"name": name} for name in sys.argv[1].split(",") if name]
json.dump({"rows": rows, "not_measured": {"transformers": "no memory"}}, open(path, "w"))
time.sleep(float(sys.argv[2]))
sys.exit(sys.argv[3] or 0)
"""


@pytest.mark.parametrize(
    ("words", "skipped", "failure"),
    [
        (("l2s_jax", "0", ""), {}, None),
        # Stopped in its turns: what was measured counts.
        (("l2s_jax", "60", ""), {"tiny to tiny: the other turns": "stopped after 3 s"}, None),
        (("", "60", ""), {}, "tiny to tiny: stopped after 3 s"),
        (("", "0", "error: l2s_jax: no"), {}, "tiny to tiny: l2s_jax: no"),
    ],
)
def test_a_run_of_training_that_ends_in_all_ways(
    words, skipped, failure, tmp_path, monkeypatch, capsys
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("sys.argv[1]", repr(words[0])).replace(
        "sys.argv[2]", repr(words[1])).replace("sys.argv[3]", repr(words[2])))  # fmt: skip
    monkeypatch.setattr(train, "SCRIPT", script)
    monkeypatch.setattr(train, "TURNS_S", 1.0)
    path = tmp_path / "train.json"
    # (main sets a variable of the environment.)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setattr(sys, "argv", ["train", "--rehearse", f"--output={path}", "--limit_s=3"])
    assert train.main() == (1 if failure else 0)
    assert json.loads(path.read_text())["skipped"] == {
        "tiny to tiny: transformers": "no memory",
        **skipped,
    }
    errors = capsys.readouterr().err.splitlines()
    assert (f"error: {failure}" in errors) if failure else not errors


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_where_a_run_stands(tmp_path):
    assert quality.state_of(str(tmp_path)) == "not begun"
    steps = {name: {"train": {"steps": 30}} for name in ("llm", "slm", "l2s")}
    write(tmp_path / "config.json", steps)
    assert quality.state_of(str(tmp_path)) == "llm, step 0 of 30, saved at 0"
    # The last line is not whole, and the last checkpoint neither.
    write(tmp_path / "llm" / "metrics.jsonl", '{"step": 10}\n{"step": 20}\n{"st')
    (tmp_path / "llm" / "checkpoints" / "10").mkdir(parents=True)
    (tmp_path / "llm" / "checkpoints" / "20.orbax-checkpoint-tmp").mkdir()
    assert quality.state_of(str(tmp_path)) == "llm, step 20 of 30, saved at 10"
    (tmp_path / "llm" / "model").mkdir()
    write(tmp_path / "labels" / "train-00000.jsonl", "")
    assert quality.state_of(str(tmp_path)) == "labels, 1 files"
    write(tmp_path / "slm" / "metrics.jsonl", '{"step": 1}\n')
    assert quality.state_of(str(tmp_path)) == "slm, step 1 of 30, saved at 0"
    for name in ("slm", "l2s"):
        (tmp_path / name / "model").mkdir(parents=True)
    assert quality.state_of(str(tmp_path)) == "evaluation"


def test_a_report_counts_if_it_is_of_the_newest_run(tmp_path):
    assert quality.report_of(str(tmp_path)) is None
    write(tmp_path / "report.json", {"systems": {}})
    write(tmp_path / "config.json", {})
    os.utime(tmp_path / "report.json", (10, 10))
    assert quality.report_of(str(tmp_path)) is None
    os.utime(tmp_path / "config.json", (5, 5))
    assert quality.report_of(str(tmp_path)) == {"systems": {}}


@pytest.fixture
def run_quality(tmp_path, monkeypatch):
    """Runs the part with a program in the place of a seed's run; (exit status, what it left)."""

    def call(program, *flags):
        path = tmp_path / "quality.json"
        words = lambda folder, seed, rehearse: [  # noqa: E731
            sys.executable, "-c", program, quality.workdir(folder, seed)
        ]  # fmt: skip
        monkeypatch.setattr(quality, "command", words)
        monkeypatch.setattr(quality, "LEAST_S", 0.0)
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        monkeypatch.setattr(sys, "argv", ["quality", "--rehearse", f"--output={path}", *flags])
        return quality.main(), json.loads(path.read_text())

    return call


def test_a_run_is_interrupted_at_the_limit(run_quality, tmp_path):
    program = """if True:
        import json, os, sys, time
        os.makedirs(sys.argv[1])
        steps = {name: {"train": {"steps": 9}} for name in ("llm", "slm", "l2s")}
        json.dump(steps, open(f"{sys.argv[1]}/config.json", "w"))
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            os.makedirs(f"{sys.argv[1]}/llm/checkpoints/4")  # as it saves what it has
            sys.exit(130)
    """
    status, found = run_quality(program, f"--limit_s={quality.GRACE_S + 2}")
    assert status == 0
    (row,) = found["tables"][0]["rows"]
    assert row[:2] == [0, "not finished: llm, step 0 of 9, saved at 4"] and set(row[2:]) == {None}


def test_a_run_that_fails_is_named(run_quality, capsys):
    status, found = run_quality("import sys; sys.exit('error: no such thing')")
    assert status == 1
    assert capsys.readouterr().err == "error: seed 0: no such thing (1)\n"
    assert found["tables"][0]["rows"][0][1] == "not finished: not begun"


def test_what_is_missing_is_skipped(run_quality, monkeypatch):
    monkeypatch.setattr(quality, "NEEDED", ("json", "no_such_package"))
    status, found = run_quality("")
    assert status == 0
    assert found["skipped"] == {"quality": "missing packages: no_such_package"}


def test_the_real_run_needs_the_data(monkeypatch, tmp_path):
    monkeypatch.setattr(quality, "ROOT", tmp_path)
    assert quality.missing(False).startswith("no folder data/multi30k; ")
    (tmp_path / "data" / "multi30k").mkdir(parents=True)
    assert quality.missing(False) == ""


def test_both_parts_follow_the_contract(tmp_path):
    result = part.Result(str(tmp_path / "x.json"))
    result.data["reports"] = {}
    quality.tell(result, str(tmp_path), quality.SEEDS)
    found = json.loads((tmp_path / "x.json").read_text())
    states = [row[1] for row in found["tables"][0]["rows"]]
    assert states == ["not finished: not begun"] * 3
