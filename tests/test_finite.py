"""Numbers that are not finite: steps that are left out, runs that end, weights that are refused."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small
import tiny
from safetensors.numpy import load_file, save_file

from l2s_jax import sealed
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.reading import _is_finite
from l2s_jax.data.batches import examples_of
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.experiment import toy
from l2s_jax.training import loop, meter, optim, update
from l2s_jax.training.finite import NotFinite

POISON = 7


@dataclasses.dataclass(frozen=True)
class Poisoned:
    """A system whose states and logits are NaN where a prompt has the token POISON."""

    inner: object

    @property
    def prompt_name(self):
        return self.inner.prompt_name

    def scored(self, trained, frozen, batch, dropout_key=None):
        ids = batch[f"{self.prompt_name}_ids"]
        poison = jnp.where(jnp.any(ids == POISON, axis=1), jnp.nan, 0.0)
        scored = self.inner.scored(trained, frozen, batch, dropout_key)
        return scored._replace(states=scored.states + poison[:, None, None])


def pairs_with_poison(*bad, count=40):
    """Examples of which only those of these numbers have POISON in their prompt."""
    pairs = small.random_pairs(count, 5)
    clean = [(" ".join("9" if t == str(POISON) else t for t in p.split()), r) for p, r in pairs]
    return [(f"{p} {POISON}" if i in bad else p, r) for i, (p, r) in enumerate(clean)]


def fit(directory, *bad, name="slm", mesh=(1, 1, 1), wrap=lambda batches: batches, **config):
    system = small.make_system(name)
    params, frozen = small.make_params(system)
    pairs = pairs_with_poison(*bad)
    config = {"steps": 10, "evaluate_every": 5, "learning_rate": 1e-2, "ema_decay": 0.9, **config}
    config = small.make_train_config(**config)
    order = {"buckets": ((8, 8),), "batch_size": config.batch_size, "seed": 0}
    data = small.make_data(pairs, (8, 8))
    return loop.fit(
        Poisoned(system),
        frozen,
        params,
        config,
        batches=wrap(small.make_batches(system, pairs, batch_size=config.batch_size)),
        validation=[small.make_batch(system, rows=8)],
        directory=str(directory),
        fingerprint="f",
        seed=0,
        mesh=small.mesh_of(*mesh),
        examples=lambda step: examples_of(data, step, **order),
    )


def lines_of(directory):
    with open(os.path.join(directory, "metrics.jsonl")) as file:
        lines = [json.loads(line) for line in file]
    return [{k: v for k, v in line.items() if k not in meter.TIMES} for line in lines]


def batches_of(steps, count=40):
    """The examples of each step's batch of 8."""
    data = small.make_data(small.random_pairs(count, 5), (8, 8))
    order = {"buckets": ((8, 8),), "batch_size": 8, "seed": 0}
    return {step: list(examples_of(data, step, **order)) for step in range(1, steps + 1)}


@pytest.mark.parametrize(("optimizer", "accumulation"), [("adamw", 4), ("adafactor", 1)])
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(optimizer, accumulation):
    system = Poisoned(small.make_system("add"))
    params, frozen = small.make_params(system.inner)
    config = small.make_train_config(
        10, ema_decay=0.5, accumulation=accumulation, optimizer=optimizer, weight_decay=0.1
    )
    made = optim.optimizer(config, params)
    settings = {"system": system, "optimizer": made, "config": config, "seed": 0}
    step = jax.jit(lambda *inputs: update.train_step(*inputs, **settings))
    good = small.make_batch(system.inner, rows=8)
    good["llm_ids"] = np.where(good["llm_ids"] == POISON, 9, good["llm_ids"])
    bad = {**good, "llm_ids": good["llm_ids"].copy()}
    bad["llm_ids"][3, 0] = POISON
    one, metrics = step(update.init_state(params, made, config), frozen, good)
    assert metrics["skipped"] == 0
    two, metrics = step(one, frozen, bad)
    assert metrics["skipped"] == 1 and not np.isfinite(metrics["loss"])
    assert two.step == 2
    small.assert_same(two.replace(step=one.step), one)
    three, metrics = step(two, frozen, good)
    assert metrics["skipped"] == 0 and small.differ(three.params, two.params)


def test_batches_are_named_by_the_examples_as_they_were_given():
    rows = [Example(str(5 + i), "1 " * (9 if i % 3 == 0 else 2), ()) for i in range(30)]
    tokenizer = small.NumberTokenizer()
    data = TokenizedExamples(
        rows,
        prompt_tokenizer=tokenizer,
        response_tokenizer=tokenizer,
        max_prompt_tokens=8,
        max_response_tokens=8,
        keep_cut=False,
    )
    assert len(data) == 20
    order = {"buckets": ((8, 8),), "batch_size": 5, "seed": 3}
    batches = small.training_batches(data, prompt_name="llm", **order)
    for step in range(1, 9):
        numbers = examples_of(data, step, **order)
        assert [row[0] for row in next(batches)["llm_ids"]] == [5 + n for n in numbers]
        assert all(n % 3 for n in numbers)


