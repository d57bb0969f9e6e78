"""Sharding rules, meshes, and a train step that gives the same on any of them."""

import functools
import re
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
import small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from l2s_jax.cluster.paths import path_name
from l2s_jax.cluster.sharding import (
    RULES,
    batch_sharding,
    decoding_mesh,
    free,
    make_mesh,
    parameter_shardings,
    put_batch,
)
from l2s_jax.experiment.training import TrainedStage
from l2s_jax.models.families import make_module
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.layers import Embedding
from l2s_jax.models.systems import LanguageModel, parameter_count
from l2s_jax.plan import hlo
from l2s_jax.plan.hlo import collectives
from l2s_jax.training import optim, update

DEVICES = 8


@pytest.fixture(autouse=True)
def eight_devices():
    if jax.device_count() != DEVICES:
        pytest.skip(f"needs {DEVICES} devices")


def abstract(system):
    return jax.eval_shape(system.init, jax.random.key(0))


@pytest.mark.parametrize("name", small.SYSTEMS)
@pytest.mark.parametrize(
    "variant",
    [{"tied_head": True}, {"tied_head": False, "activation": "gated_gelu"}],
    ids=["v1.0", "v1.1"],
)
def test_every_parameter_matches_exactly_one_rule(name, variant):
    system = small.make_system(name, num_encoder_layers=2, num_decoder_layers=3, **variant)
    params = abstract(system)
    shardings = parameter_shardings(params, small.mesh_of(2, 2, 2))
    named = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(named, jax.tree.leaves(shardings), strict=True):
        rules = [spec for pattern, spec in RULES if re.fullmatch(pattern, path_name(path))]
        assert rules == [sharding.spec], path_name(path)
        assert len(sharding.spec) in (0, leaf.ndim), path_name(path)
        # Whatever is large is split; only norms and the relative bias lie everywhere.
        small_leaf = path_name(path).endswith(("/scale", "relative_bias/embedding"))
        assert (sharding.spec == P()) == small_leaf


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_frozen_parameters_match_too(fusion):
    _, frozen = small.make_params(small.make_system(fusion))
    parameter_shardings(frozen, small.mesh_of(2, 2, 2))


def test_parameters_that_no_rule_matches_are_listed():
    params = {
        "slm": {"adapter": {"kernel": np.zeros((2, 2))}, "norm": {"scale": np.zeros(2)}},
        "bias": np.zeros(2),
    }
    with pytest.raises(ValueError) as error:
        parameter_shardings(params, small.mesh_of())
    assert str(error.value).endswith("rule: bias (0 rules), slm/adapter/kernel (0 rules)")


def test_parameters_that_two_rules_match_are_listed(monkeypatch):
    monkeypatch.setattr("l2s_jax.cluster.sharding.RULES", (*RULES, (r".*norm/scale", P("fsdp"))))
    with pytest.raises(ValueError, match=r"rule: norm/scale \(2 rules\)$"):
        parameter_shardings({"norm": {"scale": 0}, "x": {"scale": 0}}, small.mesh_of())


def mesh_config(data, fsdp, tensor):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((8, 1, 1), (8, 1, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((4, 2, -1), (4, 2, 1)),
    ],
)
def test_mesh_sizes(asked, sizes):
    mesh = make_mesh(mesh_config(*asked))
    assert dict(mesh.shape) == {"sequence": 1, **mesh_config(*sizes)}
    assert set(mesh.devices.flat) == set(jax.devices())


@pytest.mark.parametrize(
    "asked",
    [
        (3, 1, 1),
        (-1, 3, 1),
        (-1, -1, 1),
        (16, 1, 1),
        (1, 1, 1),
        (0, 1, 1),
        (-1, 0, 1),
        (-8, -1, 1),
        (-2, -4, 1),
    ],
)
def test_impossible_meshes_are_refused(asked):
    message = "mesh data={}, fsdp={}, tensor={}: the product".format(*asked)
    with pytest.raises(ValueError, match=f"{message} must be the number of devices, 8"):
        make_mesh(mesh_config(*asked))


@pytest.mark.parametrize(
    ("asked", "works"), [((3, 1, 2), (4, 1, 2)), ((1, 3, 1), (8, 1, 1)), ((-1, -1, 4), (2, 1, 4))]
)
def test_an_impossible_mesh_is_told_of_one_that_works(asked, works):
    with pytest.raises(ValueError, match="as in data={}, fsdp={}, tensor={}$".format(*works)):
        make_mesh(mesh_config(*asked))
    make_mesh(mesh_config(*works))


