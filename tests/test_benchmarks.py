"""Scripts of benchmarks/ on sizes that take seconds (loading.py has none such)."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import xla

from l2s_jax.checkpoints import pretrained
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.training import update

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


def run(name, *flags, environment=None):
    command = [sys.executable, SCRIPTS / f"{name}.py", *flags]
    environment = {**os.environ, "XLA_FLAGS": xla.flags(), **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def run_here(name, *flags):
    """The same in this process, which needs no start: its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.syspath_prepend(SCRIPTS)
        patch.setattr(sys, "argv", [f"{name}.py", *flags])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
    return ended.value.code


def rows_of(name, path, *flags):
    finished = run(name, *flags, f"--output={path}")
    assert finished.returncode == 0, finished.stderr
    rows = json.loads(path.read_text())["rows"]
    assert finished.stdout.count("\n| ") == len(rows)  # and a header, which is the first line
    return rows


def test_products(tmp_path):
    flags = ("--rows=1,3", "--shapes=64x128,128x64", "--dtypes=float32,bfloat16", "--megabytes=1")
    rows = rows_of("products", tmp_path / "products.json", *flags, "--repeats=2")
    assert [(row["dtype"], row["inputs"], row["outputs"], row["rows"]) for row in rows] == [
        (dtype, inputs, outputs, count)
        for dtype in ("float32", "bfloat16")
        for inputs, outputs in ((64, 128), (128, 64))
        for count in (1, 3)
    ]
    for row in rows:
        matrix = {"float32": 4, "bfloat16": 2}[row["dtype"]] * 64 * 128
        assert row["products"] == round(1e6 / matrix)
        read = row["gb_per_s"] * row["chain_ms"] * 1e6
        assert read == pytest.approx(1e6, rel=0.02)  # a megabyte, in whole matrices
        assert row["gflops"] / row["gb_per_s"] == pytest.approx(2 * row["rows"] * 64 * 128 / matrix)


@pytest.mark.parametrize("shape", [(4, 4), (4, 12), (4, 10), (10, 4)])
def test_a_chain_of_products(shape):
    specification = importlib.util.spec_from_file_location("products", SCRIPTS / "products.py")
    products = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(products)
    matrices = products.random_matrices(*shape, "float32", megabytes=1)[:3]
    found = products.program(products.Chain(2, *shape, "float32"), matrices)()
    x = np.ones((2, shape[0]))
    for matrix in matrices:
        y = x @ np.asarray(matrix, np.float64)
        x = np.resize(y[0], shape[0])[None].repeat(2, 0)
        x += y[:, shape[0] :].mean(1, keepdims=True) if shape[1] > shape[0] else 0
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        *((f"--shapes={shape}", f"shape '{shape}': expected INxOUT") for shape in ("512", "0x8")),
        ("--shapes=8x8,8xa", "shape '8xa': expected INxOUT"),
        ("--rows=1,0", "'1,0': expected positive integers"),
        ("--rows=a", "'a': expected positive integers"),
        ("--repeats=0", "'0': expected positive integers"),
        ("--dtypes=float16", "dtype 'float16': expected float32 or bfloat16"),
    ],
)
def test_bad_flags_of_products(flag, message, capsys):
    assert run_here("products", flag) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


SIZES = ("--llm=tiny", "--slm=tiny", "--batch_size=1", "--prompt_tokens=4", "--response_tokens=2")


def test_training(tmp_path):
    flags = ("--repeats=3", "--steps=2", "--threads=1", "--together")
    ours, theirs = rows_of("training", tmp_path / "training.json", *SIZES, *flags)
    assert (ours["name"], theirs["name"]) == ("l2s_jax", "transformers")
    for row in (ours, theirs):
        assert row["tokens_per_s"] * row["step_ms"] / 1e3 == pytest.approx(6)
        first, third = row["quartiles_ms"]
        assert 0 < first <= row["step_ms"] <= third
        # Random weights say little of the next token, on either side.
        assert 5 < row["first_loss"] < 100
    assert theirs["speedup"] == 1 and ours["tflop"] > 0
    assert theirs["attention"] == "sdpa"
    for count in ("parameters", "llm_parameters"):
        assert ours[count] == theirs[count] > 2_000_000


