"""A vocabulary cut to a task: the model writes what the whole head writes with the rows masked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from l2s_jax.cluster.sharding import one_device, put_parameters
from l2s_jax.decoding.engine import jitted_decode
from l2s_jax.models import serving
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.products import Transposed
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.scored import Scored
from l2s_jax.models.serving import lay_out_all
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.models.vocabulary import cut, with_vocabulary, without_vocabulary
from l2s_jax.settings.search import Search
from l2s_jax.training.losses import cross_entropy

VOCABULARY = 40
KEPT = np.array([0, 1, 2, 5, 6, 9, 12, 13, 20, 21, 28, 33, 39])
COMMON = {"vocab_size": VOCABULARY, "width": 16, "num_heads": 2, "feed_forward_width": 24}
CONFIGS = {
    "t5": small.t5_config(vocab_size=VOCABULARY, tied_head=True),
    "t5, own head": small.t5_config(vocab_size=VOCABULARY, tied_head=False),
    "gpt2": GPT2Config(**COMMON, num_layers=2, max_positions=64, pad_id=0, eos_id=1),
    "gpt_neox": GPTNeoXConfig(**COMMON, num_layers=2, rotary=Rotary(2), pad_id=0, eos_id=1),
    "llama": LlamaConfig(
        **COMMON, num_layers=2, num_kv_heads=1, head_width=8, rotary=Rotary(8), tied_head=True,
        pad_id=0, eos_id=1,
    ),
}  # fmt: skip
MASKED = -1e9


class Masked(NamedTuple):
    scored: Scored
    mask: Callable

    def logits(self):
        return self.mask(self.scored.logits())


class _CannotWriteTheRest:
    """A whole system whose logits are masked where an id is not kept: the reference."""

    def _masked(self, logits):
        gone = np.setdiff1d(np.arange(VOCABULARY), KEPT)
        return logits.at[..., gone].set(MASKED)

    def scored(self, *args):
        return Masked(super().scored(*args), self._masked)

    def prefill(self, *args):
        logits, cache = super().prefill(*args)
        return self._masked(logits), cache

    def step(self, *args):
        logits, cache = super().step(*args)
        return self._masked(logits), cache


class MaskedModel(_CannotWriteTheRest, LanguageModel):
    pass


class MaskedHybrid(_CannotWriteTheRest, LlmToSlm):
    pass


def masked(system):
    kind = MaskedModel if isinstance(system, LanguageModel) else MaskedHybrid
    fields = dataclasses.fields(system)
    return kind(**{field.name: getattr(system, field.name) for field in fields})


def language_model(name: str) -> LanguageModel:
    return LanguageModel("slm", CONFIGS[name])


def hybrid(fusion: str) -> LlmToSlm:
    llm = small.t5_config(vocab_size=VOCABULARY, width=24, head_width=8)
    return LlmToSlm(llm, CONFIGS["t5"], projector_width=20, fusion=fusion)


SYSTEMS = {
    **{name: language_model(name) for name in CONFIGS},
    **{fusion: hybrid(fusion) for fusion in small.FUSIONS},
}


def shortened(system):
    """The same system, with its vocabulary cut."""
    if isinstance(system, LanguageModel):
        return dataclasses.replace(system, config=with_vocabulary(system.config, KEPT))
    return dataclasses.replace(system, slm_config=with_vocabulary(system.slm_config, KEPT))


def batch_of(system, seed: int = 0):
    """A batch whose responses have ids among those kept; prompts have all."""
    batch = small.make_batch(system, seed=seed)
    prompt = f"{system.prompt_name}_ids"
    batch[prompt] %= VOCABULARY
    batch["response_ids"] %= len(KEPT)
    return batch


# One of each kind.
SOME = ("t5", "llama", "add")


@functools.cache
def make_case(name):
    """(whole system, cut system, trained, frozen)."""
    system = SYSTEMS[name]
    trained, frozen = small.make_params(system)
    # With a tied head, a model whose tokens are this large says one token for ever.
    table = trained["slm"]["token_embedding"]
    table["embedding"] = 0.2 * table["embedding"]
    return system, shortened(system), trained, frozen


@pytest.fixture(params=SYSTEMS)
def case(request):
    return make_case(request.param)


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [*((name, False) for name in SYSTEMS), *((name, True) for name in SOME)],
)
def test_logits_and_gradients_are_those_of_the_kept_rows(name, scan_layers):
    system, of_cut, trained, frozen = make_case(name)
    field = "config" if isinstance(system, LanguageModel) else "slm_config"
    config = dataclasses.replace(getattr(of_cut, field), scan_layers=scan_layers)
    of_cut = dataclasses.replace(of_cut, **{field: config})
    batch = batch_of(system)
    whole_batch = {**batch, "response_ids": KEPT[batch["response_ids"]].astype(np.int32)}

    def loss(trained, system, batch):
        logits = system.scored(trained, frozen, batch).logits()
        total, _ = cross_entropy(logits, batch["response_ids"], batch["response_mask"])
        return total, logits

    gradient = jax.value_and_grad(loss, has_aux=True)
    (value, logits), grads = jax.jit(lambda t: gradient(t, of_cut, batch))(trained)
    (expected, whole), expected_grads = jax.jit(lambda t: gradient(t, masked(system), whole_batch))(
        trained
    )
    np.testing.assert_allclose(logits, whole[..., KEPT], atol=1e-4)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), grads, expected_grads)


SEARCHES = {
    "greedy": (Search(), SYSTEMS),
    "beams": (Search(num_beams=3), SOME),
    "penalty": (Search(repetition_penalty=1.7), SOME),
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, (_, names) in SEARCHES.items() for name in names]
)
def test_decoding_is_that_of_the_whole_with_the_rest_masked(kind, name):
    search, _ = SEARCHES[kind]
    system, of_cut, trained, frozen = make_case(name)
    batch = batch_of(system, seed=3)
    prompts = (batch[f"{system.prompt_name}_ids"], batch[f"{system.prompt_name}_mask"])
    limits = np.full(len(prompts[0]), 9, np.int32)

    def decoded(system, served):
        return jitted_decode(system, *served, *prompts, limits, max_new_tokens=9, search=search)

    found = decoded(of_cut, of_cut.to_serve(trained, frozen))
    expected = decoded(masked(system), system.to_serve(trained, frozen))
    lengths = np.asarray(expected.lengths)
    np.testing.assert_array_equal(found.lengths, lengths)
    there = np.arange(expected.tokens.shape[-1]) < lengths[..., None]
    np.testing.assert_array_equal(
        KEPT[np.asarray(found.tokens)][there], np.asarray(expected.tokens)[there]
    )
    assert len(np.unique(found.tokens)) > 1, "the model says too little to tell"


def test_a_token_reads_the_kept_rows_alone(case):
    system, of_cut, trained, frozen = case
    whole, _ = system.to_serve(trained, frozen)
    kept, _ = of_cut.to_serve(trained, frozen)
    config = of_cut.decoder
    bias = 0 if config.tied_head or "bias" not in kept["slm"]["head"] else 1
    saved = (VOCABULARY - len(KEPT)) * (config.width + bias)
    assert system.parameters_read_per_token(whole) - of_cut.parameters_read_per_token(kept) == saved


def test_a_transposed_head_loses_the_same_rows(monkeypatch):
    monkeypatch.setattr(serving, "LEAST_TRANSPOSED", 1)
    system = shortened(language_model("t5, own head"))
    trained, _ = small.make_params(language_model("t5, own head"))
    trained = put_parameters(trained, one_device())
    held = lay_out_all(trained, one_device())
    assert isinstance(held["slm"]["head"]["kernel"], Transposed)
    expected = lay_out_all(cut(trained["slm"], system.config), one_device())
    small.assert_same(cut(held["slm"], system.config), expected)


def test_transposed_kernels_are_quantized_as_they_were(monkeypatch):
    monkeypatch.setattr(serving, "LEAST_TRANSPOSED", 1)
    system = language_model("t5, own head")
    trained, _ = small.make_params(system)
    held = lay_out_all(put_parameters(trained, one_device()), one_device())
    assert isinstance(held["slm"]["head"]["kernel"], Transposed)
    found, _ = system.to_serve(held, {}, "int8")
    small.assert_same(found, system.to_serve(trained, {}, "int8")[0])


def test_int8_quantizes_the_table_that_is_the_head(case):
    _, of_cut, trained, frozen = case
    exact, _ = of_cut.to_serve(trained, frozen)
    quantized, _ = of_cut.to_serve(trained, frozen, "int8")
    batch = batch_of(of_cut)
    prompts = (batch[f"{of_cut.prompt_name}_ids"], batch[f"{of_cut.prompt_name}_mask"])

    def first(served):
        hidden = of_cut.encode(served, frozen, *prompts)
        return of_cut.prefill(served, frozen, *prompts, hidden, 4)[0]

    expected, found = first(exact), first(quantized)
    assert found.shape == (4, len(KEPT))
    assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    slm = quantized["slm"]
    if of_cut.decoder.tied_head:
        assert slm["response_embedding"]["embedding"].qvalue.dtype == jnp.int8
        assert isinstance(slm["token_embedding"]["embedding"], np.ndarray | jax.Array)


def test_a_config_finds_its_way_back():
    config = CONFIGS["t5"]
    of_cut = with_vocabulary(dataclasses.replace(config, eos_id=5), KEPT)
    assert (of_cut.pad_id, of_cut.eos_id, of_cut.decoder_start_id) == (0, 3, 0)
    assert without_vocabulary(of_cut) == dataclasses.replace(config, eos_id=5)
    assert with_vocabulary(config, None) is config
    with pytest.raises(ValueError, match="id 3: expected one of the 13 ids that are kept"):
        with_vocabulary(dataclasses.replace(config, eos_id=3), KEPT)
