"""Two runs in one workdir: one at a time, and what is left by a run that is gone is taken over."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny

from l2s_jax.cluster import job, lock

ROOT = Path(__file__).parent.parent
HOLD = """
import sys, time
from l2s_jax.cluster import lock
with lock.of_job(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that works in a workdir."""
    workdir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(workdir)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process, workdir
    process.kill()
    process.communicate()


def test_the_second_run_ends_at_once_and_a_lock_of_the_dead_is_taken_over(other, tmp_path, capsys):
    process, workdir = other
    config = tiny.write_task(tmp_path / "data")
    command = [f"--config={config}", f"--workdir={workdir}", "--until=tokenizer"]
    begun = time.monotonic()
    assert tiny.run(*command) == 2
    assert time.monotonic() - begun < 30
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert f"error: {workdir}: process {process.pid} on " in line
    assert " has been working there since 20" in line and "another --workdir" in line
    assert {path.name for path in workdir.iterdir()} == {".lock", ".lock.json"}
    # To look takes no lock.
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", "--mode=status") == 0
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert tiny.run(*command) == 0
    assert not list(workdir.glob(".lock*")) and (workdir / "tokenizer").is_dir()


def as_of(workdir, host):
    """What a run on another host would have left."""
    marker = workdir / ".lock"
    lines = marker.read_text().splitlines()
    text = "\n".join(f"host={host}" if line.startswith("host=") else line for line in lines)
    marker.unlink()
    marker.write_text(text + "\n")
    return marker


def test_a_lock_of_another_host_counts_while_it_is_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE_SECONDS", 2.0)
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.3)
    workdir = tmp_path / "run"
    leave = lock.contextlib.ExitStack()
    lock._take(str(workdir), leave)
    content = (workdir / ".lock").read_text()
    leave.close()
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / ".lock").write_text(content)
    marker = as_of(workdir, "elsewhere")
    done = threading.Event()

    def beat():
        while not done.wait(0.2):
            os.utime(marker)

    thread = threading.Thread(target=beat)
    thread.start()
    words = "another process is working there; expected its end"
    with pytest.raises(ValueError, match=words), lock.of_job(str(workdir)):
        raise AssertionError("two hold it")
    done.set()
    thread.join()
    begun = time.monotonic()
    with lock.of_job(str(workdir)):
        assert 1.5 < time.monotonic() - begun < 30
    # Nothing is left that is to be given back.
    assert not job.before_end._exit_callbacks


def test_a_lock_that_was_made_and_never_written_is_taken_over(tmp_path, monkeypatch):
    """As a kill between these two calls leaves it."""
    monkeypatch.setattr(lock, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.3)
    (tmp_path / ".lock").touch()
    begun = time.monotonic()
    with lock.of_job(str(tmp_path)):
        assert 0.9 < time.monotonic() - begun < 30
        assert (tmp_path / ".lock").stat().st_size
    assert not list(tmp_path.iterdir())


def test_a_lock_that_was_taken_meanwhile_stays(tmp_path):
    path = tmp_path / ".lock"
    path.touch()
    found = path.stat()
    path.unlink()
    (tmp_path / "holds the old file's number").touch()
    path.write_text("another's")
    lock._remove_empty(str(path), found)
    assert path.read_text() == "another's"
    lock._remove_empty(str(tmp_path / "gone"), found)
    assert len(list(tmp_path.iterdir())) == 2


def test_no_lock_is_left_by_a_run_that_fails(tmp_path):
    with pytest.raises(RuntimeError), lock.of_job(str(tmp_path / "a" / "run")):
        raise RuntimeError
    assert not (tmp_path / "a" / "run").exists()


def test_what_killed_runs_were_writing_goes_and_all_else_stays(tmp_path):
    unfinished = f".{'0a' * 16}.tmp"
    kept = [f"out.jsonl{unfinished}", "notes.tmp", "other/.lock", f"other/a{unfinished}"]
    gone = [f"config.json{unfinished}", f"llm/model{unfinished}/config.json", f"l/a{unfinished}"]
    for name in (*kept, *gone):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
    with lock.of_job(str(tmp_path)):
        pass
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == set(kept)
    assert not (tmp_path / f"llm/model{unfinished}").exists()
