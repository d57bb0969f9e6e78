"""LLM-to-SLM: the fusions, what is trained, and the mistakes that it must not make."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from l2s_jax.config import default
from l2s_jax.data.batches import evaluation_batches
from l2s_jax.experiment import experiment
from l2s_jax.models.l2s import L2S
from l2s_jax.models.t5 import T5
from l2s_jax.tokenizers.sentencepiece import train_sentencepiece
from l2s_jax.training import loop

ENCODING = ("add", "replace")  # the fusions with an SLM encoder
TOKENS = 7
PIECES = 9  # of a tokenizer


@functools.cache
def case(fusion):
    system = small.make_system(fusion)
    return system, *small.make_params(system), small.make_batch(system, prompt_tokens=TOKENS)


@functools.cache
def compiled(fusion):
    """(H, what the SLM's decoder attends to, logits) from (trained, frozen, batch)."""
    system = case(fusion)[0]

    @jax.jit
    def run(trained, frozen, batch):
        ids, mask = batch["llm_ids"], batch["llm_mask"]
        hidden = system.encode(trained, frozen, ids, mask)
        encoded = from_hidden(system, trained, ids, mask, hidden)[0]
        return hidden, encoded, system.scored(trained, frozen, batch).logits()

    return run


def from_hidden(system, trained, ids, mask, hidden, decoder_ids=None):
    """(what the SLM's decoder attends to, its logits) from a given H."""
    module = L2S(system.slm_config, system.projector_width, system.fusion)
    variables = {"params": trained}
    encoded = module.apply(variables, ids, mask, hidden, method="encode")
    if decoder_ids is None:
        return encoded, None
    return encoded, module.apply(variables, ids, mask, hidden, decoder_ids)


def influence_of_hidden(fusion, batch, hidden):
    """How much each position of H changes the logits, [S, B, T], the rows of a batch summed."""
    system, trained, *_ = case(fusion)

    @jax.jit
    @jax.jacrev
    def influence(hidden):
        inputs = batch["llm_ids"], batch["llm_mask"], hidden, batch["response_ids"]
        return jnp.sum(from_hidden(system, trained, *inputs)[1] ** 2, axis=(0, 2))

    return np.abs(influence(hidden)).max(-1)


def with_embedding(trained, change):
    embedding = change(trained["slm"]["token_embedding"]["embedding"])
    return {**trained, "slm": {**trained["slm"], "token_embedding": {"embedding": embedding}}}


def fused_by_hand(trained, ids, hidden, fusion):
    """The input of the SLM's encoder, or of its cross-attention, in NumPy."""
    kernels = [trained["projector"][name]["kernel"] for name in ("inward", "outward")]
    projected = np.maximum(hidden @ kernels[0], 0) @ kernels[1]
    if fusion == "add":
        projected = projected + trained["slm"]["token_embedding"]["embedding"][ids]
    return projected


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_the_decoder_attends_to_the_fused_prompt(fusion):
    system, trained, frozen, batch = case(fusion)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    hidden, encoded, logits = map(np.asarray, compiled(fusion)(trained, frozen, batch))
    fused = fused_by_hand(trained, ids, hidden, fusion)

    decoder_ids = np.pad(batch["response_ids"], ((0, 0), (1, 0)))[:, :-1]

    @jax.jit
    def expected(frozen, slm_params, fused):
        llm, slm = T5(system.llm_config), T5(system.slm_config)
        embedded = frozen["token_embedding"]["embedding"][ids]
        of_llm = llm.apply({"params": frozen}, embedded, mask, method="encode")
        variables = {"params": slm_params}
        if fusion != "cross":
            fused = slm.apply(variables, fused, mask, method="encode")
        return of_llm, fused, slm.apply(variables, decoder_ids, fused, mask, method="decode")

    of_llm, attended, of_slm = expected(frozen, trained["slm"], fused)
    np.testing.assert_allclose(hidden, of_llm, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoded[mask], attended[mask], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(logits, of_slm, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_only_cross_has_no_slm_encoder(fusion):
    trained = case(fusion)[1]
    assert set(trained) == {"projector", "slm"}
    assert ("encoder" in trained["slm"]) == (fusion in ENCODING)
    assert set(trained["slm"]) >= {"token_embedding", "decoder", "head"}


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_only_add_uses_the_slm_embedding_of_the_prompt(fusion):
    _, trained, frozen, batch = case(fusion)
    run = compiled(fusion)
    changed = with_embedding(trained, lambda embedding: embedding + 1.0)
    before, after = (run(params, frozen, batch) for params in (trained, changed))
    np.testing.assert_array_equal(before[0], after[0])
    assert np.array_equal(before[1], after[1]) == (fusion != "add")
    assert not np.array_equal(before[2], after[2])  # the response side reads it in any case


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_the_llm_is_not_trained(fusion, tmp_path):
    system, trained, frozen, _ = case(fusion)
    pairs = small.random_pairs(16, 6)
    kept = jax.tree.map(np.copy, frozen)
    result = loop.fit(
        system,
        frozen,
        trained,
        small.make_train_config(2, evaluate_every=2, ema_decay=0.9),
        batches=small.make_batches(system, pairs, batch_size=8),
        validation=[small.make_batch(system, rows=8)],
        directory=str(tmp_path),
        fingerprint="",
        seed=0,
        mesh=small.mesh_of(),
    )
    small.assert_same(frozen, kept)
    assert jax.tree.structure(result) == jax.tree.structure(trained)
    # Everything that is trained has a gradient; in "replace" too, the embedding by the response.
    still = [
        jax.tree_util.keystr(path)
        for (path, new), old in zip(
            jax.tree_util.tree_leaves_with_path(result), jax.tree.leaves(trained), strict=True
        )
        if np.array_equal(new, old)
    ]
    assert still == []
    assert set(frozen) == {"token_embedding", "encoder"}


def test_the_llm_encodes_without_dropout():
    system, trained, frozen, batch = case("cross")
    noisy_llm = dataclasses.replace(
        system, llm_config=dataclasses.replace(system.llm_config, dropout_rate=0.5)
    )
    logits = [
        jax.jit(small.logits_of(one))(trained, frozen, batch, jax.random.key(0))
        for one in (system, noisy_llm)
    ]
    np.testing.assert_array_equal(*logits)


def test_an_unknown_fusion_is_refused():
    system = small.make_system("concat")
    with pytest.raises(ValueError, match="fusion 'concat': expected one of"):
        jax.eval_shape(system.init, jax.random.key(0))


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_mistake_encoding_the_prompt_without_its_attention_mask(fusion):
    _, trained, frozen, batch = case(fusion)
    run, mask = compiled(fusion), batch["llm_mask"]
    assert not mask.all()
    hidden, encoded, logits = run(trained, frozen, batch)
    garbage = {**batch, "llm_ids": np.where(mask, batch["llm_ids"], 17).astype(np.int32)}
    other_hidden, other_encoded, other_logits = run(trained, frozen, garbage)
    np.testing.assert_allclose(hidden[mask], other_hidden[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoded[mask], other_encoded[mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits, other_logits, rtol=1e-5, atol=1e-5)

    row = int(np.argmin(mask.sum(1)))
    length = int(mask[row].sum())
    alone = {
        k: v[row : row + 1, :length] if "llm" in k else v[row : row + 1] for k, v in batch.items()
    }
    own_hidden, _, own_logits = run(trained, frozen, alone)
    np.testing.assert_allclose(hidden[row, :length], own_hidden[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits[row], own_logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_mistake_padding_llm_ids_to_a_length_that_depends_on_the_response(fusion):
    system, trained, frozen, _ = case(fusion)
    prompts = ["5 6", "7", "8 9 10", "11 12 13 14 15", "16 17", "18 19 20 21 22 23"]

    def prefilled(responses):
        data = small.make_data(list(zip(prompts, responses, strict=True)), (16, 16))
        batches = evaluation_batches(
            data, prompt_name="llm", buckets=((4, 4), (8, 8), (16, 16)), batch_size=4
        )
        for indices, batch in batches:
            ids, mask = batch["llm_ids"], batch["llm_mask"]
            hidden = jax.jit(system.encode)(trained, frozen, ids, mask)
            prefill = jax.jit(system.prefill, static_argnums=5)
            yield indices, ids, mask, hidden, prefill(trained, frozen, ids, mask, hidden, 3)

    short = list(prefilled(["5"] * 6))
    long = list(prefilled([" ".join("5" * 15), "5", "6 7", " ".join("7" * 9), "8", "9"]))
    assert [ids.shape for _, ids, *_ in short] == [(4, 4), (4, 8)]
    for one, other in zip(short, long, strict=True):
        small.assert_same(one, other)


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_mistake_adding_z_of_pad_positions_to_response_positions(fusion):
    system, trained, frozen, batch = case(fusion)
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    hidden = np.asarray(compiled(fusion)(trained, frozen, batch)[0])

    # A response position reads every real position of Z, and no other.
    of_positions = influence_of_hidden(fusion, batch, hidden)
    assert (of_positions[:, ~mask] == 0).all()
    assert (of_positions[:, mask] > 0).all()
    if fusion == "cross":
        encoded = from_hidden(system, trained, ids, mask, hidden)[0]
        assert (np.asarray(encoded)[~mask] == 0).all()


def test_mistake_adding_llm_token_i_to_another_tokenizers_token_i(tmp_path):
    # E_X is of the same tokens as Z: there is no other sequence of prompt tokens to take.
    system, trained, frozen, batch = case("add")
    run = compiled("add")
    mixed = {
        **batch,
        "slm_prompt_ids": np.roll(batch["llm_ids"], 1, axis=1),
        "slm_prompt_mask": np.roll(batch["llm_mask"], 1, axis=1),
    }
    logits = run(trained, frozen, batch)[2]
    np.testing.assert_array_equal(logits, jax.jit(small.logits_of(system))(trained, frozen, mixed))
    data = small.make_data(small.random_pairs(4, 5), (8, 8))
    _, made = evaluation_batches(data, prompt_name="llm", buckets=((8, 8),), batch_size=4)[0]
    assert set(made) == {"llm_ids", "llm_mask", "response_ids", "response_mask"}

    # Nor do two tokenizers with equally many pieces pass for one.
    config = make_experiment(tmp_path, trained_size=0)
    assert not experiment.Experiment(config, str(tmp_path / "run")).l2s.shared_vocabulary
    config.slm.path = config.llm.path
    one = experiment.Experiment(config, str(tmp_path / "run"))
    assert one.l2s.shared_vocabulary and one.slm_tokenizer.tokenizer.vocab_size == PIECES

    # Without a shared vocabulary, E_X is made of the LLM's embedding, and the SLM's is not read.
    system = dataclasses.replace(system, shared_vocabulary=False)
    trained, _ = small.make_params(system)
    assert set(trained) == {"projector", "prompt_map", "slm"}
    ids, mask = batch["llm_ids"], batch["llm_mask"]
    llm_embedded = frozen["token_embedding"]["embedding"][ids]
    encode = jax.jit(L2S(system.slm_config, system.projector_width, "add", False).apply)
    hidden = np.zeros((*ids.shape, system.llm_config.width), np.float32)
    inputs = ids, mask, hidden, batch["response_ids"], llm_embedded
    fused = llm_embedded @ trained["prompt_map"]["kernel"]
    slm = T5(system.slm_config)
    expected = slm.apply(
        {"params": trained["slm"]},
        slm.apply({"params": trained["slm"]}, fused, mask, method="encode"),
        mask,
        batch["response_ids"],
        method=small.score,
    )
    np.testing.assert_allclose(encode({"params": trained}, *inputs), expected, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_trained_here_is_refused_for_an_llm_that_has_another(tmp_path):
    config = make_experiment(tmp_path, trained_size=PIECES - 1)
    config.slm.path = ""
    with pytest.raises(ValueError, match=r"llm\.path=.* differs from the one trained"):
        _ = experiment.Experiment(config, str(tmp_path / "run")).llm_tokenizer.tokenizer


def test_an_slm_of_two_tokenizers_is_refused(tmp_path):
    config = make_experiment(tmp_path, trained_size=0)
    config.slm.tokenizer.train_vocab_size = PIECES
    with pytest.raises(ValueError, match=r"slm\.path=.*two tokenizers, expected one"):
        experiment.Experiment(config, str(tmp_path / "run")).check()


def make_experiment(tmp_path, trained_size):
    """A config with an LLM and an SLM directory, whose tokenizers have PIECES pieces each."""
    texts = {"llm": ["abc bca cab abba"] * 20, "slm": ["xyz yzx zxy xyyx"] * 20}
    config = default()
    for name, lines in texts.items():
        directory = tmp_path / name
        directory.mkdir()
        train_sentencepiece(lines, vocab_size=PIECES, directory=str(directory), seed=0)
        config[name].path = str(directory)
        config[name].train.steps = 10
    (tmp_path / "train.jsonl").write_text('{"a": "abc bca", "b": "cab abba"}\n' * 8)
    config.task.update(name="t", source="jsonl", data_dir=str(tmp_path), prompt="{a}", response="b")
    config.task.splits = {
        "train": "train.jsonl",
        "validation": "train.jsonl",
        "test": "train.jsonl",
    }
    config.tokenizer.train_vocab_size = trained_size
    return config


@pytest.mark.parametrize("fusion", small.FUSIONS)
def test_mistake_truncating_the_llms_prompt_to_the_slms_length(fusion):
    # Longer than the response, than the SLM's relative distances, than anything the SLM is made of.
    system, trained, frozen, _ = case(fusion)
    batch = small.make_batch(system, rows=2, prompt_tokens=60)
    batch["llm_mask"][:] = True
    hidden, encoded, logits = compiled(fusion)(trained, frozen, batch)
    of_llm = jax.jit(small.LanguageModel("llm", system.llm_config).encode)(
        {"llm": frozen}, {}, batch["llm_ids"], batch["llm_mask"]
    )
    np.testing.assert_allclose(hidden, of_llm, rtol=1e-5, atol=1e-5)
    assert encoded.shape == (2, 60, system.slm_config.width)

    changed = {**batch, "llm_ids": batch["llm_ids"].copy()}
    changed["llm_ids"][:, -1] = (batch["llm_ids"][:, -1] + 1) % small.VOCABULARY
    assert (np.abs(logits - compiled(fusion)(trained, frozen, changed)[2]).max((1, 2)) > 1e-6).all()
    assert (influence_of_hidden(fusion, batch, np.asarray(hidden)) > 0).all()

    ids, mask = batch["llm_ids"], batch["llm_mask"]
    _, cache = jax.jit(system.prefill, static_argnums=5)(trained, frozen, ids, mask, hidden, 3)
    assert cache.prompt_mask.shape == (2, 60) and np.asarray(cache.prompt_mask).all()
    assert {kv.key.shape[2] for kv in cache.cross_attention} == {60}

    pairs = [(" ".join(["5"] * 50), "6")]
    for name in ("llm", "slm_prompt"):
        made = evaluation_batches(
            small.make_data(pairs, (60, 4)), prompt_name=name, buckets=((60, 4),), batch_size=1
        )[0][1]
        assert made[f"{name}_mask"].sum() == 51
