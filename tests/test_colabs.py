"""The notebooks: clean files, and code cells that run from top to bottom."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import nbformat
import pytest
import xla

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))

# Enough to go through every line; the models learn nothing.
QUICK = {
    **{
        f"{name}.train.{key}": value
        for name in ("llm", "slm", "l2s")
        for key, value in (("steps", 2), ("warmup_steps", 1), ("batch_size", 8))
    },
    "llm.model.num_encoder_layers": 1,
    "llm.model.num_decoder_layers": 1,
    "evaluation.max_examples": 8,
    "evaluation.validation_examples": 8,
    "evaluation.latency.repeats": 1,
    "evaluation.latency.new_tokens": 8,
    "evaluation.latency.batch_size": 2,
    "decoding.max_new_tokens": 8,
    "decoding.batch_size": 8,
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_valid_and_without_outputs(path: pathlib.Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def run(notebook: nbformat.NotebookNode, path: pathlib.Path) -> subprocess.CompletedProcess[str]:
    nbformat.write(notebook, path)
    # One device, as where a notebook runs, and quick compilation.
    environment = os.environ | {
        "IPYTHONDIR": str(path.parent / "ipython"),
        "XLA_FLAGS": xla.flags(),
    }
    return subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", str(path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_quickstart_runs(tmp_path: pathlib.Path) -> None:
    notebook = nbformat.read(ROOT / "colabs" / "quickstart.ipynb", as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    workdir = tmp_path / "run"
    changes = {**QUICK, "task.data_dir": str(tmp_path / "tfds")}
    parameters.source = (
        "from l2s_jax.data.synthetic import SPLIT_SIZES\n"
        "SPLIT_SIZES.update(train=600, validation=50, test=50)\n"
        f"WORKDIR = {str(workdir)!r}\nCHANGES = {changes!r}"
    )

    result = run(notebook, tmp_path / "quickstart.ipynb")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["systems"]) == {"llm", "slm", "l2s", "l2s_mismatched"}
    answers = [line.split(":")[0].strip() for line in result.stdout.splitlines()[-3:]]
    assert answers == ["llm", "slm", "l2s"]


def test_bring_your_own_checkpoint_runs(tmp_path: pathlib.Path) -> None:
    notebook = nbformat.read(ROOT / "colabs" / "bring_your_own_checkpoint.ipynb", as_version=4)
    (parameters,) = (
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    )
    workdir = tmp_path / "run"
    changes = {key: value for key, value in QUICK.items() if not key.startswith("llm.")}
    parameters.source += f"\nWORKDIR = {str(workdir)!r}\nCHANGES = {changes!r}"

    result = run(notebook, tmp_path / "own.ipynb")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "error:" not in result.stdout + result.stderr
    report = json.loads((workdir / "report.json").read_text())
    assert set(report["systems"]) == {"llm", "slm", "l2s", "l2s_mismatched"}
    assert (workdir / "saved" / "llm" / "params.safetensors").exists()
    assert (workdir / "slm_hf" / "model.safetensors").exists()
    for key in ("decoder.final_layer_norm.weight", "transformer.ln_f.weight"):
        assert key in result.stdout
    assert sum("    -> " in line for line in result.stdout.splitlines()) == 3


def test_a_broken_cell_is_noticed(tmp_path: pathlib.Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    assert run(notebook, tmp_path / "broken.ipynb").returncode != 0
