"""LoRA on every family: what is trained, what stays, and what comes out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small
from flax.traverse_util import flatten_dict

from l2s_jax.cluster import sharding
from l2s_jax.config import default
from l2s_jax.models.families import GPT2Config, GPTNeoXConfig, LlamaConfig
from l2s_jax.models.lora import Lora
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel, LlmToSlm, parameter_count
from l2s_jax.training import loop, update

PATTERN = default().slm.lora.pattern
GEOMETRY = {"vocab_size": small.VOCABULARY, "width": 16, "feed_forward_width": 32, "num_layers": 2}
CAUSAL = {
    "gpt2": GPT2Config(**GEOMETRY, num_heads=2, max_positions=32, dropout_rate=0.0),
    "gpt_neox": GPTNeoXConfig(**GEOMETRY, num_heads=2, rotary=Rotary(4)),
    "llama": LlamaConfig(**GEOMETRY, num_heads=4, num_kv_heads=2, head_width=4, rotary=Rotary(4)),
}
CASES = ("slm", *small.FUSIONS, *CAUSAL, *(f"t5-{family}" for family in CAUSAL))


def make_system(name):
    """ "slm", a fusion of T5 and T5, a family alone, or "t5-" and a family with a vocabulary of its
    own.
    """
    if name in CAUSAL:
        return LanguageModel("slm", CAUSAL[name])
    if name.startswith("t5-"):
        llm = small.make_system("add").llm_config
        slm = CAUSAL[name.removeprefix("t5-")]
        return LlmToSlm(llm, slm, projector_width=20, shared_vocabulary=False)
    return small.make_system(name)


@functools.cache
def case(name, **settings):
    """(lora, its trained tree with random b, its frozen tree, the system's own parameters)."""
    system = make_system(name)
    params, inner = small.make_params(system)
    lora = Lora(system, **{"rank": 3, "alpha": 2.0, "pattern": PATTERN, **settings})
    trained, base = lora.split(params, jax.random.key(1))
    return lora, trained, {"base": base, "inner": inner}, params


def with_random_b(trained):
    return {**trained, "lora": small.random_like(trained["lora"], seed=5)}


@pytest.mark.parametrize("name", CASES)
def test_training_starts_at_the_base(name):
    lora, trained, frozen, params = case(name)
    merged = lora.merge(trained, frozen["base"])
    small.assert_same(merged, jax.tree.map(jnp.asarray, params))
    others = set(params) - {"slm"}
    assert set(trained) == {*others, "lora"}
    assert others == (
        set()
        if isinstance(lora.system, LanguageModel)
        else {"projector", "prompt_map"}
        if name.startswith("t5-")
        else {"projector"}
    )


@pytest.mark.parametrize("name", CASES)
def test_every_attention_and_feed_forward_kernel_is_adapted(name):
    _, trained, frozen, _ = case(name)
    kernels = {
        path.removesuffix("/kernel"): leaf.shape
        for path, leaf in flatten_dict(frozen["base"], sep="/").items()
        if path.endswith("/kernel") and path != "head/kernel"
    }
    shapes = {path: leaf.shape for path, leaf in flatten_dict(trained["lora"], sep="/").items()}
    assert shapes == {
        **{f"{module}/a": (shape[0], 3) for module, shape in kernels.items()},
        **{f"{module}/b": (3, shape[1]) for module, shape in kernels.items()},
    }
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(trained["lora"]))


@pytest.mark.parametrize("name", CASES)
def test_merged_kernels_follow_the_formula_and_all_else_is_the_base(name):
    lora, trained, frozen, params = case(name)
    trained = with_random_b(trained)
    merged = flatten_dict(lora.merge(trained, frozen["base"]), sep="/")
    adapters = flatten_dict(trained["lora"], sep="/")
    changed = set()
    for path, leaf in flatten_dict(params, sep="/").items():
        module = path.removeprefix("slm/").removesuffix("/kernel")
        if path.startswith("slm/") and f"{module}/a" in adapters:
            a, b = (np.float64(adapters[f"{module}/{side}"]) for side in "ab")
            np.testing.assert_allclose(merged[path], leaf + 2 / 3 * a @ b, rtol=1e-5, atol=1e-6)
            changed.add(path)
        else:
            np.testing.assert_array_equal(merged[path], leaf, err_msg=path)
    assert len(changed) == len(adapters) / 2
    assert set(merged) == set(flatten_dict(params, sep="/"))