@pytest.fixture
def sides(monkeypatch):
    """training_sides.py, as training.py imports it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("training_sides")


def test_both_sides_of_training_have_the_same_loss(sides, tmp_path):
    arguments = argparse.Namespace(
        llm="tiny", slm="tiny", batch_size=2, prompt_tokens=5, response_tokens=3,
        dtype="float32", encoder_dtype="auto",
    )  # fmt: skip
    models = sides.TorchModels(arguments, "cpu")
    models.slm.eval()  # without dropout
    batch = sides.random_batch(arguments, 32128)
    batch["llm_mask"][1, 3:] = False
    ids, mask, labels = (
        torch.tensor(batch[name]).long() for name in ("llm_ids", "llm_mask", "response_ids")
    )
    theirs = models.loss(ids, mask, labels).item()

    for name in ("llm", "slm"):
        getattr(models, name).save_pretrained(tmp_path / name)
    llm, frozen = pretrained.load_encoder(str(tmp_path / "llm"))
    slm, params = pretrained.load(str(tmp_path / "slm"))
    inward, outward = ({"kernel": models.projector[i].weight.detach().numpy().T} for i in (0, 2))
    trained = {"projector": {"inward": inward, "outward": outward}, "slm": params}
    system = LlmToSlm(llm.config, slm.config, projector_width=slm.config.width)
    loss, sums = update.batch_loss(system, trained, frozen, batch, None, 0.0)
    assert float(loss / sums["tokens"]) == pytest.approx(theirs, rel=1e-4)


def test_a_peer_that_fails_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('no memory\\nat all')")
    path = tmp_path / "training.json"
    environment = {"PYTHONPATH": str(tmp_path)}
    finished = run("training", *SIZES, "--repeats=1", f"--output={path}", environment=environment)
    assert finished.returncode == 0, finished.stderr
    reason = "RuntimeError: no memory at all"
    assert finished.stdout.splitlines()[-1] == f"transformers: not measured: {reason}"
    found = json.loads(path.read_text())
    assert found["not_measured"] == {"transformers": reason}
    (row,) = found["rows"]
    assert row["name"] == "l2s_jax" and row["speedup"] is None


def test_ours_that_fails_is_an_error(tmp_path):
    path = tmp_path / "training.json"
    flags = ("--ready_s=1", "--together", "--threads=1", f"--output={path}")
    finished = run("training", *SIZES, *flags)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == "error: l2s_jax: not ready in time"
    assert json.loads(path.read_text())["not_measured"]["l2s_jax"] == "not ready in time"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_who_waits_is_stopped_and_ends_with_its_parent():
    command = [sys.executable, SCRIPTS / "training.py", *SIZES, "--repeats=1000000"]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "XLA_FLAGS": xla.flags()},
    )
    stopped = None
    try:
        # Ours is stopped as soon as it is ready: the other one is made then.
        while stopped is None:
            assert parent.poll() is None
            stopped = next((pid for pid, state in sides_of(parent.pid) if state == "T"), None)
            time.sleep(0.01)
        others = [pid for pid, _ in sides_of(parent.pid)]
    finally:
        parent.kill()
        parent.wait()
    for _ in range(6000):
        if not any(os.path.exists(f"/proc/{pid}/cwd") for pid in others):  # zombies have none
            return
        time.sleep(0.01)
    pytest.fail(f"{others} did not end")


def sides_of(parent):
    """(process id, state) of the children that are sides."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            _, _, rest = (folder / "stat").read_text().rpartition(")")
            state, parent_id = rest.split()[:2]
            if int(parent_id) == parent and b"spawn_main" in (folder / "cmdline").read_bytes():
                found.append((int(folder.name), state))
    return found


def test_a_training_that_is_asked_to_end_loses_no_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setenv("XLA_FLAGS", xla.flags())
    saving = importlib.import_module("saving")
    saving.write_task(str(tmp_path), width=64, layers=1, batch_size=2)
    training = saving.Training(str(tmp_path), "run", os.environ["JAX_COMPILATION_CACHE_DIR"])
    found = saving.interrupt(training, signal.SIGTERM, steps=1000, evaluate_every=1000)
    assert found["signal"] == "SIGTERM" and found["lost"] == 0
    assert found["end_s"] > 0 and found["new_step_s"] > 0
    (saved,) = training.saved()
    assert training.size(saved) > 10_000
    assert saved >= saving.AT and training.step() >= saved


