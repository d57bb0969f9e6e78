"""An LLM that is trained on the task through LoRA, before SLM and L2S learn from it."""

import os

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from l2s_jax.experiment import toy
from l2s_jax.training.checkpoint import Checkpoints

RANK = 2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(the checkpoint that the LLM starts from, its workdir, the flags of its training)."""
    root = tmp_path_factory.mktemp("llm_lora")
    config = tiny.write_task(root / "data")
    texts = toy.write_task(str(root / "toy"))
    llm = toy.write_checkpoint(str(root / "llm"), family="llama", texts=texts)
    flags = [
        *(f"--config={config}", f"--config.llm.path={llm}", "--config.llm.layer=1"),
        *("--config.tokenizer.train_vocab_size=0", "--config.slm.tokenizer.train_vocab_size=30"),
        *("--config.llm.train.parameter_scale=False", "--config.llm.train.steps=3"),
        *("--config.llm.train.learning_rate=0.1", f"--config.llm.lora.rank={RANK}"),
        *("--until=llm", f"--workdir={root / 'run'}"),
    ]
    assert tiny.run(*flags) == 0
    return llm, root / "run" / "llm", flags


def test_kernels_change_by_a_low_rank_and_nothing_else_does(trained):
    llm, stage, _ = trained
    before = load_file(os.path.join(llm, "model.safetensors"))
    after = load_file(stage / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    kernels = {name for name in before if "attn." in name or "mlp." in name}
    assert changed and changed <= kernels
    for name in changed:
        change = after[name] - before[name]
        assert np.linalg.matrix_rank(change, tol=1e-4 * np.abs(change).max()) <= RANK

    # What is trained, and its optimizer's state, is the low-rank change alone.
    with Checkpoints(str(stage / "checkpoints"), best_metric=None) as checkpoints:
        step = checkpoints.latest_step
    items = {entry.name for entry in (stage / "checkpoints" / str(step)).iterdir()}
    assert "lora" in items and "llm" not in items


def test_another_rank_makes_another_llm(trained):
    _, stage, flags = trained
    model = stage / "model" / "model.safetensors"
    first = model.read_bytes()
    assert tiny.run(*flags) == 0
    assert model.read_bytes() == first
    assert tiny.run(*flags, "--config.llm.lora.rank=1") == 0
    assert model.read_bytes() != first
    assert (stage.parent / "llm.old1" / "model" / "model.safetensors").read_bytes() == first


def test_a_pattern_that_matches_nothing_is_refused_before_any_work(trained, tmp_path, capfd):
    _, _, flags = trained
    capfd.readouterr()
    flags = [flag for flag in flags if not flag.startswith("--workdir")]
    changed = [f"--workdir={tmp_path / 'run'}", "--config.llm.lora.pattern=nothing"]
    assert tiny.run(*flags, *changed) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert "llm.lora.pattern" in line and "matches none" in line
    assert not (tmp_path / "run").exists()