@pytest.mark.parametrize("name", ["slm", "add", "cross", "llama", "t5-gpt2"])
def test_logits_are_those_of_the_merged_system(name):
    lora, trained, frozen, params = case(name)
    trained = with_random_b(trained)
    batch = small.make_batch(lora)
    logits = jax.jit(small.logits_of(lora))(trained, frozen, batch)
    of_system = jax.jit(small.logits_of(lora.system))
    merged = jax.device_get(lora.merge(trained, frozen["base"]))
    expected = of_system(merged, frozen["inner"], batch)
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * scale)
    before = of_system(params, frozen["inner"], batch)
    assert float(jnp.max(jnp.abs(before - expected))) > 0.01 * scale


@pytest.mark.parametrize("name", ["slm", "add", "t5-llama"])
def test_at_the_start_b_has_a_gradient_and_a_has_none(name):
    lora, trained, frozen, _ = case(name)
    batch = small.make_batch(lora)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(trained, frozen):
        return update.batch_loss(lora, trained, frozen, batch, None, 0.0)[0]

    of_trained, of_frozen = gradients(trained, frozen)
    for path, gradient in flatten_dict(of_trained["lora"], sep="/").items():
        assert bool(np.any(gradient)) == path.endswith("/b"), path
    assert all(np.any(leaf) for leaf in jax.tree.leaves(of_trained.get("projector", {})))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(of_frozen["base"]))


@pytest.mark.parametrize("name", ["llama", "add"])
def test_a_step_makes_no_changed_kernel_and_no_gradient_of_one(name):
    lora, trained, frozen, _ = case(name)
    batch = small.make_batch(lora)

    def as_merged(trained):
        return update.batch_loss(*lora.whole(trained, frozen), batch, None, 0.0)

    def in_parts(trained):
        return update.batch_loss(lora, trained, frozen, batch, None, 0.0)

    def made(loss):
        """Shapes of adapted kernels among what the gradient's program multiplies or adds up."""
        program = jax.jit(jax.grad(loss, has_aux=True)).lower(trained).compile().as_text()
        found = re.findall(r"= f32\[([\d,]+)\]\S* (?:dot|add)\(", program)
        shapes = {tuple(map(int, shape.split(","))) for shape in found}
        modules = flatten_dict(trained["lora"], sep="/")
        return shapes & {
            (leaf.shape[0], modules[f"{path[:-1]}b"].shape[1])
            for path, leaf in modules.items()
            if path.endswith("/a")
        }

    assert made(as_merged)
    assert not made(in_parts)


def fit(directory, name, mesh=(1, 1, 1), **changes):
    """(trained before and after, metrics of a batch before and after)."""
    lora, trained, frozen, _ = case(name)
    pairs = small.random_pairs(8, 5)
    batch = next(small.make_batches(lora, pairs, batch_size=8))
    config = small.make_train_config(
        60, evaluate_every=60, learning_rate=1e-2, parameter_scale=False, select="last"
    )
    config.update(**changes)
    kept = jax.tree.map(np.array, frozen)
    after = loop.fit(
        lora,
        frozen,
        trained,
        config,
        batches=small.make_batches(lora, pairs, batch_size=8),
        validation=[batch],
        directory=str(directory),
        fingerprint="f",
        seed=0,
        mesh=small.mesh_of(*mesh),
    )
    small.assert_same(frozen, kept)
    return trained, after, batch


def mean_loss(system, trained, frozen, batch):
    _, sums = jax.jit(lambda t, f, b: update.batch_loss(system, t, f, b, None, 0.0))(
        trained, frozen, batch
    )
    return float(sums["loss"] / sums["tokens"])


@pytest.mark.parametrize("name", ["llama", "add"])
def test_training_reduces_the_loss_and_leaves_the_base_alone(name, tmp_path):
    lora, _, frozen, params = case(name)
    before, after, batch = fit(tmp_path, name)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, after)), strict=True))
    start, end = (mean_loss(lora, trained, frozen, batch) for trained in (before, after))
    assert end < 0.5 * start

    # The result is an ordinary system, of which only kernels changed.
    merged = lora.merge(after, frozen["base"])
    assert mean_loss(lora.system, merged, frozen["inner"], batch) == pytest.approx(end, rel=1e-4)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for key in ("token_embedding", "final_norm"):
        if key in params["slm"]:
            small.assert_same(merged["slm"][key], jax.tree.map(jnp.asarray, params["slm"][key]))