BAD_FLAGS = [
    ("training", "--llm=gpt-9", "no geometry 'gpt-9', expected one of ['tiny', 't5-small'"),
    ("training", "--slm=gpt2", "no geometry 'gpt2', expected"),
    ("training", "--batch_size=0", "'0': expected positive integers"),
    ("training", "--repeats=1,2", "'1,2': expected one positive integer"),
    ("training", "--steps=-1", "'-1': expected positive integers"),
    ("training", "--threads=x", "'x': expected positive integers"),
    ("training", "--compiled=fast", "mode 'fast', expected some of default, max-autotune"),
    ("training", "--dtype=float16", "invalid choice: 'float16'"),
    ("training", "--output=/no/such/folder/x.json", "no such folder"),
    ("training", "--batch=3", "unrecognized arguments: --batch=3"),
    ("features", "--llm=gpt-9", "invalid choice: 'gpt-9'"),
    ("features", "--steps=1", "'1': expected at least 2"),
    ("features", "--repeats=0", "'0': expected positive integers"),
    ("features", "--dtype=float16", "invalid choice: 'float16'"),
    ("saving", "--width=100", "--width=100: expected a multiple of 64"),
    ("saving", "--steps=0", "'0': expected positive integers"),
]


@pytest.mark.parametrize(("script", "flag", "message"), BAD_FLAGS)
def test_bad_flags_are_one_line(script, flag, message, capsys):
    if flag == next(first for name, first, _ in BAD_FLAGS if name == script):
        finished = run(script, flag)  # as people start it: nothing that it imports says a word
        status, said, printed = finished.returncode, finished.stderr, finished.stdout
    else:
        status = run_here(script, flag)
        printed, said = capsys.readouterr()
    assert status == 2
    (line,) = said.splitlines()
    assert line.startswith("error: ") and message in line
    assert not printed


def test_training_from_the_feature_cache():
    flags = ("--llm=t5-small", "--slm=tiny", "--fusion=cross", "--batch_size=4")
    sizes = ("--prompt_tokens=16", "--response_tokens=2", "--steps=2", "--repeats=1")
    finished = run("features", *flags, *sizes)
    assert finished.returncode == 0, finished.stderr
    work = re.findall(r"a step, .*, (\d+) GFLOP", finished.stdout)
    encoding, cached = map(int, work)
    # 64 prompt tokens, of which the encoder's 18.9M weights take two operations each.
    assert encoding - cached == pytest.approx(2.4, abs=1)
    assert re.search(r"ratio: \d+\.\d\d$", finished.stdout.strip())


def test_a_low_rank_change_beside_kernels_takes_less_memory(monkeypatch, capsys):
    monkeypatch.syspath_prepend(SCRIPTS)
    lora = importlib.import_module("lora")
    small = GPT2Config(vocab_size=64, width=256, num_heads=4, feed_forward_width=1024, num_layers=3)
    monkeypatch.setitem(lora.GEOMETRIES, "gpt2", small)
    flags = ("--rank=2", "--rows=1", "--tokens=8", "--repeats=2")
    monkeypatch.setattr(sys, "argv", ["lora.py", *flags])
    lora.main()
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0].strip() for line in lines] == ["kernels made", "beside"]
    made, beside = (float(line[2]) for line in lines)
    # Three layers of 12 x 256 x 256 numbers, once as they are changed and once as their gradient.
    assert made - beside > 8


@pytest.mark.parametrize("script", sorted(path.stem for path in SCRIPTS.glob("*.py")))
def test_what_a_script_imports_is_there(script, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    importlib.import_module(script)


def test_an_llm_drafted_for_says_what_it_says_alone(tmp_path):
    config = tiny.write_task(tmp_path / "task")
    workdir = tmp_path / "run"
    # Decoders deeper than their encoders: transformers counts the latter's layers.
    deep = [f"--config.{name}.model.num_decoder_layers=2" for name in ("llm", "slm")]
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", "--until=l2s", *deep) == 0
    path = tmp_path / "assisted.json"
    for batch_size, count in ((1, 5), (2, 3)):
        flags = (f"--workdir={workdir}", f"--batch_size={batch_size}", f"--output={path}")
        finished = run("assisted", "--prompts=3", *flags)
        assert finished.returncode == 0, finished.stderr
        systems = json.loads(path.read_text())["systems"]
        assert len(systems) == count == finished.stdout.count("\n| ")
        for name, row in systems.items():
            assert row["ms"] > 0 and (row["equal"] == 3 or name == "L2S"), name
