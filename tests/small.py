"""Small random systems, batches, a tokenizer of numbers and one-device meshes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from l2s_jax.cluster.sharding import AXES
from l2s_jax.data.batches import training_batches
from l2s_jax.data.examples import TokenizedExamples
from l2s_jax.data.table import Example
from l2s_jax.models.systems import LanguageModel, LlmToSlm, System
from l2s_jax.models.t5 import T5, T5Config
from l2s_jax.settings.training import Train

VOCABULARY = 48
FUSIONS = ("add", "replace", "cross")
SYSTEMS = ("llm", "slm", *FUSIONS)
QUICK_COMPILATION = {"xla_backend_optimization_level": 0}


def t5_config(**changes: Any) -> T5Config:
    """One layer, 16 wide, with a head of its own, so that greedy outputs are not all alike."""
    base = T5Config(
        vocab_size=VOCABULARY,
        width=16,
        num_heads=2,
        head_width=6,
        feed_forward_width=32,
        num_encoder_layers=1,
        num_decoder_layers=1,
        tied_head=False,
        num_buckets=8,
        max_distance=16,
        dropout_rate=0.0,
    )
    return dataclasses.replace(base, **changes)


def make_system(name: str, **slm_changes: Any) -> System:
    """One of SYSTEMS; the LLM of an L2S is 24 wide and has two layers."""
    if name in ("llm", "slm"):
        return LanguageModel(name, t5_config(**slm_changes))
    dtype = slm_changes.get("dtype", jnp.float32)
    llm = t5_config(width=24, num_encoder_layers=2, head_width=8, dtype=dtype)
    return LlmToSlm(llm, t5_config(**slm_changes), projector_width=20, fusion=name)


def random_like(tree: Any, seed: int = 0) -> Any:
    """Parameters of which each one matters: no norm is ones, no bias near zero."""
    random = np.random.default_rng(seed)

    def leaf(path: tuple, x: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        normal = random.standard_normal(x.shape).astype(np.float32)
        if name.endswith("scale"):
            return 1 + 0.3 * normal
        return normal if name.endswith("embedding") else normal * x.shape[0] ** -0.5

    return jax.tree_util.tree_map_with_path(leaf, tree)


def t5_params(config: T5Config, seed: int = 0) -> dict[str, Any]:
    ids, mask = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)
    init = lambda: T5(config).init(jax.random.key(0), ids, mask, ids)["params"]  # noqa: E731
    return random_like(jax.eval_shape(init), seed)


def make_params(system: System, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen)."""
    trained = random_like(jax.eval_shape(system.init, jax.random.key(0)), seed)
    if isinstance(system, LanguageModel):
        return trained, {}
    return trained, encoder_only(t5_params(system.llm_config, seed + 1))


def logits_of(system: Any) -> Any:
    """(trained, frozen, batch) -> logits of the response, all positions at once."""
    return lambda *inputs: system.scored(*inputs).logits()


def score(module: Any, *inputs: Any) -> jax.Array:
    """A module's logits of a response; to `apply` as a method."""
    return module.logits(module.states(*inputs))


def encoder_only(params: Mapping[str, Any]) -> dict[str, Any]:
    """What convert.load_encoder would read of a T5."""
    return {key: params[key] for key in ("token_embedding", "encoder")}


def make_batch(
    system: System, rows: int = 4, prompt_tokens: int = 7, response_tokens: int = 5, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch with rows of different lengths, padded on the right; the first row is full."""
    random = np.random.default_rng(seed)

    def side(name: str, tokens: int) -> dict[str, np.ndarray]:
        lengths = random.integers(1, tokens + 1, rows)
        lengths[0] = tokens
        mask = np.arange(tokens) < lengths[:, None]
        ids = random.integers(3, VOCABULARY, (rows, tokens), dtype=np.int32)
        return {f"{name}_ids": np.where(mask, ids, 0).astype(np.int32), f"{name}_mask": mask}

    return {**side(system.prompt_name, prompt_tokens), **side("response", response_tokens)}


class NumberTokenizer:
    """Space-separated numbers, each its own id, then eos."""

    vocab_size, pad_id, eos_id, end_ids = VOCABULARY, 0, 1, (1,)
    is_chat = False
    fingerprint = identity = "numbers"
    pieces, special_ids = list(map(str, range(VOCABULARY))), [0, 1]

    def encode_prompts(self, texts: list[str]) -> list[list[int]]:
        return [[*map(int, text.split()), self.eos_id] for text in texts]

    encode_responses = encode_prompts

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def make_data(pairs: list[tuple[str, str]], tokens: tuple[int, int]) -> TokenizedExamples:
    return TokenizedExamples(
        [Example(prompt, response, (response,)) for prompt, response in pairs],
        prompt_tokenizer=NumberTokenizer(),
        response_tokenizer=NumberTokenizer(),
        max_prompt_tokens=tokens[0],
        max_response_tokens=tokens[1],
    )


def random_pairs(count: int, longest: int, seed: int = 0) -> list[tuple[str, str]]:
    """Prompts of 1 to `longest` numbers, answered by the same numbers backwards."""
    random = np.random.default_rng(seed)
    rows = [
        [str(n) for n in random.integers(3, VOCABULARY, random.integers(1, longest + 1))]
        for _ in range(count)
    ]
    return [(" ".join(row), " ".join(row[::-1])) for row in rows]


def make_batches(
    system: System,
    pairs: list[tuple[str, str]],
    *,
    batch_size: int,
    seed: int = 0,
    rows: np.ndarray | None = None,
):
    """Training batches [batch_size, 8] of prompts and responses of up to 8 tokens."""
    return training_batches(
        make_data(pairs, (8, 8)),
        prompt_name=system.prompt_name,
        buckets=((8, 8),),
        batch_size=batch_size,
        seed=seed,
        rows=rows,
    )


def make_train_config(steps: int, **changes: Any) -> ConfigDict:
    config = ConfigDict(dataclasses.asdict(Train(steps=steps)))
    config.update(batch_size=8, dropout_rate=0.0, log_every=1, schedule="constant")
    config.update(**changes)
    return config


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1) -> Mesh:
    """A mesh over the first devices, as sharding.make_mesh builds it over all."""
    return jax.make_mesh(
        (data, fsdp, sequence, tensor),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=jax.devices()[: data * fsdp * sequence * tensor],
    )


class Stop(Exception):
    """Of `Stopping`."""


class Stopping:
    """A batch iterator that fails after `count` batches."""

    def __init__(self, batches: Any, count: int):
        self.batches, self.count = batches, count

    def __next__(self) -> Any:
        self.count -= 1
        if self.count < 0:
            raise Stop
        return next(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def assert_same(actual: Any, expected: Any, **tolerance: float) -> None:
    """Two trees with the same structure and values; bit for bit without a tolerance."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    named = jax.tree_util.tree_leaves_with_path(jax.device_get(actual))
    for (path, got), want in zip(named, jax.tree.leaves(jax.device_get(expected)), strict=True):
        name = jax.tree_util.keystr(path)
        if tolerance:
            np.testing.assert_allclose(got, want, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


def differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