def test_the_state_holds_only_projector_and_lora(tmp_path):
    _, trained, frozen, _ = case("add")
    fit(tmp_path, "add", steps=2)
    (step,) = (tmp_path / "checkpoints").iterdir()
    items = {path.name for path in step.iterdir() if path.is_dir()} - {"metrics"}
    assert items == {"projector", "lora", "opt", "data", "config"}
    with ocp.StandardCheckpointer() as checkpointer:
        opt = checkpointer.restore(step / "opt")
    # Adam's two moments, and a few counters.
    count = parameter_count(trained)
    assert 2 * count <= parameter_count(opt) < 2 * count + 10
    assert parameter_count(trained["lora"]) < parameter_count(frozen["base"])


def test_patterns_of_training_reach_the_adapters(tmp_path):
    before, after, _ = fit(tmp_path, "add", steps=2, trainable=("lora/decoder/.*",))
    small.assert_same(after["projector"], before["projector"])
    small.assert_same(after["lora"]["encoder"], jax.device_get(before["lora"]["encoder"]))
    assert small.differ(after["lora"]["decoder"], before["lora"]["decoder"])


def test_a_mesh_gives_the_same(tmp_path):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    _, expected, _ = fit(tmp_path / "one", "add", steps=3)
    # The rank is split by nothing, so that it need not be a multiple of anything.
    _, after, _ = fit(tmp_path / "eight", "add", steps=3, mesh=(2, 2, 2))
    small.assert_same(after, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", CASES)
def test_sharding_rules_cover_both_trees(name):
    _, trained, frozen, _ = case(name)
    mesh = small.mesh_of()
    sharding.parameter_shardings(frozen, mesh)
    shardings = sharding.parameter_shardings(trained, mesh)
    for path, own in flatten_dict(shardings["lora"], sep="/").items():
        of_rank, of_other = own.spec if path.endswith("/b") else own.spec[::-1]
        assert of_rank is None and of_other is not None


def test_a_pattern_chooses_kernels_only():
    _, trained, _, _ = case("slm", pattern="decoder/layers_0/(attention|head)?.*|head/.*")
    modules = {path.rsplit("/", 1)[0] for path in flatten_dict(trained["lora"], sep="/")}
    names = ("attention/query", "attention/key", "attention/value", "attention/output")
    cross = tuple(f"cross_{name}" for name in names)
    ffn = ("feed_forward/wi", "feed_forward/wo")
    assert modules == {f"decoder/layers_0/{name}" for name in (*names, *cross, *ffn)} | {"head"}


def test_an_llm_alone_keeps_its_name():
    system = small.make_system("llm")
    params, _ = small.make_params(system)
    lora = Lora(system, 2, 16.0, PATTERN)
    trained, base = lora.split(params, jax.random.key(0))
    assert set(trained) == {"lora"}
    assert (lora.name, lora.prompt_name, lora.decoder) == ("llm", "llm", system.config)
    assert set(lora.merge(trained, base)) == {"llm"}


def test_a_has_its_own_random_numbers_in_each_kernel():
    lora, trained, frozen, _ = case("slm", rank=16)
    a = [leaf for path, leaf in flatten_dict(trained["lora"]).items() if path[-1] == "a"]
    assert len({np.asarray(leaf).tobytes() for leaf in a}) == len(a)
    for leaf in a:
        assert float(jnp.std(leaf)) == pytest.approx(leaf.shape[0] ** -0.5, rel=0.25)
    again = lora.init(jax.random.key(1), frozen["base"])
    small.assert_same(again, trained["lora"])
    assert small.differ(lora.init(jax.random.key(2), frozen["base"]), again)


def test_the_base_may_be_abstract():
    lora, trained, frozen, _ = case("gpt2")
    abstract = jax.eval_shape(lora.init, jax.random.key(0), frozen["base"])
    assert jax.tree.map(jnp.shape, abstract) == jax.tree.map(jnp.shape, trained["lora"])
    shapes = jax.eval_shape(lora.merge, trained, frozen["base"])
    assert jax.tree.map(jnp.shape, shapes["slm"]) == jax.tree.map(jnp.shape, frozen["base"])


@pytest.mark.parametrize("pattern", ["decoder/.*/atention/.*", ".*/scale", "token_embedding/.*"])
def test_a_pattern_that_matches_no_kernel_is_refused(pattern):
    with pytest.raises(ValueError, match=r"lora.pattern: .* matches none of .* kernels") as error:
        case("slm", pattern=pattern)
    assert "/kernel" in str(error.value) and "\n" not in str(error.value)


def test_systems_can_be_static_arguments():
    def lora(rank):
        return Lora(small.make_system("add"), rank, 16.0, PATTERN)

    assert lora(2) == lora(2) and hash(lora(2)) == hash(lora(2))
    assert lora(2) != lora(3)
