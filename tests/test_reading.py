"""Parameters that are read straight to where a mesh wants them."""

from __future__ import annotations

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from l2s_jax.checkpoints import files, reading
from l2s_jax.checkpoints.pretrained import load, load_encoder, load_native, save_native
from l2s_jax.cluster import paths, sharding
from l2s_jax.models import serving
from l2s_jax.models.products import Transposed
from l2s_jax.models.serving import lay_out_all, to_serve
from l2s_jax.models.stacking import stack_layers
from l2s_jax.models.systems import parameter_count

DEVICES = 8
MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "tensor": {"tensor": 8},
    "mixed": {"data": 2, "fsdp": 2, "tensor": 2},
}
FAMILIES = ("t5", "gpt2", "gpt_neox", "llama")


@pytest.fixture(autouse=True)
def eight_devices():
    if jax.device_count() != DEVICES:
        pytest.skip(f"needs {DEVICES} devices")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A directory of each family; not to be written to."""
    root = tmp_path_factory.mktemp("families")
    hf.make_t5(str(root / "t5"), num_heads=4, feed_forward_proj="gated-gelu", own_head=True,
               tie_word_embeddings=False)  # fmt: skip
    for model_type in FAMILIES[1:]:
        hf.make_causal(str(root / model_type), model_type=model_type)
    return root


def named(tree):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield paths.path_name(path), leaf


def count_bytes(monkeypatch):
    """A list that grows by the size of everything that is read of a file."""
    read, whole = [], files.TensorFiles.read

    def counted(self, key, index):
        part = whole(self, key, index)
        read.append(part.nbytes)
        return part

    monkeypatch.setattr(files.TensorFiles, "read", counted)
    return read


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_device_gets_its_part(checkpoints, family, mesh, monkeypatch):
    _, whole = load(str(checkpoints / family))
    read = count_bytes(monkeypatch)
    _, params = load(str(checkpoints / family), mesh=small.mesh_of(**MESHES[mesh]))
    shardings = sharding.parameter_shardings(whole, small.mesh_of(**MESHES[mesh]))
    assert jax.tree.structure(params) == jax.tree.structure(whole)
    for (name, leaf), expected, where in zip(
        named(params), jax.tree.leaves(whole), jax.tree.leaves(shardings), strict=True
    ):
        assert leaf.sharding == where, name
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype), name
        assert len(leaf.addressable_shards) == DEVICES
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, expected[shard.index], err_msg=name)
    # What several devices hold is read once.
    assert sum(read) == sum(leaf.nbytes for leaf in jax.tree.leaves(whole))


@pytest.mark.parametrize("family", ["t5", "gpt_neox"])
def test_an_encoder_is_read_as_it_is_held(tmp_path, family):
    directory = str(tmp_path)
    if family == "t5":
        hf.make_t5(directory, num_heads=4, dtype=torch.bfloat16)
    else:
        hf.make_causal(directory, model_type=family)
    module, whole = load_encoder(directory, dtype=jnp.bfloat16)
    expected = to_serve(whole, module.config, "float", encodes=True)
    for mesh in (None, small.mesh_of(fsdp=4, tensor=2)):
        same, params = load_encoder(directory, dtype=jnp.bfloat16, weights="float", mesh=mesh)
        assert same.config == module.config
        small.assert_same(params, expected)
        for name, leaf in named(params):
            kernel = name.endswith("/kernel")
            assert leaf.dtype == (jnp.bfloat16 if kernel else jnp.float32), name
            assert isinstance(leaf, np.ndarray if mesh is None else jax.Array)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_one_cpu_device_holds_large_kernels_transposed(
    checkpoints, family, scan_layers, monkeypatch
):
    directory, mesh = str(checkpoints / family), sharding.one_device()
    settings = {"weights": "float", "scan_layers": scan_layers}
    _, expected = load(directory, **settings)
    _, small_ones = load(directory, mesh=mesh, **settings)
    monkeypatch.setattr(serving, "LEAST_TRANSPOSED", 1)
    _, found = load(directory, mesh=mesh, **settings)
    kernels = 0
    for name, leaf in flatten_dict(found, sep="/").items():
        plain = flatten_dict(expected, sep="/")[name]
        assert (leaf.shape, leaf.dtype, leaf.ndim) == (plain.shape, plain.dtype, plain.ndim)
        if name.endswith("/kernel"):
            leaf, kernels = leaf.held.swapaxes(-1, -2), kernels + 1
        np.testing.assert_array_equal(leaf, plain)
    assert kernels
    # A Generator lays out what it is given, and takes as it is what lies right.
    small.assert_same(lay_out_all(sharding.put_parameters(expected, mesh), mesh), found)
    held = lay_out_all(found, mesh)
    assert jax.tree.leaves(held)[0] is jax.tree.leaves(found)[0]
    assert sharding.put_parameters(found, mesh)
    # The products of bfloat16 and of several devices want them as they are.
    low = load(directory, dtype=jnp.bfloat16, mesh=mesh, **settings)[1]
    split = load(directory, mesh=small.mesh_of(fsdp=4, tensor=2), **settings)[1]
    for other in (low, split, small_ones, expected):
        assert not any(isinstance(leaf, Transposed) for leaf in flatten_dict(other).values())


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("family", ["t5", "gpt2", "llama"])
def test_int8_is_made_of_one_parameter_at_a_time_where_it_lies(checkpoints, family, scan_layers):
    directory, mesh = str(checkpoints / family), small.mesh_of(fsdp=4, tensor=2)
    module, whole = load(directory, scan_layers=scan_layers)
    expected = to_serve(whole, module.config, "int8")
    settings = {"weights": "int8", "scan_layers": scan_layers}
    _, on_host = load(directory, **settings)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(on_host))
    small.assert_same(on_host, expected)
    _, placed = load(directory, mesh=mesh, **settings)
    small.assert_same(placed, expected)
    found = jax.tree.map(lambda leaf: leaf.sharding, placed)
    assert found == sharding.parameter_shardings(placed, mesh)
    with pytest.raises(ValueError, match="weights='int4': expected one of float, int8"):
        load("nowhere", weights="int4")
    # Generation takes them as they are.
    assert jax.tree.leaves(to_serve(placed, module.config, "int8"))[0] is jax.tree.leaves(placed)[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_many_small_blocks_make_the_same(checkpoints, family, monkeypatch):
    expected = load(str(checkpoints / family))[1]
    monkeypatch.setattr(reading, "_BLOCK_BYTES", 4 * 5 * 24)
    monkeypatch.setattr(reading, "_STRIP", 5)
    monkeypatch.setattr(files, "_MAPPED_BYTES", 300)
    for mesh in (None, small.mesh_of(2, 2, 2)):
        read = count_bytes(monkeypatch)
        small.assert_same(load(str(checkpoints / family), mesh=mesh)[1], expected)
        assert len(read) > 2 * len(jax.tree.leaves(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_stacked_layers_are_filled_one_by_one(checkpoints, family, monkeypatch):
    _, whole = load_encoder(str(checkpoints / family), dtype=jnp.bfloat16, weights="float")
    expected = stack_layers(whole)
    for mesh in (None, small.mesh_of(2, 2, 2)):
        read = count_bytes(monkeypatch)
        options = {"dtype": jnp.bfloat16, "weights": "float", "mesh": mesh, "scan_layers": True}
        module, params = load_encoder(str(checkpoints / family), **options)
        assert module.config.scan_layers
        small.assert_same(params, expected)
        assert sum(read) == 4 * parameter_count(whole)
        if mesh:
            where = sharding.parameter_shardings(expected, mesh)
            assert jax.tree.map(lambda leaf: leaf.sharding, params) == where


def test_our_own_format_is_read_alike(checkpoints, tmp_path):
    module, expected = load(str(checkpoints / "gpt2"))
    save_native(module.config, expected, str(tmp_path / "ours"))
    assert isinstance(load_native(str(tmp_path / "ours"))[1]["final_norm"]["bias"], np.ndarray)
    mesh = small.mesh_of(fsdp=8)
    small.assert_same(load(str(tmp_path / "ours"), mesh=mesh)[1], expected)


def test_a_cpu_device_takes_an_array_as_it_was_read(checkpoints, monkeypatch):
    made, aligned = [], reading._aligned
    monkeypatch.setattr(reading, "_aligned", lambda *args: made.append(aligned(*args)) or made[-1])
    _, params = load(str(checkpoints / "llama"), mesh=small.mesh_of())
    held = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert held == {array.ctypes.data for array in made}


def test_what_lies_right_stays(checkpoints):
    mesh = small.mesh_of(fsdp=8)
    _, params = load(str(checkpoints / "llama"), mesh=mesh)
    same = sharding.put(params, sharding.parameter_shardings(params, mesh))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (params, same)), strict=True))
    other = small.mesh_of(tensor=8)
    moved = sharding.put(params, sharding.parameter_shardings(params, other))
    small.assert_same(moved, params)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(moved)} == {other}


def refused(directory, mesh, fragment, monkeypatch):
    """One line, before anything is read."""
    read = count_bytes(monkeypatch)
    with pytest.raises(ValueError) as error:
        load(str(directory), mesh=mesh)
    assert fragment in str(error.value) and "\n" not in str(error.value)
    assert not read


def test_what_does_not_divide_is_refused(tmp_path, monkeypatch):
    hf.make_causal(str(tmp_path), model_type="llama", intermediate_size=42)
    fragment = "mesh data=1, fsdp=2, tensor=4: layers_0/feed_forward/wi/kernel [24, 42] does not "
    fragment += "divide into tensor=4; expected a divisor of 42"
    refused(tmp_path, small.mesh_of(fsdp=2, tensor=4), fragment, monkeypatch)


def test_files_that_do_not_fit_are_refused(checkpoints, tmp_path, monkeypatch):
    mesh = small.mesh_of(fsdp=8)
    hf.make_t5(str(tmp_path), num_heads=4)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "other": np.zeros(1)}, path)
    refused(tmp_path, mesh, "(+): + other", monkeypatch)
    key = "decoder.embed_tokens.weight"
    # The last row and column, which the last device alone holds.
    other = tensors["shared.weight"].copy()
    other[-1, -1] += 1
    save_file({**tensors, key: other}, path)
    with pytest.raises(ValueError, match=f"{key} differs from shared.weight"):
        load(str(tmp_path), mesh=mesh)