def test_an_axis_that_there_is_not_is_named():
    with pytest.raises(
        ValueError, match="no axis 'model', expected some of data, fsdp, sequence, tensor"
    ):
        make_mesh({"model": 8})


def test_a_vocabulary_that_does_not_divide_is_not_split_and_other_axes_must():
    def kernel(*shape):
        return {"kernel": np.zeros(shape)}

    table = {"embedding": np.zeros((50257, 8))}
    params = {"token_embedding": table, "head": kernel(8, 50257), "x": {"query": kernel(8, 8)}}
    found = parameter_shardings(params, small.mesh_of(2, 2, 2))
    assert found["token_embedding"]["embedding"].spec == P(None, "fsdp")
    assert found["head"]["kernel"].spec == P("fsdp", None)
    assert found["x"]["query"]["kernel"].spec == P("fsdp", "tensor")
    message = r"tensor=2: x/query/kernel \[8, 9\] does not divide into tensor=2; expected a divisor"
    with pytest.raises(ValueError, match=message):
        parameter_shardings({"x": {"query": kernel(8, 9)}}, small.mesh_of(2, 2, 2))


def test_a_process_with_whole_copies_decodes_with_its_own_devices():
    mesh = small.mesh_of(2, 2, 2)
    assert decoding_mesh(mesh) is mesh  # of one process, all are its own


STEPS = 3
CONFIG = small.make_train_config(STEPS, learning_rate=1e-2, ema_decay=0.5, accumulation=2)


@functools.cache
def trained_on(name, sizes):
    """(mesh, state, losses) after STEPS steps of training, as loop.fit jits them."""
    system = small.make_system(name, tied_head=True)
    params, frozen = small.make_params(system)
    mesh = small.mesh_of(*sizes)
    optimizer = optim.optimizer(CONFIG, params)
    shardings = update.state_shardings(params, optimizer, CONFIG, mesh)
    step = jax.jit(
        functools.partial(
            update.train_step, system=system, optimizer=optimizer, config=CONFIG, seed=0
        ),
        out_shardings=(shardings, None),
    )
    losses = []
    with jax.set_mesh(mesh):
        frozen = jax.device_put(frozen, parameter_shardings(frozen, mesh))
        state = jax.device_put(update.init_state(params, optimizer, CONFIG), shardings)
        for seed in range(STEPS):
            batch = put_batch(small.make_batch(system, rows=16, seed=seed), mesh)
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
    return mesh, state, losses


def test_accumulation_and_averaging_are_the_same_on_a_mesh():
    _, expected, expected_losses = trained_on("cross", (1, 1, 1))
    _, state, losses = trained_on("cross", (2, 2, 2))
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    assert len(set(np.round(losses, 3))) == STEPS
    small.assert_same(state.params, expected.params, rtol=1e-3, atol=2e-4)
    small.assert_same(state.average, expected.average, rtol=1e-3, atol=2e-4)


def test_the_new_state_lies_where_the_rules_say():
    mesh, state, _ = trained_on("cross", (2, 2, 2))
    moments = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, dict))
    moments = [tree for tree in moments if isinstance(tree, dict)]
    assert len(moments) == 2
    for tree in (state.params, state.average, *moments):
        asked = parameter_shardings(state.params, mesh)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(asked), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            split = [mesh.shape[axis] for axis in sharding.spec if axis]
            assert leaf.addressable_shards[0].data.size == leaf.size // int(np.prod(split))


