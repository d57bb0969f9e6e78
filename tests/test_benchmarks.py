"""Scripts of benchmarks/ on sizes that take seconds (loading.py has none such)."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"


def run(name, *flags):
    command = [sys.executable, SCRIPTS / f"{name}.py", *flags]
    # One device, not the many of the tests.
    environment = {**os.environ, "XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


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
def test_bad_flags_of_products(flag, message):
    finished = run("products", flag)
    assert finished.returncode == 2
    assert message in finished.stderr.splitlines()[-1]


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
