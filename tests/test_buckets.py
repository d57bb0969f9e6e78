"""Everything in a bucket, as on a disk: whole runs, with a store that fails now and then."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import emulator
import pytest
import tiny
from safetensors.numpy import load

from l2s_jax import buckets, copies, files

ROOT = Path(__file__).parent.parent
AT = f"s3://{emulator.BUCKET}"
MODELS = {"llm": "model", "slm": "model", "l2s": "params"}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store in which a request in twenty fails, and one in fifty takes two seconds."""
    before = dict(os.environ)
    with emulator.running(free_port(), 20) as variables:
        os.environ.update(variables, L2S_JAX_CACHE=str(tmp_path_factory.mktemp("copies")))
        buckets._system.cache_clear()
        yield variables
    os.environ.clear()
    os.environ.update(before)
    buckets._system.cache_clear()


def weights(workdir):
    """Bytes of all parameters of a run."""
    found = {}
    for stage, stem in MODELS.items():
        content = files.read_bytes(f"{workdir}/{stage}/model/{stem}.safetensors")
        found |= {f"{stage}/{name}": value.tobytes() for name, value in load(content).items()}
    return found


def flags(config, data, workdir):
    return [
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.task.data_dir={data}",
        "--config.labels.source=llm",
        "--config.distillation.weight=0.5",
        f"--config.features.cache={workdir}/cache",
        "--config.llm.train.steps=6",
    ]


@pytest.fixture(scope="module")
def runs(store, tmp_path_factory):
    """The workdirs of one run on a disk, and of the same in a bucket, which was killed on the way."""
    root = tmp_path_factory.mktemp("runs")
    config = tiny.write_task(root / "data")
    for path in (root / "data").iterdir():
        buckets.send(str(path), f"{AT}/data/{path.name}")
    assert tiny.run(*flags(config, root / "data", root / "disk")) == 0
    workdir = f"{AT}/runs/tiny"
    command = [sys.executable, "-m", "l2s_jax.main", *flags(config, f"{AT}/data", workdir)]
    killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not buckets.is_object(f"{workdir}/llm/checkpoints/2/_CHECKPOINT_METADATA"):
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    assert not files.is_whole(f"{workdir}/llm/model")
    # Its lock is not to be waited for.
    for name in buckets.names(workdir):
        if name.startswith(".lock-"):
            buckets.remove(f"{workdir}/{name}")
    assert tiny.run(*flags(config, f"{AT}/data", workdir)) == 0
    return str(root / "disk"), workdir


def test_a_killed_run_in_a_bucket_ends_as_the_same_run_on_a_disk(runs):
    disk, bucket = runs
    assert weights(bucket) == weights(disk)
    for name in ("llm", "slm", "l2s"):
        path = f"predictions/{name}.jsonl"
        assert files.read_text(f"{bucket}/{path}") == files.read_text(f"{disk}/{path}")
        lines = [json.loads(t) for t in files.read_text(f"{bucket}/{name}/metrics.jsonl").split("\n") if t]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, 7 if name == "llm" else 5))
    report = files.read_json(f"{bucket}/report.json")
    assert report["systems"].keys() == files.read_json(f"{disk}/report.json")["systems"].keys()
    assert not [name for name in buckets.objects(f"{AT}/runs") if ".tmp" in name or ".lock" in name]


def test_what_is_done_is_found_and_generates_the_same(runs, tmp_path, capsys):
    disk, bucket = runs
    assert tiny.run(f"--workdir={bucket}", "--mode=status") == 0
    states = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert set(states) == {"done"}
    buckets.write(f"{AT}/in.txt", b"one two\nthree\n")
    (tmp_path / "in.txt").write_text("one two\nthree\n")
    assert tiny.run(f"--workdir={bucket}", "--mode=generate", f"--input={AT}/in.txt", f"--output={AT}/out.txt") == 0
    assert tiny.run(f"--workdir={disk}", "--mode=generate", f"--input={tmp_path}/in.txt", f"--output={tmp_path}/out.txt") == 0
    assert buckets.read(f"{AT}/out.txt") == (tmp_path / "out.txt").read_bytes()
    assert tiny.run(f"--workdir={bucket}", "--mode=evaluate") == 0
