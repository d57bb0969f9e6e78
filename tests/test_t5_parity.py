"""Our T5 against transformers' in float32: same checkpoint, same logits."""

from __future__ import annotations

import hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.t5.modeling_t5 import T5Attention

from l2s_jax.checkpoints.pretrained import load_hf
from l2s_jax.models.relative import bucket_table

TOLERANCE = 1e-4  # of the largest logit
BUCKETS, DISTANCE = "relative_attention_num_buckets", "relative_attention_max_distance"
OWN_HEAD = {"own_head": True, "tie_word_embeddings": False}

# name -> (prompt tokens, response tokens, checkpoint)
CASES = {
    "v1.0": (20, 12, {}),
    "v1.1": (20, 12, {"feed_forward_proj": "gated-gelu", **OWN_HEAD}),
    "gated silu": (20, 12, {"feed_forward_proj": "gated-silu", **OWN_HEAD}),
    "tied head, not scaled": (9, 5, {"tie_word_embeddings": False}),
    "wide heads, 8 buckets": (40, 24, {"d_kv": 12, "num_heads": 4, BUCKETS: 8, DISTANCE: 16}),
    "deep decoder, 16 buckets": (80, 70, {"num_decoder_layers": 4, BUCKETS: 16, DISTANCE: 64}),
    "shallow decoder": (20, 12, {"num_layers": 5, "num_decoder_layers": 1}),
    "mT5": (20, 12, {"family": "MT5", "own_head": True}),
    "mT5, tied head": (9, 5, {"family": "MT5"}),
    "odd vocabulary": (
        9,
        5,
        {"vocab_size": 331, "d_ff": 7, "d_model": 10, "layer_norm_epsilon": 1e-2},
    ),
    "deep": (20, 12, {"num_layers": 8}),
    "long": (150, 140, {"num_heads": 2}),
    "wide": (9, 5, {"d_model": 256, "d_ff": 384, **OWN_HEAD}),
    "longer, distance 200": (230, 210, {"num_heads": 2, DISTANCE: 200, **OWN_HEAD}),
}


def batch(vocab_size: int, prompt_tokens: int, response_tokens: int) -> tuple[np.ndarray, ...]:
    """Prompt ids and mask, decoder ids: a row padded right, one padded left, one full."""
    random = np.random.default_rng(1)
    ids = random.integers(0, vocab_size, (3, prompt_tokens), dtype=np.int32)
    positions = np.arange(prompt_tokens)
    mask = np.stack([positions < prompt_tokens * 2 // 3, positions >= 3, positions >= 0])
    decoder_ids = random.integers(0, vocab_size, (3, response_tokens), dtype=np.int32)
    return ids, mask, decoder_ids


def decode_in_steps(module, params, ids, mask, decoder_ids):
    """Logits [B, S, V] by prefill and step, the cache longer than the response."""
    variables = {"params": params}
    embedded = module.apply(variables, ids, method="embed")
    hidden = module.apply(variables, embedded, mask, method="encode")
    cache = module.apply(variables, hidden, mask, decoder_ids.shape[1] + 3, method="empty_cache")

    def step(cache, token):
        logits, cache = module.apply(variables, token, cache, method="step")
        return cache, logits

    cache, logits = jax.lax.scan(step, cache, decoder_ids.T)
    return logits.transpose(1, 0, 2)


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers(name, tmp_path, record_property):
    prompt_tokens, response_tokens, checkpoint = CASES[name]
    reference = hf.make_t5(str(tmp_path), **checkpoint)
    module, params = load_hf(str(tmp_path))
    inputs = batch(module.config.vocab_size, prompt_tokens, response_tokens)
    ids, mask, decoder_ids = (rows[-1:] if name.startswith("one row") else rows for rows in inputs)
    with torch.no_grad():
        expected = reference(
            input_ids=torch.tensor(ids, dtype=torch.long),
            attention_mask=torch.tensor(mask, dtype=torch.long),
            decoder_input_ids=torch.tensor(decoder_ids, dtype=torch.long),
        ).logits.numpy()
    allowed = TOLERANCE * np.abs(expected).max()

    def both_ways(params, *inputs):
        return module.apply({"params": params}, *inputs), decode_in_steps(module, params, *inputs)

    with jax.default_matmul_precision("highest"):
        compiled = jax.jit(both_ways, compiler_options=hf.COMPILATION)
        full, steps = compiled(params, ids, mask, decoder_ids)
    assert full.dtype == steps.dtype == jnp.float32
    assert full.shape == steps.shape == expected.shape
    assert np.abs(full - expected).max() <= allowed
    assert np.abs(steps - expected).max() <= allowed
    for which, found in (("full", full), ("steps", steps)):
        record_property(which, float(np.abs(found - expected).max() / np.abs(expected).max()))


@pytest.mark.parametrize("max_distance", [33, 64, 100, 128, 200, 1000])
@pytest.mark.parametrize("num_buckets", [4, 8, 16, 32, 34, 64])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_transformers(num_buckets, max_distance, bidirectional):
    one_sided = num_buckets // 2 if bidirectional else num_buckets
    distance = np.arange(3 * max_distance)
    expected = T5Attention._relative_position_bucket(
        -torch.tensor(distance), bidirectional, num_buckets, max_distance
    )
    table = bucket_table(one_sided, max_distance)
    np.testing.assert_array_equal(table[np.minimum(distance, max_distance)], expected.numpy())
