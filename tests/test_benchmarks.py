"""The scripts of benchmarks/, on sizes that take seconds: figures are of what was asked for."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


def run(name, *flags):
    command = [sys.executable, SCRIPTS / f"{name}.py", *flags]
    # One device, not the many of the tests.
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


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
        seconds, numbers = row["microseconds"] / 1e6, 64 * 128
        assert row["gflops"] * 1e9 * seconds == pytest.approx(2 * row["rows"] * numbers)
        size = {"float32": 4, "bfloat16": 2}[row["dtype"]]
        assert row["gb_per_s"] * 1e9 * seconds == pytest.approx(size * numbers)


@pytest.mark.parametrize("shape", ["512", "512x", "0x8", "8xa"])
def test_a_shape_that_is_none(shape):
    finished = run("products", f"--shapes={shape}")
    assert finished.returncode == 2
    assert f"shape '{shape}': expected INxOUT" in finished.stderr.splitlines()[-1]


def test_training(tmp_path):
    flags = ("--llm=t5-small", "--slm=t5-small", "--batch_size=1", "--repeats=1")
    tokens = ("--prompt_tokens=4", "--response_tokens=2")
    ours, theirs = rows_of("training", tmp_path / "training.json", *flags, *tokens)
    assert (ours["name"], theirs["name"]) == ("l2s_jax", "transformers")
    # Random weights say little of the next token, on either side.
    for row in (ours, theirs):
        assert row["tokens_per_s"] * row["step_ms"] / 1e3 == pytest.approx(6)
        assert 5 < row["first_loss"] < 100
    assert theirs["speedup"] == 1 and ours["tflop"] > 0


def test_training_from_the_feature_cache():
    flags = ("--llm=t5-small", "--slm=t5-small", "--fusion=cross", "--batch_size=4")
    sizes = ("--prompt_tokens=16", "--response_tokens=2", "--steps=2", "--repeats=1")
    finished = run("features", *flags, *sizes)
    assert finished.returncode == 0, finished.stderr
    work = re.findall(r"a step, .*, (\d+) GFLOP", finished.stdout)
    encoding, cached = map(int, work)
    # 64 prompt tokens, of which the encoder's 18.9M weights take two operations each.
    assert encoding - cached == pytest.approx(2.4, abs=1)
    assert re.search(r"ratio: \d+\.\d\d$", finished.stdout.strip())
