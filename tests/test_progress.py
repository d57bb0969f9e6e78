"""The JSONL file across kills and resumes, TensorBoard events, and both kinds of progress."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from l2s_jax.training import progress
from l2s_jax.training.progress import MetricWriter


class Terminal(io.StringIO):
    def isatty(self):
        return True


def records(directory):
    text = (directory / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_scalars_of_every_kind_keep_their_value(tmp_path):
    with MetricWriter(str(tmp_path / "new"), total_steps=3) as writer:
        writer.write(1, {"loss": 0.1, "lr": np.float32(0.5), "count": jnp.asarray(3)})
    assert records(tmp_path / "new") == [{"step": 1, "loss": 0.1, "lr": 0.5, "count": 3.0}]


def test_values_that_are_not_finite_become_null_in_strict_json(tmp_path):
    with MetricWriter(str(tmp_path), total_steps=3) as writer:
        writer.write(0, {"loss": math.nan, "norm": math.inf, "low": -math.inf, "lr": 1.0})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert records(tmp_path) == [{"step": 0, "loss": None, "norm": None, "low": None, "lr": 1.0}]


def test_a_resumed_run_replaces_its_steps_and_keeps_earlier_ones(tmp_path):
    with MetricWriter(str(tmp_path), total_steps=9) as writer:
        for step in range(6):
            writer.write(step, {"loss": step})
    with MetricWriter(str(tmp_path), total_steps=9, start_step=4) as writer:
        writer.write(4, {"loss": 40})
    assert [(r["step"], r["loss"]) for r in records(tmp_path)] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40),
    ]  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 200), start=st.integers(0, 9))
def test_any_torn_tail_costs_at_most_the_torn_line(tmp_path_factory, cut, start):
    directory = tmp_path_factory.mktemp("torn")
    lines = [json.dumps({"step": step, "loss": step / 3}) + "\n" for step in range(9)]
    content = "".join(lines)[: -cut or None]
    (directory / "metrics.jsonl").write_text(content)
    MetricWriter(str(directory), total_steps=9, start_step=start).close()
    complete = content.count("\n")
    assert [r["step"] for r in records(directory)] == list(range(min(start, complete)))
    assert not (directory / "metrics.jsonl.tmp").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', "\udcff", ""])
def test_a_broken_line_in_the_middle_is_named_and_the_file_left_alone(tmp_path, line):
    content = b'{"step": 0}\n' + line.encode(errors="surrogateescape") + b'\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: expected") as error:
        MetricWriter(str(tmp_path), total_steps=3, start_step=3)
    assert "\n" not in str(error.value)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


def test_a_killed_process_loses_no_line(tmp_path):
    code = (
        "import os, signal, sys; from l2s_jax.training.progress import MetricWriter\n"
        "writer = MetricWriter(sys.argv[1], total_steps=9)\n"
        "for step in range(5): writer.write(step, {'loss': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = os.path.dirname(os.path.dirname(os.path.abspath(progress.__file__)))
    killed = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, stderr=subprocess.PIPE
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [r["step"] for r in records(tmp_path)] == list(range(5))


def events_of(directory):
    """The records of a TensorBoard file: 12 bytes, which begin with a length, before each."""
    from tensorboardX.proto.event_pb2 import Event

    (path,) = directory.glob("events.out.tfevents.*")
    data, events = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_samples_are_lines_of_texts_that_a_resumed_run_replaces(tmp_path):
    def write(step, *responses):
        samples = [{"prompt": "wie\u2028 geht's?", "response": text} for text in responses]
        writer.write_samples(step, samples)

    with MetricWriter(str(tmp_path), total_steps=9) as writer:
        write(2)
        assert not (tmp_path / "samples.jsonl").exists()
        write(3, "gut", "half \ud83d")
        write(6, "zwei\nZeilen")
    with MetricWriter(str(tmp_path), total_steps=9, start_step=5) as writer:
        write(6, "besser")
    lines = (tmp_path / "samples.jsonl").read_bytes().decode().split("\n")[:-1]
    found = [json.loads(line) for line in lines]
    assert [(line["step"], line["response"]) for line in found] == [
        *((3, "gut"), (3, "half \ufffd"), (6, "besser")),
    ]
    assert found[0].keys() == {"step", "prompt", "response"}
    assert "geht's" in lines[0]


def test_tensorboard_has_the_texts_of_samples(tmp_path):
    with MetricWriter(str(tmp_path), total_steps=9, name="slm") as writer:
        writer.write_samples(3, [{"prompt": "a *b*\nc", "response": ""}])
    ((step, text),) = [
        (event.step, value.tensor.string_val[0].decode())
        for event in events_of(tmp_path)
        for value in event.summary.value
        if value.tag.startswith("slm/samples")
    ]
    assert step == 3
    assert "**prompt**\n\n    a *b*\n    c\n" in text and "**response**" in text


def test_tensorboard_gets_the_finite_values(tmp_path):
    with MetricWriter(str(tmp_path), total_steps=9, start_step=7, name="l2s") as writer:
        writer.write(7, {"loss": 0.25, "norm": math.nan})
        writer.write(8, {"loss": 0.125})
    events = events_of(tmp_path)
    values = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert values == [(7, "l2s/loss", 0.25), (8, "l2s/loss", 0.125)]
    assert [e.step for e in events if e.HasField("session_log")] == [7]


def test_a_terminal_shows_name_step_loss_and_speed(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricWriter(str(tmp_path), total_steps=10, start_step=4, name="slm") as writer:
        writer.write(5, {"loss": 2.34567, "tokens_per_s": 12_300.0})
        writer.advance(5)
        writer.advance(8)
    last = terminal.getvalue().split("\r")[-1]
    assert last.startswith("slm:  80%|") and " 8/10 [" in last
    assert "loss 2.346, 12.3k tokens/s" in last and "<" in last


def test_a_log_gets_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with MetricWriter(str(tmp_path), total_steps=200) as writer:
        for step in range(1, 101):
            now[0] += 1.0
            writer.write(step, {"loss": math.nan, "tokens_per_s": math.nan})
            writer.advance(step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [
        "train:  15% 30/200", "train:  30% 60/200", "train:  45% 90/200", "train:  50% 100/200",
    ]  # fmt: skip
    assert lines[0].endswith("[00:30<02:50, loss nan, nan tokens/s]")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_validation_says_how_far_it_is(tmp_path, monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with MetricWriter(str(tmp_path), total_steps=20, name="llm") as writer:
        writer.write(10, {"loss": 1.5})
        writer.advance(10)
        for batch in writer.telling("validating", "abc"):
            now[0] += 31.0
            assert batch in "abc"
        assert "validating, batch 3" in stream.getvalue()
        if terminal:
            assert "loss 1.5" in stream.getvalue().split("batch 3")[-1]
        else:
            assert "llm:  50% 10/20 [01:02" in stream.getvalue()
    # What the log ends with is the step.
    assert "loss 1.5" in stream.getvalue().split("batch 3")[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_with_nothing_left_to_do(tmp_path, monkeypatch, terminal):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    MetricWriter(str(tmp_path), total_steps=5, start_step=5, name="llm").close()
    assert "llm: 100%" in stream.getvalue() and "5/5" in stream.getvalue()
    MetricWriter(str(tmp_path), total_steps=0).close()


def test_files_are_closed_when_the_run_fails(tmp_path):
    with pytest.raises(KeyError), MetricWriter(str(tmp_path), total_steps=2) as writer:
        writer.write(0, {"loss": 1})
        raise KeyError
    assert len(records(tmp_path)) == 1
    with pytest.raises(ValueError, match="closed"):
        writer.write(1, {"loss": 1})


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="start_step 3: expected"):
        MetricWriter(str(tmp_path), total_steps=2, start_step=3)
    with (
        MetricWriter(str(tmp_path), total_steps=2) as writer,
        pytest.raises(ValueError, match="metric name 'step'"),
    ):
        writer.write(0, {"step": 1})
