"""The loss with a part of the logits at a time, against all of them at once."""

from __future__ import annotations

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import small

from l2s_jax.cluster import sharding
from l2s_jax.experiment.scoring import likeliest
from l2s_jax.models import counting
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.systems import LanguageModel, LlmToSlm
from l2s_jax.training import chunks
from l2s_jax.training.distillation import Distillation
from l2s_jax.training.on_policy import own_loss
from l2s_jax.training.update import batch_loss, step_flops

# Sizes that programs are made for change here.
pytestmark = pytest.mark.usefixtures("programs_of_its_own")

ROWS, PROMPT, LENGTH, K = 8, 6, 11, 3
LLM = small.t5_config()
CONFIGS = {
    "t5": LLM,
    "t5, own head": dataclasses.replace(LLM, tied_head=False),
    "t5, bfloat16": dataclasses.replace(LLM, dtype=jnp.bfloat16, scan_layers=True),
    "llama": LlamaConfig(
        vocab_size=LLM.vocab_size, width=16, num_heads=2, feed_forward_width=24, num_layers=2,
        num_kv_heads=1, head_width=8, rotary=Rotary(8), tied_head=True, pad_id=0, eos_id=1,
    ),
}  # fmt: skip
DISTILLED = Distillation(0.3, 2.0)


@pytest.fixture
def parts(monkeypatch):
    """Has so few logits at once that a chunk is two positions, but for the last."""
    monkeypatch.setattr(chunks, "MOST_LOGITS", 2 * ROWS * LLM.vocab_size)


def case(system, seed=0):
    """(trained, frozen, batch)"""
    random = np.random.default_rng(seed)
    trained, frozen = small.make_params(system)

    def ids(length):
        return random.integers(2, LLM.vocab_size, (ROWS, length)).astype(np.int32)

    prompt = {"ids": ids(PROMPT), "mask": np.ones((ROWS, PROMPT), bool)}
    response_mask = np.arange(LENGTH) < random.integers(1, LENGTH + 1, (ROWS, 1))
    log_probs = np.log(random.dirichlet(np.ones(K + 1), (ROWS, LENGTH))[..., :K])
    return (
        trained,
        frozen,
        {
            **{f"{system.prompt_name}_{name}": value for name, value in prompt.items()},
            "response_ids": ids(LENGTH),
            "response_mask": response_mask,
            "teacher_ids": ids(LENGTH)[..., None] + np.arange(K, dtype=np.int32),
            "teacher_log_probs": log_probs.astype(np.float32),
        },
    )


def gradient_of(loss):
    """Compiled anew: how many logits there may be at once is no argument."""
    return jax.jit(jax.value_and_grad(lambda *inputs: loss(*inputs), has_aux=True))


def assert_same(found, expected, exact=1e-6):
    def close(one, other):
        scale = float(jnp.max(jnp.abs(jnp.asarray(other, jnp.float32)))) or 1.0
        np.testing.assert_allclose(one, other, rtol=0, atol=exact * scale)

    jax.tree.map(close, found, expected)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("distillation", [None, DISTILLED], ids=["", "distilled"])
def test_loss_and_gradient_of_chunks_are_those_of_the_whole(name, distillation, monkeypatch):
    system = LanguageModel("slm", CONFIGS[name])
    trained, frozen, batch = case(system)

    def loss(trained):
        return batch_loss(system, trained, frozen, batch, None, 0.1, distillation)

    expected = gradient_of(loss)(trained)
    monkeypatch.setattr(chunks, "MOST_LOGITS", 2 * ROWS * LLM.vocab_size)
    exact = 1e-6 if system.config.dtype == jnp.float32 else 2e-2
    assert_same(gradient_of(loss)(trained), expected, exact)
    # Also where there is no gradient.
    assert_same(jax.jit(lambda *x: loss(*x))(trained), expected[0], exact)


def test_chunks_of_an_l2s_on_a_mesh(parts, monkeypatch):
    system = LlmToSlm(LLM, LLM, 16)
    trained, frozen, batch = case(system)

    def loss(trained, frozen, batch):
        return batch_loss(system, trained, frozen, batch, None, 0.0)

    found = gradient_of(loss)(trained, frozen, batch)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    monkeypatch.setattr(chunks, "MOST_LOGITS", 2 * ROWS // 4 * LLM.vocab_size)
    with jax.set_mesh(mesh):
        placed = sharding.put_parameters(trained, mesh), sharding.put_parameters(frozen, mesh)
        rows = sharding.put_batch(batch, mesh=mesh, batch_size=ROWS)
        on_mesh = jax.device_get(gradient_of(loss)(*placed, rows))
    assert_same(on_mesh, found, 1e-5)
    monkeypatch.undo()
    assert_same(found, gradient_of(loss)(trained, frozen, batch))


def test_chunks_of_what_a_system_wrote_itself(monkeypatch):
    system, llm = LlmToSlm(LLM, LLM, 16), dataclasses.replace(LLM, vocab_size=LLM.vocab_size + 9)
    trained, frozen, batch = case(system)
    of_llm = small.make_params(LanguageModel("llm", llm), seed=1)[0]["llm"]

    def loss(trained):
        return own_loss(system, trained, (frozen, of_llm), batch, None, llm)

    expected = gradient_of(loss)(trained)
    monkeypatch.setattr(chunks, "MOST_LOGITS", 5 * ROWS * LLM.vocab_size)
    assert_same(gradient_of(loss)(trained), expected)


def test_the_llms_likeliest_tokens_of_chunks(monkeypatch):
    system = LanguageModel("llm", LLM)
    trained, _, batch = case(system)
    expected = jax.jit(lambda p: likeliest(system, p, batch, K, 1.5))(trained)
    monkeypatch.setattr(chunks, "MOST_LOGITS", 2 * ROWS * LLM.vocab_size)
    ids, log_probs = jax.jit(lambda p: likeliest(system, p, batch, K, 1.5))(trained)
    np.testing.assert_array_equal(ids, expected[0])
    assert_same(log_probs, expected[1], 1e-3)


def shapes_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_no_more_logits_are_made_than_may_be(parts, monkeypatch):
    system = LanguageModel("slm", LLM)
    trained, frozen, batch = case(system)
    config = small.make_train_config(1)

    def loss(trained):
        return batch_loss(system, trained, frozen, batch, None, 0.1, DISTILLED)

    jaxpr = jax.make_jaxpr(jax.grad(loss, has_aux=True))(trained).jaxpr
    sizes = {shape[1] for shape in shapes_of(jaxpr) if shape[2:] == (LLM.vocab_size,)}
    assert sizes == {2}
    # But for counting.
    with counting.all_at_once():
        jaxpr = jax.make_jaxpr(lambda t: loss(t))(trained).jaxpr
    assert (ROWS, LENGTH, LLM.vocab_size) in set(shapes_of(jaxpr))
    # What the products cost is the same: nothing is made twice.
    in_chunks = step_flops(system, trained, frozen, batch, config)
    assert in_chunks > 0
    monkeypatch.setattr(chunks, "MOST_LOGITS", 10**9)
    whole = step_flops(system, trained, frozen, batch, config)
    filled = -(-LENGTH // 2) * 2 - LENGTH
    head = 6 * ROWS * filled * LLM.width * LLM.vocab_size
    assert in_chunks == whole + head
