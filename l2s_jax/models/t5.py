"""T5 (Raffel et al. 2020, arXiv 1910.10683): v1.0, v1.1, Flan-T5 and mT5.

The decoder runs in two ways on the same parameters: `decode` over a whole response at once
(training, scoring), and `prefill` then `step` with an explicit cache (generation).
Letters as in layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from l2s_jax.cluster.sharding import split_rows
from l2s_jax.models.cache import DecoderCache, KeyValue, empty_key_value, place
from l2s_jax.models.layers import Dropout, Embedding, Linear, RMSNorm, mask_bias
from l2s_jax.models.stacking import each_layer, make_layers, run_layers
from l2s_jax.models.t5_layers import DecoderLayer, EncoderLayer, T5Config, relative_bias


class Encoder(nn.Module):
    """Embedded tokens to hidden states."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relative_bias = relative_bias(c, bidirectional=True)
        self.layers = make_layers(lambda: EncoderLayer(c), c, c.num_encoder_layers)
        self.final_norm = RMSNorm(c.norm_epsilon)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool) -> jax.Array:
        """x [B, T, D], bool mask [B, T] -> float32 [B, T, D]."""
        positions = jnp.arange(x.shape[1])
        bias = self.relative_bias(positions, positions) + mask_bias(mask)[:, None, None, :]

        def run(layer: EncoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            return split_rows(layer(x, bias, deterministic)), None

        x = split_rows(self.dropout(x, deterministic=deterministic))
        x, _ = run_layers(run, self.layers, self.config, x, range(self.config.num_encoder_layers))
        return self.dropout(self.final_norm(x), deterministic=deterministic)


class Decoder(nn.Module):
    """Embedded response tokens to the states that the head reads."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relative_bias = relative_bias(c, bidirectional=False)
        self.layers = make_layers(lambda: DecoderLayer(c), c, c.num_decoder_layers)
        self.final_norm = RMSNorm(c.norm_epsilon)
        self.dropout = Dropout(c.dropout_rate)

    def cross_key_value(self, hidden: jax.Array) -> tuple[KeyValue, ...]:
        """Encoder output [B, T, D] -> each layer's cross-attention keys and values."""
        layers = each_layer(self.layers)
        return tuple(layer.cross_attention.key_value(hidden) for layer in layers)

    def __call__(
        self, x: jax.Array, hidden: jax.Array, mask: jax.Array, deterministic: bool
    ) -> jax.Array:
        """x [B, S, D], encoder output [B, T, D] under bool mask [B, T] -> [B, S, D]."""
        positions = jnp.arange(x.shape[1])
        causal = positions[None, :] <= positions[:, None]
        bias = self.relative_bias(positions, positions) + mask_bias(causal)[None, None]
        cross_bias = mask_bias(mask)[:, None, None, :]

        def run(layer: DecoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            cross = layer.cross_attention.key_value(hidden)
            x, _ = layer(x, bias, cross, cross_bias, deterministic=deterministic)
            return split_rows(x), None

        x = split_rows(self.dropout(x, deterministic=deterministic))
        x, _ = run_layers(run, self.layers, self.config, x, range(self.config.num_decoder_layers))
        return self.dropout(self.final_norm(x), deterministic=deterministic)

    def step(self, x: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """One position x [B, 1, D] -> ([B, 1, D], the cache with that position in it)."""
        keys = jnp.arange(cache.self_attention[0].key.shape[2])
        bias = self.relative_bias(cache.index[None], keys)
        bias = bias + mask_bias(keys <= cache.index)[None, None, None, :]
        cross_bias = mask_bias(cache.prompt_mask)[:, None, None, :]
        x = split_rows(x)
        written = []
        for layer, own, cross in zip(
            each_layer(self.layers), cache.self_attention, cache.cross_attention, strict=True
        ):
            x, key_value = layer(x, bias, cross, cross_bias, own, cache.index)
            x = split_rows(x)
            written.append(key_value)
        cache = cache.replace(index=cache.index + 1, self_attention=tuple(written))
        return self.final_norm(x), cache


class T5(nn.Module):
    """The whole model. `apply({"params": p}, prompt_ids, prompt_mask, decoder_ids)` -> logits."""

    config: T5Config

    has_encoder: ClassVar[bool] = True

    def setup(self) -> None:
        c = self.config
        self.token_embedding = Embedding(
            c.vocab_size, c.width, nn.initializers.normal(1.0), c.dtype
        )
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if not c.tied_head:
            initializer = nn.initializers.normal(c.width**-0.5)
            self.head = Linear(c.vocab_size, initializer, c.dtype, jnp.float32)

    def embed(self, ids: jax.Array) -> jax.Array:
        """int32 [B, T] -> float32 [B, T, D]."""
        return self.token_embedding(ids)

    def encode(self, embedded: jax.Array, mask: jax.Array, deterministic: bool = True) -> jax.Array:
        """Embedded prompt [B, T, D] under bool mask [B, T] -> encoder output, float32 [B, T, D]."""
        return self.encoder(embedded, mask, deterministic)

    def represent(self, embedded: jax.Array, mask: jax.Array) -> jax.Array:
        """What LLM-to-SLM takes from an LLM of this family: the encoder's output."""
        return self.encode(embedded, mask)

    def _logits(self, x: jax.Array) -> jax.Array:
        if self.config.tied_head:
            scale = self.config.width**-0.5 if self.config.scaled_head else 1.0
            return self.token_embedding.attend(x * scale)
        return self.head(x)

    def decode(
        self,
        decoder_ids: jax.Array,
        hidden: jax.Array,
        mask: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """decoder_ids int32 [B, S] (already shifted right), encoder output -> logits [B, S, V]."""
        return self._logits(self.decoder(self.embed(decoder_ids), hidden, mask, deterministic))

    def __call__(
        self,
        prompt_ids: jax.Array,
        prompt_mask: jax.Array,
        decoder_ids: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """int32 [B, T], bool [B, T], int32 [B, S] (shifted right) -> float32 logits [B, S, V]."""
        hidden = self.encode(self.embed(prompt_ids), prompt_mask, deterministic)
        return self.decode(decoder_ids, hidden, prompt_mask, deterministic)

    def score(
        self,
        hidden: jax.Array,
        mask: jax.Array,
        response_ids: jax.Array,
        deterministic: bool = True,
    ) -> jax.Array:
        """As `decode`, of response_ids int32 [B, S] that are not shifted yet."""
        start = jnp.full_like(response_ids[:, :1], self.config.decoder_start_id)
        decoder_ids = jnp.concatenate([start, response_ids[:, :-1]], axis=1)
        return self.decode(decoder_ids, hidden, mask, deterministic)

    def empty_cache(self, hidden: jax.Array, mask: jax.Array, length: int) -> DecoderCache:
        """Encoder output [B, T, D] under bool mask [B, T] -> a cache for `length` tokens."""
        c = self.config
        empty = empty_key_value(hidden.shape[0], c.num_heads, length, c.head_width, c.dtype)
        return place(
            DecoderCache(
                index=jnp.zeros((), jnp.int32),
                self_attention=(empty,) * c.num_decoder_layers,
                cross_attention=self.decoder.cross_key_value(hidden),
                prompt_mask=mask,
            )
        )

    def prefill(
        self, hidden: jax.Array, mask: jax.Array, max_steps: int
    ) -> tuple[jax.Array, DecoderCache]:
        """Encoder output -> (float32 logits [B, V] of the first token, cache for more steps)."""
        start = jnp.full(mask.shape[:1], self.config.decoder_start_id, jnp.int32)
        return self.step(start, self.empty_cache(hidden, mask, max_steps + 1))

    def step(self, token: jax.Array, cache: DecoderCache) -> tuple[jax.Array, DecoderCache]:
        """int32 [B] -> (float32 logits [B, V] of the next token, the cache with this one in)."""
        x, cache = self.decoder.step(self.embed(token[:, None]), cache)
        return self._logits(x)[:, 0], cache

    @nn.nowrap
    def parameters_read_per_step(self, params: Mapping[str, Any]) -> int:
        """Numbers that `step` reads: the decoder without what only `empty_cache` uses, the head.

        The embedding's one row per token is left out.
        """

        def size(tree: Any) -> int:
            return sum(leaf.size for leaf in jax.tree.leaves(tree))

        decoder = params["decoder"]
        cross_inputs = sum(
            size([layer["cross_attention"][name] for name in ("key", "value")])
            for key, layer in decoder.items()
            if key.startswith("layers_")
        )
        head = params["token_embedding"] if self.config.tied_head else params["head"]
        return size(decoder) - cross_inputs + size(head)