def test_a_run_ends_at_what_is_not_finite_and_names_it(tmp_path):
    numbers = batches_of(10)
    bad = next(n for n in numbers[7] if n not in numbers[6])
    first = min(step for step, held in numbers.items() if bad in held)
    with pytest.raises(NotFinite) as error:
        fit(tmp_path / "slm", bad)
    listed = ", ".join(map(str, numbers[first]))
    assert str(error.value) == (
        f"slm: step {first}: loss nan, grad norm nan, at learning rate 0.01, with the training "
        f"examples {listed} (counted from 0); expected a lower learning rate, other data, or a "
        "max_bad_steps above 0"
    )
    kept = [int(p.name) for p in (tmp_path / "slm/checkpoints").iterdir() if p.name.isdigit()]
    assert kept == ([5] if first > 5 else [])


def test_few_such_steps_are_left_out_counted_and_resumed_bit_for_bit(tmp_path):
    numbers = batches_of(10)
    bad = numbers[2][0]
    steps = [step for step, held in numbers.items() if bad in held]
    whole = fit(tmp_path / "whole", bad, max_bad_steps=3)
    lines = lines_of(tmp_path / "whole")
    found = {line["step"]: line["skipped_steps"] for line in lines if "loss" in line}
    assert found == {step: sum(s <= step for s in steps) for step in range(1, 11)}
    assert found[10] == len(steps) > 1
    assert all((line["loss"] is None) == (line["step"] in steps) for line in lines[:5])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(whole))

    with pytest.raises(small.Stop):
        fit(tmp_path / "parts", bad, max_bad_steps=3, wrap=lambda b: small.Stopping(b, 7))
    small.assert_same(fit(tmp_path / "parts", bad, max_bad_steps=3), whole)
    assert lines_of(tmp_path / "parts") == lines


def test_a_row_of_such_steps_counts_across_a_checkpoint(tmp_path):
    everywhere = range(40)
    with pytest.raises(NotFinite, match=r"step 8: loss nan, grad norm nan, in 8 steps in a row"):
        fit(tmp_path / "slm", *everywhere, max_bad_steps=7, log_every=100)
    # From the checkpoint of step 5 on, where there were five in a row.
    with pytest.raises(NotFinite, match=r"step 7: .*, in 7 steps in a row"):
        fit(tmp_path / "slm", *everywhere, max_bad_steps=6)


@pytest.mark.parametrize("name", ["slm", "add"])
def test_a_learning_rate_that_is_far_too_large_ends_the_run(name, tmp_path):
    with pytest.raises(NotFinite, match=r"step 2: .* at learning rate 1e\+30"):
        fit(tmp_path / name, name=name, learning_rate=1e30)
    assert not list((tmp_path / name / "checkpoints").iterdir())


def test_what_the_last_step_makes_is_looked_at_before_it_is_saved(tmp_path):
    # At the last step no loss follows; the parameters are looked at before they are saved.
    settings = {"steps": 1, "learning_rate": 3e38, "clip_norm": 0.0, "parameter_scale": False}
    with pytest.raises(NotFinite, match="the loss on the validation split is not finite after st"):
        fit(tmp_path / "slm", **settings)
    settings["learning_rate_scales"] = ((".*", 1e3),)
    with pytest.raises(NotFinite, match="parameters are not finite after step 1, which is not sa"):
        fit(tmp_path / "slm", **settings)
    assert not list((tmp_path / "slm" / "checkpoints").iterdir())


def test_a_mesh_leaves_out_the_same_steps(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    numbers = batches_of(5)
    bad = numbers[2][0]
    config = {"steps": 5, "max_bad_steps": 3}
    one = fit(tmp_path / "one", bad, **config)
    eight = fit(tmp_path / "eight", bad, mesh=(2, 2, 2), **config)
    small.assert_same(eight, one, rtol=1e-3, atol=2e-4)
    for line in lines_of(tmp_path / "eight")[:5]:
        expected = sum(bad in numbers[step] for step in range(1, line["step"] + 1))
        assert line["skipped_steps"] == expected


def test_the_command_ends_with_one_line_and_no_model(tmp_path, capsys):
    config = tiny.write_task(tmp_path / "data")
    command = [f"--config={config}", f"--workdir={tmp_path / 'run'}", "--until=llm"]
    assert tiny.run(*command, "--config.llm.train.learning_rate=1e30") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: llm: step 2: ") and "the training examples" in error
    assert not (tmp_path / "run/llm/model").exists()
    assert tiny.run(*command, "--config.llm.train.max_bad_steps=-1") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "config.llm.train.max_bad_steps=-1: expected an integer >= 0" in error


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(np.float32, np.nan), (np.float16, -np.inf), (ml_dtypes.bfloat16, np.inf)],
)
def test_weights_that_are_not_finite_are_refused_where_they_are_read(tmp_path, dtype, value):
    texts = toy.write_task(str(tmp_path / "task"))
    directory = toy.write_checkpoint(str(tmp_path / "llm"), family="t5", texts=texts)
    os.remove(os.path.join(directory, sealed.SUMS))
    path = os.path.join(directory, "model.safetensors")
    tensors = {name: tensor.astype(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    _, params = pretrained.load(directory)
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = value
    save_file(tensors, path)
    line = f"model.safetensors: {name} has numbers that are not finite; expected"
    for read in (pretrained.load, pretrained.load_encoder):
        with pytest.raises(ValueError, match=line):
            read(directory)
    assert _is_finite(tensors["shared.weight"])
    # Nor are such ones written.
    config = pretrained.read_config(directory)
    params["token_embedding"]["embedding"][0, 0] = value
    with pytest.raises(FloatingPointError, match="parameter token_embedding/embedding is not fin"):
        pretrained.save_hf(config, params, str(tmp_path / "new"))
    assert not (tmp_path / "new").exists()
