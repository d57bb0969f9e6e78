"""On-policy distillation: a model learns on what it writes itself, and the LLM scores it."""

import dataclasses

import jax
import numpy as np
import pytest
import small
from test_train import lines_of

from l2s_jax.models.lora import Lora
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.systems import LanguageModel
from l2s_jax.models.vocabulary import with_vocabulary
from l2s_jax.training import loop, on_policy, update

LLM = small.t5_config(width=24, num_encoder_layers=2, head_width=8)
LLM_PARAMS = small.t5_params(LLM, seed=1)
# Half of the ids, those that end and pad among them.
KEPT = sorted([*range(0, small.VOCABULARY, 2), 1])


# Its first step is on a label, with a share of a half.
SEED = 0


def policy(share=0.5, llm=LLM, params=LLM_PARAMS, most_tokens=8):
    return on_policy.OnPolicy(share, llm, params, most_tokens, end_ids=(1,))


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return (
        x
        - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True))
        - x.max(-1, keepdims=True)
    )


def llm_logits(batch, prompt="llm"):
    """Of the whole LLM, as it scores labels."""
    batch = {**batch, "llm_ids": batch[f"{prompt}_ids"], "llm_mask": batch[f"{prompt}_mask"]}
    return np.asarray(
        jax.jit(small.logits_of(LanguageModel("llm", LLM)))({"llm": LLM_PARAMS}, {}, batch)
    )


@pytest.mark.parametrize("columns", [0, 5, -5])
def test_the_loss_is_the_divergence_of_the_llm_over_the_students_outcomes(columns):
    random = np.random.default_rng(0)
    own = random.standard_normal((2, 3, 20)).astype(np.float32)
    of_llm = 2 * random.standard_normal((2, 3, 20 + columns)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    expected = same = 0.0
    for row, step in zip(*np.nonzero(mask), strict=True):
        some = min(20, 20 + columns)
        log_p, log_q = log_softmax(of_llm[row, step, :some]), log_softmax(own[row, step])
        expected += np.sum(np.exp(log_p) * (log_p - log_q[:some]))
        same += log_p.argmax() == log_q.argmax()
    loss, agreeing = jax.jit(on_policy.apart)(own, of_llm, mask)
    assert float(loss) == pytest.approx(expected, rel=1e-5) and float(agreeing) == same
    nothing, all_agree = on_policy.apart(own, own, mask)
    assert abs(float(nothing)) < 1e-5 and all_agree == mask.sum()


@pytest.mark.parametrize(("name", "is_cut"), [("slm", True), ("add", False)])
def test_a_step_learns_the_llms_distributions_on_a_written_response(name, is_cut):
    kept = KEPT if is_cut else list(range(small.VOCABULARY))
    whole = small.make_system(name)
    system, llm = whole, LLM
    if is_cut:
        llm = with_vocabulary(LLM, kept)
        config = with_vocabulary(whole.decoder, kept)
        field = "config" if name == "slm" else "slm_config"
        system = dataclasses.replace(whole, **{field: config})
    trained, frozen = small.make_params(whole)
    batch = small.make_batch(whole, rows=4)
    batch["response_ids"] %= len(kept)  # ids as they are written
    as_whole = {**batch, "response_ids": np.array(kept, np.int32)[batch["response_ids"]]}

    of_llm = llm_logits(as_whole, whole.prompt_name)
    logits = jax.jit(small.logits_of(whole))

    def expected(own):
        """(mean divergence, share of the same likeliest token), in numpy."""
        log_p = log_softmax(of_llm[..., kept])
        log_q = log_softmax(own[..., kept])
        each = np.sum(np.exp(log_p) * (log_p - log_q), -1)
        same = log_p.argmax(-1) == log_q.argmax(-1)
        mask = batch["response_mask"]
        return each[mask].mean(), same[mask].mean()

    config = small.make_train_config(10, learning_rate=1e-2, accumulation=2)
    optimizer = update.optim.optimizer(config, trained)
    state = update.init_state(trained, optimizer, config)
    step = jax.jit(
        lambda state: update.train_step(
            state,
            (frozen, LLM_PARAMS),
            batch,
            system=system,
            optimizer=optimizer,
            config=config,
            seed=0,
            llm=llm,
        )
    )
    found = []
    for _ in range(4):
        loss, same = expected(np.asarray(logits(state.params, frozen, as_whole)))
        state, metrics = step(state)
        assert float(metrics["on_policy_loss"]) == pytest.approx(loss, rel=1e-4)
        assert float(metrics["on_policy_agreement"]) == pytest.approx(same)
        tokens = batch["response_mask"].sum() / 4
        assert float(metrics["on_policy_tokens"]) == pytest.approx(tokens)
        assert "loss" not in metrics and "accuracy" not in metrics
        found.append(loss)
    assert found == sorted(found, reverse=True)


def test_the_llm_reads_the_same_with_its_layers_stacked():
    batch = small.make_batch(small.make_system("add"))
    inputs = batch["llm_ids"], batch["llm_mask"], batch["response_ids"]
    stacked = dataclasses.replace(LLM, scan_layers=True)
    plain, scanned = (
        jax.jit(lambda params, config=config: on_policy.score(config, params, *inputs).logits())(p)
        for config, p in ((LLM, LLM_PARAMS), (stacked, stack_layers(LLM_PARAMS)))
    )
    np.testing.assert_allclose(scanned, plain, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(plain, llm_logits(batch), rtol=1e-4, atol=1e-4)


def test_no_gradient_goes_through_what_was_sampled_or_to_the_llm():
    system = small.make_system("add")
    trained, frozen = small.make_params(system)
    batch = small.make_batch(system)
    seeds = jax.random.bits(jax.random.key(3), (len(batch["response_ids"]),), "uint32")

    def written(params):
        return on_policy.write_responses(system, params, frozen, batch, seeds, policy())

    def loss(params, llm, responses):
        own = on_policy.with_responses(batch, responses)
        return on_policy.own_loss(system, params, (frozen, llm), own, None, LLM)[0]

    @jax.jit
    def gradients(params):
        through = jax.grad(lambda p: loss(p, LLM_PARAMS, written(p)))(params)
        fixed = written(params)
        given, of_llm = jax.grad(loss, argnums=(0, 1))(params, LLM_PARAMS, fixed)
        return through, given, of_llm

    through, given, of_llm = gradients(trained)
    small.assert_same(through, given, rtol=1e-5, atol=1e-6)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(given))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_llm))


