"""Trainings in a bucket that are killed, and go on; who works in a workdir that is there."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import small
import tiny
import train_child
import xla
from emulator import AT, free_port
from test_buckets import TESTS, lines_of

from l2s_jax import buckets
from l2s_jax.cluster import bucket_lock, job, lock

STEPS = list(range(1, train_child.STEPS + 1))


def start(directory, seconds, *of_job):
    environment = {
        **os.environ,
        "XLA_FLAGS": xla.flags(),
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), *sys.path]),
    }
    command = [sys.executable, str(TESTS / "bucket_child.py"), directory, str(seconds), *of_job]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(processes, path):
    while not buckets.is_object(path):
        for process in processes:
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)


def test_a_killed_job_loses_nothing(store, tmp_path):
    directory = f"{AT}/killed"
    coordinator = f"127.0.0.1:{free_port()}"
    children = [start(directory, 0.3, coordinator, str(i)) for i in range(2)]
    wait_for(children, f"{directory}/checkpoints/6/_CHECKPOINT_METADATA")
    for child in children:
        child.send_signal(signal.SIGKILL)
    for child in children:
        child.communicate()
    # A step that was being sent is none.
    buckets.write(f"{directory}/checkpoints/9/opt/half", b"")
    buckets.remove(f"{directory}/checkpoints/9/_CHECKPOINT_METADATA")
    weights = train_child.run(directory)
    expected = train_child.run(str(tmp_path))
    small.assert_same(weights, expected, rtol=1e-4, atol=1e-6)
    steps = [line["step"] for line in lines_of(directory) if "loss" in line]
    assert steps == STEPS
    kept = {int(name) for name in buckets.names(f"{directory}/checkpoints")}
    assert kept == {18, 21, 24}


def test_of_a_chosen_checkpoint_the_average_alone_is_fetched(store, monkeypatch):
    directory = f"{AT}/chosen"
    expected = train_child.run(directory)
    fetched, fetch = [], buckets.fetch
    monkeypatch.setattr(
        buckets, "fetch", lambda path, file: (fetched.append(path), fetch(path, file))
    )
    small.assert_same(train_child.run(directory), expected)
    start = f"{directory}/checkpoints/{train_child.STEPS}/"
    below = [path.removeprefix(start).split("/") for path in fetched]
    assert {folder for folder, *names in below if names} == {"average", "config"}


HOLD = """
import sys, time
from l2s_jax.cluster import lock
with lock.of_job(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_job_at_a_time_works_in_a_bucket(store, monkeypatch, capsys):
    monkeypatch.setattr(bucket_lock, "LEASE_SECONDS", 20.0)
    workdir = f"{AT}/locked"
    command = [sys.executable, "-c", HOLD, workdir]
    other = subprocess.Popen(command, cwd=TESTS.parent, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        words = f"{workdir}: process {other.pid} on .* has been working there since .*--workdir"
        with pytest.raises(ValueError, match=words), lock.of_job(workdir):
            raise AssertionError("two hold it")
    finally:
        other.kill()
        other.communicate()
    ended = threading.Event()
    monkeypatch.setattr(bucket_lock, "BEAT_SECONDS", 0.5)
    monkeypatch.setattr(job, "end", lambda *_, **__: ended.set())
    begun = time.monotonic()
    with lock.of_job(f"{workdir}/"):  # the same one
        assert time.monotonic() - begun > 15
        assert [name for name in buckets.names(workdir) if "lock" in name] == [".lock-2"]
        # Somebody takes it over: who had it finds out.
        assert buckets.create(f"{workdir}/.lock-3", b"{}")
        assert ended.wait(60)
    assert buckets.names(workdir) == [".lock-3"]
    assert not job.before_end._exit_callbacks


def test_of_those_who_try_at_once_one_gets_the_lock(store):
    holders = [bucket_lock._Holder(f"{AT}/race") for _ in range(6)]
    got = []
    threads = [threading.Thread(target=lambda h=h: got.append(h.create(1))) for h in holders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("workdir", "variables", "words"),
    [
        ("s3://no-such-bucket/run", {}, "s3://no-such-bucket: no such bucket"),
        (f"{AT}/run", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}, "no credentials for"),
        # A name in the error's text is no answer of the store.
        (f"{AT}/403-forbidden", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached"),
        (f"{AT}/run", {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, f"{AT}: cannot be reached"),
        ("gs://bucket/run", {"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"}, "cannot be reached"),
    ],
)
def test_a_bucket_that_is_no_use_is_one_line_within_seconds(
    workdir,
    variables,
    words,
    store,
    tmp_path,
    monkeypatch,
    capsys,
):
    config = tiny.write_task(tmp_path / "data")
    for name, value in variables.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    buckets._system.cache_clear()
    begun = time.monotonic()
    assert tiny.run(f"--config={config}", f"--workdir={workdir}") == 2
    assert time.monotonic() - begun < 30
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert words in line
    buckets._system.cache_clear()


def test_a_missing_package_says_what_to_install(monkeypatch):
    def missing(scheme):
        raise ImportError

    monkeypatch.setattr(buckets.fsspec, "get_filesystem_class", missing)
    with pytest.raises(
        ValueError, match=r"s3fs is not installed; expected pip install 'l2s-jax\[s3\]'"
    ):
        buckets.read("s3://bucket/key")
