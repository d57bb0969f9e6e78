"""The LLM's encoding side, adapted in a second stage of L2S's training."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import small
import tiny

import l2s_jax
from l2s_jax.config import default, tuned_l2s
from l2s_jax.models.lora import Adapters
from l2s_jax.models.tuning import Tuned
from l2s_jax.serving import bundle
from l2s_jax.training import optim

ADAPTERS = Adapters(2, 4.0, ".*(attention|feed_forward)/.*kernel")


@pytest.fixture(scope="module")
def parts():
    """(system, its tuned form, trained and frozen of each)."""
    system = small.make_system("add")
    trained, frozen = small.make_params(system)
    tuned = Tuned(system, ADAPTERS)
    return system, tuned, (trained, frozen), tuned.split(trained, frozen, jax.random.key(0))


def test_it_starts_from_the_frozen_one(parts):
    system, tuned, (trained, frozen), (adapted, base) = parts
    batch = small.make_batch(system)
    expected = system.scored(trained, frozen, batch).logits()
    np.testing.assert_array_equal(tuned.scored(adapted, base, batch).logits(), expected)


def test_gradients_reach_the_adapters_and_not_the_base(parts):
    system, tuned, _, (adapted, base) = parts
    batch = small.make_batch(system)

    def loss(adapted, base):
        return (tuned.scored(adapted, base, batch).logits() ** 2).sum()

    grads, of_base = jax.jit(jax.grad(loss, argnums=(0, 1)))(adapted, base)
    sizes = jax.tree_util.tree_leaves_with_path(grads["llm_lora"])
    for path, leaf in sizes:
        # b is zero, so at first only it has a gradient.
        is_b = path[-1].key == "b"
        assert (np.abs(leaf).max() > 0) == is_b, path
    assert not any(np.abs(leaf).max() for leaf in jax.tree.leaves(of_base))


def test_the_change_is_of_low_rank(parts):
    _, tuned, (_, frozen), (adapted, base) = parts
    moved = {**adapted, "llm_lora": small.random_like(adapted["llm_lora"])}
    _, rest, changed = tuned.whole(moved, base)
    assert "llm_lora" not in rest
    before = frozen["encoder"]["layers_0"]["attention"]["query"]["kernel"]
    after = np.asarray(changed["encoder"]["layers_0"]["attention"]["query"]["kernel"])
    assert np.linalg.matrix_rank(after - before, tol=1e-4) == 2
    untouched = ("token_embedding", "embedding")
    np.testing.assert_array_equal(
        changed[untouched[0]][untouched[1]], frozen[untouched[0]][untouched[1]]
    )


def test_the_change_is_trained_whatever_else_is():
    config = default()
    config.l2s.train.update(trainable=("projector/.*",), warmup_steps=4000)
    config.llm.tune.update(rank=2, steps=100)
    train = tuned_l2s(config).train
    leaf = {"kernel": np.zeros((2, 2))}
    found = optim.trained_mask(train, {"projector": leaf, "slm": leaf, "llm_lora": leaf})
    assert found == {
        "projector": {"kernel": True},
        "slm": {"kernel": False},
        "llm_lora": {"kernel": True},
    }
    assert (train.steps, train.warmup_steps) == (100, 50)
    assert config.l2s.train.warmup_steps == 4000


CHANGES = """

import l2s_jax.config
base_config = get_config


def get_config():
    config = base_config()
    config.llm.model = l2s_jax.config.model_config("llama")
    config.llm.model.update(
        width=16, num_heads=2, num_kv_heads=1, head_width=8, feed_forward_width=32, num_layers=3
    )
    config.llm.layer = 2
    config.scan_layers = True
    config.llm.tune.update(rank=2, steps=4, learning_rate=1e-2)
    config.l2s.train.parameter_scale = False
    return config
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(config file, workdir) of a finished run."""
    root = tmp_path_factory.mktemp("tuned")
    config = tiny.write_task(root / "task")
    config.write_text(config.read_text() + CHANGES)
    assert tiny.run(f"--config={config}", f"--workdir={root / 'run'}") == 0
    return config, root / "run"


def test_the_llm_in_the_bundle_has_changed_in_its_kernels_alone(job):
    _, workdir = job
    frozen = bundle.load(str(workdir / "l2s_frozen/model"))
    tuned = bundle.load(str(workdir / "l2s/model"))
    assert tuned[0].llm_config.num_layers == 2
    before, after = (jax.tree_util.tree_leaves_with_path(loaded[2]) for loaded in (frozen, tuned))
    for (path, old), (_, new) in zip(before, after, strict=True):
        is_kernel = path[-1].key == "kernel"
        assert np.array_equal(old, new) != is_kernel, path
    assert small.differ(frozen[1]["slm"], tuned[1]["slm"])


def test_the_card_says_that_the_llm_is_adapted(job):
    _, workdir = job
    card = (workdir / "l2s/model/README.md").read_text()
    assert "- LLM, adapted by LoRA of rank 2: " in card and "frozen" not in card
    assert "frozen large model" not in (workdir / "report.md").read_text()


def test_the_model_answers_without_the_llm_that_it_came_from(job, tmp_path):
    _, workdir = job
    model = tmp_path / "model"
    shutil.copytree(workdir / "l2s/model", model)
    lines = (workdir / "predictions/l2s.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    outputs = l2s_jax.load(str(model)).generate([record["prompt"] for record in records])
    assert [output.text for output in outputs] == [record["response"] for record in records]


def test_status_and_a_second_run_find_it_done(job, capsys):
    config, workdir = job
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", "--mode=status") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0]: line.split()[1] for line in lines}["l2s_frozen"] == "done"
    assert all(line.split()[1] == "done" for line in lines)
    # Another learning rate of the second stage leaves the first.
    flags = ["--config.llm.tune.learning_rate=0.02", "--mode=status"]
    assert tiny.run(f"--config={config}", f"--workdir={workdir}", *flags) == 0
    states = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert (states["l2s_frozen"], states["l2s"]) == ("done", "stale")


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        (["--config.llm.tune.pattern=nothing"], ["config.llm.tune.pattern", "matches none"]),
        (["--config.l2s.train.parameter_scale=True"], ["config.llm.tune.rank=2", "expected False"]),
        (["--config.l2s.lora.rank=2"], ["config.l2s.lora.rank=2", "one of them to be 0"]),
        (["--config.llm.tune.steps=0"], ["tune.steps=0", ">= 1"]),
    ],
)
def test_bad_input_is_one_line(job, flags, fragments, tmp_path, capsys):
    config, _ = job
    assert tiny.run(f"--config={config}", f"--workdir={tmp_path / 'run'}", *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    for fragment in fragments:
        assert fragment in line
    assert not (tmp_path / "run/llm/model").exists()