@pytest.mark.parametrize("family", ["T5", "GPT-2"])
def test_parameters_are_gathered_and_activations_stay_where_their_rows_are(family):
    if family == "T5":
        config = small.t5_config(num_encoder_layers=3)
    else:
        config = GPT2Config(
            vocab_size=small.VOCABULARY, width=16, num_heads=2, feed_forward_width=32, num_layers=3
        )
    system = LanguageModel("llm", config)
    mesh = small.mesh_of(fsdp=DEVICES)
    params = jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        abstract(system),
        parameter_shardings(abstract(system), mesh),
    )
    rows, length = 64, 32
    ids = jax.ShapeDtypeStruct((rows, length), np.int32, sharding=batch_sharding(mesh))
    mask = jax.ShapeDtypeStruct((rows, length), bool, sharding=batch_sharding(mesh))
    name = "encode" if family == "T5" else "hidden_states"
    module = make_module(config)

    def run(params, ids, mask):
        embedded = module.apply({"params": params["llm"]}, ids, method="embed")
        return module.apply({"params": params["llm"]}, embedded, mask, method=name)

    with jax.set_mesh(mesh):
        compiled = jax.jit(run).lower(params, ids, mask).compile()
    assert compiled.output_shardings.is_equivalent_to(batch_sharding(mesh), 3)
    moved = collectives(compiled.as_text())
    weights = 4 * parameter_count(params)
    activations = 4 * rows * length * config.width
    gathered = [one for one in moved if one.kind == "all-gather"]
    assert 0 < sum(one.bytes * one.times for one in gathered) <= weights < activations
    # Layer by layer, not all at once.
    assert max(one.bytes for one in gathered) < weights / 4
    # Embedded rows, of which a split table gives each device some columns, may go to their device.
    others = [one for one in moved if one.kind != "all-gather"]
    assert {one.kind for one in others} <= {"all-to-all"}
    tables = 1 if family == "T5" else 2
    assert sum(one.bytes * one.times for one in others) <= tables * activations / DEVICES


@pytest.mark.parametrize(
    "sizes", [(1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 4, 2), (4, 1, 2)], ids=lambda sizes: str(sizes)
)
def test_a_table_is_looked_up_where_it_lies(sizes):
    # As many rows as this, and the compiler would rather bring the whole vocabulary to each device.
    vocabulary, width, rows, length = 248, 16, 64, 12
    table = Embedding(vocabulary, width, jax.nn.initializers.normal())
    mesh = small.mesh_of(*sizes)
    params = {"token_embedding": {"embedding": np.zeros((vocabulary, width), np.float32)}}
    where = parameter_shardings(params, mesh)["token_embedding"]

    @functools.partial(jax.jit, out_shardings=(None, where))
    def run(params, ids, cotangent):
        out, pull = jax.vjp(lambda params: table.apply({"params": params}, ids), params)
        return out, pull(cotangent)[0]

    at = batch_sharding(mesh)
    shapes = (
        jax.ShapeDtypeStruct((vocabulary, width), np.float32, sharding=where["embedding"]),
        jax.ShapeDtypeStruct((rows, length), np.int32, sharding=at),
        jax.ShapeDtypeStruct((rows, length, width), np.float32, sharding=at),
    )
    with jax.set_mesh(mesh):
        compiled = run.lower({"embedding": shapes[0]}, *shapes[1:]).compile()
    assert compiled.output_shardings[0].is_equivalent_to(at, 3)
    kinds = "|".join(hlo.KINDS)
    moved = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", compiled.as_text())
    assert moved
    parts = {vocabulary // ways for ways in (1, 2, 4, 8)}
    for shape, kind in moved:
        of_table = parts & set(map(int, re.findall(r"(?<=[\[,])\d+", shape)))
        # Of the table, only gradients move, to be added up.
        assert not of_table or kind == "all-reduce", (kind, shape)


def test_a_batch_is_split_over_data_and_fsdp():
    mesh = small.mesh_of(2, 2, 2)
    rows = np.arange(24, dtype=np.int32).reshape(8, 3)
    array = put_batch({"ids": rows}, mesh)["ids"]
    assert array.sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"))), 2)
    np.testing.assert_array_equal(array, rows)
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize("name", ["slm", "add", "cross"])
def test_each_device_makes_its_own_part_of_random_parameters(name):
    system, mesh = small.make_system(name), small.mesh_of(fsdp=4, tensor=2)
    stage: Any = SimpleNamespace(context=SimpleNamespace(mesh=mesh), seed=3)
    found = TrainedStage.random(stage, system, without=["projector"])
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == parameter_shardings(found, mesh)
    expected = dict(jax.device_get(jax.jit(system.init)(jax.random.key(3))))
    expected.pop("projector", None)
    small.assert_same(found, expected)


def test_what_lies_as_it_should_is_freed_and_nothing_else():
    mesh, ones = small.mesh_of(fsdp=4, tensor=2), np.ones((8, 8), np.float32)
    where = NamedSharding(mesh, P("fsdp"))
    tree = {
        "right": jax.device_put(ones, where),
        "elsewhere": jax.device_put(ones, NamedSharding(mesh, P("tensor"))),
        "host": ones,
    }
    free(tree, dict.fromkeys(tree, where))
    assert tree["right"].is_deleted() and not tree["elsewhere"].is_deleted()