@pytest.mark.parametrize("share", [0.05, 0.25, 0.3, 0.5, 0.9])
def test_own_batches_are_evenly_spread_and_decided_by_the_seed(share):
    def own_steps(seed):
        return [on_policy.is_own(step, share, seed) for step in range(1, 201)]

    which = {seed: own_steps(seed) for seed in (0, 1, 2)}
    for own in which.values():
        for length in (1, 7, 40):
            for start in range(0, 200 - length, 3):
                assert abs(sum(own[start : start + length]) - share * length) < 1 + 1e-6
    assert which[0] == own_steps(0)
    assert len(set(map(tuple, which.values()))) > 1
    assert not any(on_policy.is_own(step, 0.0, 0) for step in range(1, 100))


def test_responses_are_sampled_from_the_model_and_end_where_it_ends_them():
    system = small.make_system("add")
    trained, frozen = small.make_params(system)
    row = small.make_batch(system, rows=1, response_tokens=2)
    batch = {key: np.repeat(value, 4000, axis=0) for key, value in row.items()}
    batch["teacher_ids"] = np.zeros((4000, 2, 3), np.int32)
    write = on_policy.make_writer(system, policy(), 0, small.mesh_of())
    written = jax.device_get(write(trained, frozen, batch, 0))
    ids, mask = written["response_ids"], written["response_mask"]
    # The first token has the model's distribution, and so has the second after the likeliest first.
    logits = np.asarray(jax.jit(small.logits_of(system))(trained, frozen, row))[0, 0]
    for found, after in ((ids[:, 0], None), (None, np.bincount(ids[:, 0]).argmax())):
        if after is not None:
            given = {**row, "response_ids": np.array([[after, 0]], np.int32)}
            logits = np.asarray(jax.jit(small.logits_of(system))(trained, frozen, given))[0, 1]
            found = ids[ids[:, 0] == after, 1]
        shares = np.bincount(found, minlength=small.VOCABULARY) / len(found)
        error = np.abs(shares - np.exp(log_softmax(logits))).sum()
        assert len(found) > 100 and error < 2.5 * np.sqrt(small.VOCABULARY / len(found))
    ended = ids[:, 0] == 1
    np.testing.assert_array_equal(mask, np.stack([np.ones_like(ended), ~ended], 1))
    assert ended.any() and not ids[ended, 1].any()
    assert "teacher_ids" not in on_policy.with_responses(batch, written)
    # Another step, or another seed, gives other responses; the same the same.
    again = jax.device_get(write(trained, frozen, batch, 0))
    small.assert_same(again, written)
    assert small.differ(jax.device_get(write(trained, frozen, batch, 1)), written)
    other = on_policy.make_writer(system, policy(), 1, small.mesh_of())
    assert small.differ(jax.device_get(other(trained, frozen, batch, 0)), written)


