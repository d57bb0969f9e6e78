"""Prompts whose positions a mesh splits, beside the same on one device."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import tiny
from hypothesis import given
from hypothesis import strategies as st
from test_attention import FAMILIES, SCALE, biases, check_kernel, normal, parts, small_blocks

from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.decoding.engine import GREEDY, jitted_decode
from l2s_jax.models import sequence
from l2s_jax.models.attention import attend
from l2s_jax.models.families import make_module
from l2s_jax.models.layers import Dropout
from l2s_jax.models.systems import LlmToSlm
from l2s_jax.training import optim, update

# Sizes that programs are made for change here.
pytestmark = pytest.mark.usefixtures("programs_of_its_own")

MESHES = {
    "all": {"sequence": 8},
    "mixed": {"data": 2, "sequence": 2, "tensor": 2},
    "fsdp": {"fsdp": 2, "sequence": 4},
}
every_mesh = pytest.mark.parametrize("mesh", MESHES)


@pytest.fixture(autouse=True, scope="module")
def eight_devices():
    if jax.device_count() != 8:
        pytest.skip("needs 8 devices")


@given(st.integers(1, 64))
def test_each_device_attends_for_as_much_before_its_parts_as_any(ways):
    parts = sequence.zigzag(ways)
    # One of them is its own.
    assert parts[:, 0].tolist() == list(range(0, 2 * ways, 2))
    assert sorted(parts.reshape(-1)) == list(range(2 * ways))
    assert set(parts.sum(axis=1)) == {2 * ways - 1}


@pytest.mark.parametrize("ways", [2, 8])
def test_parts_are_where_they_are_attended_for_and_come_back(ways):
    x = jnp.arange(2 * ways * 3).reshape(1, -1)

    def there_and_back(x):
        found = sequence.exchanged(x, ways, axis=1)
        return jnp.concatenate(found, axis=1), sequence.returned(found, ways, axis=1)

    split = jax.P(None, "sequence")
    with jax.set_mesh(small.mesh_of(sequence=ways)):
        there, back = jax.jit(
            jax.shard_map(there_and_back, in_specs=split, out_specs=(split, split))
        )(x)
    np.testing.assert_array_equal(there[0], sequence.attended(x.shape[1], ways))
    np.testing.assert_array_equal(back, x)


def check_attention(mesh, query, key_value, bias, weights):
    """The results where `weights` are not 0, and the gradients, as on one device; gives the text of
    the program.
    """

    def both():
        """A function of its own each time: JAX has traced it for no other mesh."""

        def loss(query, key_value):
            found = attend(query, key_value, bias, SCALE)
            return jnp.sum(found * weights), found * (weights != 0)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    expected = both()(query, key_value)
    with jax.set_mesh(small.mesh_of(**MESHES[mesh])):
        program = both().lower(query, key_value).compile()
        found = program(query, key_value)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), found, expected
    )
    return program.as_text()


@every_mesh
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kind", ["causal", "window", "window by a number", "distance"])
def test_attention_and_its_gradient_are_those_of_one_device(monkeypatch, kind, groups, mesh):
    small_blocks(monkeypatch)
    mask = jax.random.bernoulli(jax.random.key(5), 0.7, (2, 48)).at[:, 0].set(True)
    query, key_value = parts(2, 4, groups, 48, 48, 6)
    bias = biases(mask)[kind]
    # What sees nothing in its window is padding: in blocks, what it takes is undefined.
    weights = normal(2, 48, 24, seed=6) * mask[:, :, None]

    text = check_attention(mesh, query, key_value, bias, weights)
    assert "collective-permute" in text or kind == "distance"


@pytest.mark.parametrize("kind", ["causal", "distance"])
def test_rows_and_heads_that_do_not_divide_are_whole_on_each_device(monkeypatch, kind):
    small_blocks(monkeypatch)
    query, key_value = parts(3, 3, 1, 32, 32, 6)
    mask = jnp.ones((3, 32), bool)
    bias = biases(mask)[kind]
    if kind == "distance":
        bias = bias.replace(by_distance=bias.by_distance[:3])

    check_attention("mixed", query, key_value, bias, normal(3, 32, 18, seed=6))


@pytest.mark.parametrize("kind", ["causal", "distance"])
def test_what_is_dropped_is_the_same_on_every_mesh(monkeypatch, kind):
    small_blocks(monkeypatch)
    query, key_value = parts(2, 4, 2, 32, 32, 6)
    bias = biases(jnp.ones((2, 32), bool))[kind]
    drop = functools.partial(
        Dropout(0.4).apply, {}, deterministic=False, rngs={"dropout": jax.random.key(7)}
    )

    def run():
        one = lambda query, key_value: attend(query, key_value, bias, SCALE, drop)  # noqa: E731
        return jax.jit(one)(query, key_value)

    expected = run()
    with jax.set_mesh(small.mesh_of(**MESHES["mixed"])):
        np.testing.assert_allclose(run(), expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("mesh", [{"sequence": 2}, {"data": 2, "sequence": 2, "tensor": 2}])
def test_the_kernel_takes_its_parts(mesh):
    check_kernel(small.mesh_of(**mesh), groups=2, length=512)


def pair(llm, slm, fusion, stack, dropout):
    """(system, trained, frozen) of two families, random."""
    encoder, frozen = pretrained.abstract_encoder(FAMILIES[llm])
    slm_config = dataclasses.replace(FAMILIES[slm], dropout_rate=dropout)
    system = LlmToSlm(encoder, slm_config, 16, fusion=fusion, shared_vocabulary=True, stack=stack)
    trained = jax.eval_shape(system.init, jax.random.key(0))
    return system, small.random_like(trained), small.random_like(frozen, seed=1)


@pytest.mark.parametrize(
    ("mesh", "llm", "slm", "fusion", "stack", "dropout"),
    [
        ("mixed", "t5", "t5", "add", 0, 0.0),
        ("mixed", "llama", "t5", "add", 0, 0.3),
        ("mixed", "llama", "gpt2", "add", 1, 0.0),
        ("mixed", "gpt_neox", "llama", "replace", 0, 0.0),
        ("fsdp", "gpt2", "t5", "cross", 0, 0.0),
        ("all", "llama", "gpt_neox", "replace", 1, 0.0),
    ],
)
def test_training_and_answers_are_those_of_one_device(
    monkeypatch, mesh, llm, slm, fusion, stack, dropout
):
    small_blocks(monkeypatch, 128, 8, 11)
    system, trained, frozen = pair(llm, slm, fusion, stack, dropout)
    config = small.make_train_config(3, batch_size=4, learning_rate=1e-2, dropout_rate=dropout)
    optimizer = optim.optimizer(config, trained)
    batch = small.make_batch(system, 4, 32, 7)
    found = []
    for sizes in ({}, MESHES[mesh]):
        jax.clear_caches()
        devices = small.mesh_of(**sizes)
        shardings = update.state_shardings(trained, optimizer, config, devices)
        with jax.set_mesh(devices):
            step = update.make_step(system, optimizer, config, 0, shardings)
            state = jax.device_put(update.init_state(trained, optimizer, config), shardings)
            held = sharding.put_parameters(frozen, devices)
            placed = sharding.put_batch(batch, devices)
            losses = []
            for _ in range(3):
                state, metrics = step(state, held, placed)
                losses.append(float(metrics["loss"]))
            served = [
                sharding.put_parameters(part, devices) for part in system.to_serve(trained, frozen)
            ]
            rows = placed["llm_ids"], placed["llm_mask"]
            decoded = jitted_decode(
                system,
                *served,
                *rows,
                jnp.full(4, 6, jnp.int32),
                jnp.zeros(4, jnp.uint32),
                max_new_tokens=6,
                search=GREEDY,
                mismatched=False,
                end_ids=(1,),
            )
        found.append((losses, jax.device_get(decoded.tokens)))
    (expected, texts), (losses, others) = found
    np.testing.assert_allclose(losses, expected, rtol=1e-4)
    assert expected[0] != expected[-1]
    np.testing.assert_array_equal(others, texts)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_device_holds_its_part_of_a_prompt(family):
    """Memory of a program that reads a long prompt falls as devices share it."""
    config, length = dataclasses.replace(FAMILIES[family], feed_forward_width=512), 8192
    if family == "gpt2":
        config = dataclasses.replace(config, max_positions=length)
    encoder, frozen = pretrained.abstract_encoder(config)
    module = make_module(encoder)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((1, length), bool)

    def read(params, ids, mask):
        embedded = module.apply({"params": params}, ids, method="embed")
        return jnp.sum(module.apply({"params": params}, embedded, mask, method="represent"))

    def held(ways):
        with jax.set_mesh(small.mesh_of(sequence=ways)):
            return jax.jit(read).lower(frozen, ids, mask).compile().memory_analysis()

    one, eight = (held(ways).temp_size_in_bytes for ways in (1, 8))
    assert eight < one / 4


def test_lengths_that_do_not_divide_are_refused():
    mesh = small.mesh_of(sequence=4, tensor=2)
    sharding.check_lengths((8, 64), mesh, "config.buckets")
    with pytest.raises(ValueError) as error:
        sharding.check_lengths((8, 36), mesh, "config.buckets")
    assert str(error.value) == (
        "config.buckets: prompts of 36 tokens, which mesh data=1, fsdp=1, sequence=4, tensor=2 "
        "takes in 8 parts; expected a multiple of 8"
    )


def test_a_run_whose_prompts_are_split_is_as_one_whose_are_not(tmp_path):
    config = tiny.write_task(tmp_path / "data")
    common = (
        f"--config={config}",
        "--config.labels.source=llm",
        "--config.slm.train.dropout_rate=0.0",
        "--config.l2s.train.dropout_rate=0.0",
        "--config.llm.train.dropout_rate=0.0",
    )
    losses = []
    for name, mesh in (("whole", {"data": 8}), ("split", {"data": 2, "sequence": 2, "tensor": 2})):
        workdir, cache = tmp_path / name, tmp_path / f"features_{name}"
        flags = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        cached = f"--config.features.cache={cache}"
        assert tiny.run(*common, *flags, cached, f"--workdir={workdir}") == 0
        lines = [
            json.loads(line)
            for system in ("llm", "slm", "l2s")
            for line in (workdir / system / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append([line["val_loss"] for line in lines if "val_loss" in line])
        assert (workdir / "report.json").exists()
    whole, split = losses
    assert len(whole) == 6 and len(set(whole)) == 6
    assert split == pytest.approx(whole, rel=1e-5)