def test_a_system_writes_the_same_from_a_cache_by_lora_and_on_a_mesh():
    system = small.make_system("add")
    trained, frozen = small.make_params(system)
    batch = small.make_batch(system, rows=8, response_tokens=8)
    cut = policy(most_tokens=6)
    write = on_policy.make_writer(system, cut, 0, small.mesh_of())
    expected = jax.device_get(write(trained, frozen, batch, 5))
    assert expected["response_mask"].sum(1).max() == 6
    hidden = jax.jit(system.encode)(trained, frozen, batch["llm_ids"], batch["llm_mask"])
    cached = {**batch, "llm_hidden": np.asarray(hidden)}
    small.assert_same(jax.device_get(write(trained, {}, cached, 5)), expected)
    lora = Lora(system, rank=2, alpha=4.0, pattern=".*kernel")
    adapters, base = lora.split(trained, jax.random.key(0))
    in_parts = on_policy.make_writer(system, cut, 0, small.mesh_of(), accumulation=4)
    small.assert_same(jax.device_get(in_parts(trained, frozen, batch, 5)), expected)
    by_lora = on_policy.make_writer(lora, cut, 0, small.mesh_of())
    found = jax.device_get(by_lora(adapters, {"base": base, "inner": frozen}, batch, 5))
    small.assert_same(found, expected)
    mesh = small.mesh_of(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = [loop.sharding.put_parameters(tree, mesh) for tree in (trained, frozen)]
        rows = loop.sharding.put_batch(batch, mesh=mesh, batch_size=8)
        on_mesh = on_policy.make_writer(system, cut, 0, mesh)(*placed, rows, 5)
        assert on_mesh["response_ids"].sharding == rows["response_ids"].sharding
    small.assert_same(jax.device_get(on_mesh), expected)


def fit(directory, name="add", *, share=0.5, wrap=lambda b: b, mesh=(1, 1, 1), **config):
    system = small.make_system(name, dropout_rate=config.get("dropout_rate", 0.0))
    trained, frozen = small.make_params(system)
    config = small.make_train_config(**{"learning_rate": 1e-2, **config})
    pairs = small.random_pairs(32, 5)
    return loop.fit(
        system,
        frozen,
        trained,
        config,
        batches=wrap(small.make_batches(system, pairs, batch_size=config.batch_size)),
        validation=[small.make_batch(system, rows=config.batch_size // config.accumulation)],
        directory=str(directory),
        fingerprint="f",
        seed=SEED,
        mesh=small.mesh_of(*mesh),
        policy=policy(share) if share else None,
    )


CONFIG = {
    "steps": 6,
    "evaluate_every": 3,
    "ema_decay": 0.9,
    "log_every": 2,
    "accumulation": 2,
    "select": "last",
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """(parameters, folder) of a run."""
    directory = tmp_path_factory.mktemp("whole")
    return fit(directory, **CONFIG), directory


def test_a_stopped_run_continues_exactly(uninterrupted, tmp_path):
    with pytest.raises(small.Stop):
        fit(tmp_path, wrap=lambda b: small.Stopping(b, 5), **CONFIG)
    small.assert_same(fit(tmp_path, **CONFIG), uninterrupted[0])
    assert lines_of(tmp_path) == lines_of(uninterrupted[1])


def test_a_run_is_the_same_on_a_mesh(uninterrupted, tmp_path):
    found = fit(tmp_path, mesh=(2, 2, 2), **CONFIG)
    small.assert_same(found, uninterrupted[0], rtol=1e-3, atol=2e-4)
    for line, other in zip(lines_of(tmp_path), lines_of(uninterrupted[1]), strict=True):
        assert line == pytest.approx(other, rel=1e-3)


def test_a_line_has_the_last_of_both_kinds_of_batches(uninterrupted):
    lines = lines_of(uninterrupted[1])
    training = [line for line in lines if "grad_norm" in line]
    assert [line["step"] for line in training] == [2, 4, 6]
    own = [on_policy.is_own(step, 0.5, 0) for step in range(1, 7)]
    # A validation at step 3 begins a line anew.
    for line, steps in zip(training, (own[:2], own[3:4], own[4:]), strict=True):
        assert line["on_policy_share"] == sum(steps) / len(steps)
        assert ("on_policy_loss" in line, "loss" in line) == (any(steps), not all(steps))
    assert not any("on_policy" in key for line in lines if "val_loss" in line for key in line)


def test_no_parameter_of_the_llm_is_in_a_checkpoint(uninterrupted):
    saved = [path.name for path in (uninterrupted[1] / "checkpoints/6").iterdir() if path.is_dir()]
    assert set(saved) - {"metrics"} == {"projector", "slm", "opt", "average", "data", "config"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{share: (parameters, folder)} of two runs alike but for that."""
    root = tmp_path_factory.mktemp("runs")
    config = {"steps": 80, "evaluate_every": 80, "select": "last"}
    return {
        share: (fit(root / str(share), share=share, **config), root / str(share))
        for share in (0.0, 0.5)
    }


def test_other_batches_are_trained_as_without(runs):
    plain, lines = (lines_of(directory) for _, directory in runs.values())
    assert not any("on_policy" in key for line in plain for key in line)
    own = [on_policy.is_own(step, 0.5, SEED) for step in range(1, 81)]
    first = own.index(True)
    assert first > 0
    for line, other in list(zip(lines, plain, strict=True))[:first]:
        assert line == {**other, "on_policy_share": 0.0}
    assert ["on_policy_loss" in line for line in lines[:80]] == own
    assert ["loss" in line for line in lines[:80]] == [not one for one in own]


def test_a_model_comes_to_agree_with_the_llm_on_what_it_writes(runs):
    """On prompts that it has not seen, on its own responses, more than by labels alone."""
    system = small.make_system("add")
    _, frozen = small.make_params(system)
    held_out = small.make_batch(system, rows=32, response_tokens=8, seed=9)

    @jax.jit
    def score(params):
        seeds = jax.random.bits(jax.random.key(7), (32,), "uint32")
        written = on_policy.write_responses(system, params, frozen, held_out, seeds, policy())
        batch = on_policy.with_responses(held_out, written)
        sums = on_policy.own_loss(system, params, (frozen, LLM_PARAMS), batch, None, LLM)[1]
        return sums["loss"] / sums["tokens"], sums["correct"] / sums["tokens"]

    without, own = (score(params) for params, _ in runs.values())
    assert own[0] < 0.7 * without[0]
    assert own[1] > without[1]
