"""T5 (Raffel et al. 2020, arXiv 1910.10683): v1.0, v1.1, Flan-T5 and mT5.

The decoder runs in two ways on the same parameters: `decode` over a whole response at once
(training, scoring), and `prefill` then `step` with an explicit cache (generation).
Letters as in layers.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int

from l2s_jax.cluster.placement import split_prompt, split_rows
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.biases import mask_bias
from l2s_jax.models.cache import (
    DecoderCache,
    KeyValue,
    ages,
    block,
    empty_key_value,
    gone_on,
    next_slot,
    place,
)
from l2s_jax.models.family import Embeds
from l2s_jax.models.layers import Dropout, Embedding, Linear, RMSNorm, unit
from l2s_jax.models.stacking import each_layer, make_layers, run_layers
from l2s_jax.models.t5_layers import DecoderLayer, EncoderLayer, T5Config, relative_bias
from l2s_jax.models.vocabulary import response_size, response_table


class Encoder(nn.Module):
    """Embedded tokens to hidden states."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relative_bias = relative_bias(c, bidirectional=True)
        self.layers = make_layers(lambda: EncoderLayer(c), c, c.num_encoder_layers)
        self.final_norm = RMSNorm(c.norm_epsilon)
        self.dropout = Dropout(c.dropout_rate)

    def __call__(
        self, x: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"], deterministic: bool
    ) -> Float32[Array, "B T D"]:
        x, _ = self._run(x, mask, deterministic, keep=False)
        return self.dropout(self.final_norm(x), deterministic=deterministic)

    def with_states(
        self, x: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"]
    ) -> tuple[Float32[Array, "B T D"], Sequence[Float32[Array, "B T D"]]]:
        """(the hidden states, what each layer gives, no norm applied); without dropout."""
        x, states = self._run(x, mask, True, keep=True)
        return self.final_norm(x), tuple(states)

    def _run(
        self,
        x: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool,
        keep: bool,
    ) -> tuple[Float32[Array, "B T D"], Any]:
        bias = self.relative_bias.of_prompt(mask)

        def run(layer: EncoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, jax.Array | None]:
            x = split_prompt(layer(x, bias, deterministic))
            return x, x if keep else None

        x = split_prompt(self.dropout(x, deterministic=deterministic))
        return run_layers(run, self.layers, self.config, x, range(self.config.num_encoder_layers))


class Decoder(nn.Module):
    """Embedded response tokens to the states that the head reads."""

    config: T5Config

    def setup(self) -> None:
        c = self.config
        self.relative_bias = relative_bias(c, bidirectional=False)
        self.layers = make_layers(lambda: DecoderLayer(c), c, c.num_decoder_layers)
        self.final_norm = RMSNorm(c.norm_epsilon)
        self.dropout = Dropout(c.dropout_rate)

    def cross_key_value(self, hidden: Float32[Array, "B T D"]) -> tuple[KeyValue, ...]:
        """Encoder output -> each layer's cross-attention keys and values."""
        layers = each_layer(self.layers)
        return tuple(layer.cross_attention.key_value(hidden) for layer in layers)

    def __call__(
        self,
        x: Float32[Array, "B S D"],
        hidden: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool,
    ) -> Float32[Array, "B S D"]:
        """A whole response x, after the encoder's output under the prompt's mask."""
        positions = jnp.arange(x.shape[1])
        before = positions[None, :, None] - positions[None, None, :]
        bias = self.relative_bias(-before) + mask_bias(before >= 0)[:, None]
        cross_bias = mask_bias(mask)[:, None, None, :]

        def run(layer: DecoderLayer, x: jax.Array, _: Any) -> tuple[jax.Array, None]:
            cross = layer.cross_attention.key_value(hidden)
            x, _ = layer(x, bias, cross, cross_bias, deterministic=deterministic)
            return split_rows(x), None

        x = split_rows(self.dropout(x, deterministic=deterministic))
        x, _ = run_layers(run, self.layers, self.config, x, range(self.config.num_decoder_layers))
        return self.dropout(self.final_norm(x), deterministic=deterministic)

    def extend(
        self, x: Float32[Array, "B K D"], cache: DecoderCache
    ) -> tuple[Float32[Array, "B K D"], DecoderCache]:
        """K positions x that follow what the cache holds -> (their states, the cache with them)."""
        count, before = x.shape[1], ages(cache, x.shape[1])
        visible = (before >= 0) & (before <= block(cache.index, count)[:, :, None])
        bias = self.relative_bias(-before) + mask_bias(visible)[:, None]
        cross_bias = mask_bias(cache.prompt_mask)[:, None, None, :]
        x = split_rows(x)
        written = []
        for layer, own, cross in zip(
            each_layer(self.layers), cache.self_attention, cache.cross_attention, strict=True
        ):
            x, key_value = layer(x, bias, cross, cross_bias, own, next_slot(cache))
            x = split_rows(x)
            written.append(key_value)
        cache = gone_on(cache.replace(self_attention=tuple(written)), count)
        return self.final_norm(x), cache


class T5(Embeds):
    """The whole model. `apply({"params": p}, prompt_ids, prompt_mask, decoder_ids)` -> logits."""

    config: T5Config

    has_encoder: ClassVar[bool] = True

    def setup(self) -> None:
        c = self.config
        self.token_embedding = Embedding(
            c.vocab_size, c.width, nn.initializers.normal(1.0), c.dtype
        )
        if c.vocabulary:
            self.response_embedding = Embedding(
                response_size(c), c.width, nn.initializers.normal(1.0), c.dtype
            )
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        if not c.tied_head:
            initializer = nn.initializers.normal(c.width**-0.5)
            self.head = Linear(response_size(c), initializer, c.dtype, jnp.float32)

    def encode(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool = True,
    ) -> Float32[Array, "B T D"]:
        """Embedded prompt -> the encoder's output."""
        return self.encoder(embedded, mask, deterministic)

    def represent(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        layers: tuple[int, ...] = (),
    ) -> Float32[Array, "B T KD"]:
        """What LLM-to-SLM takes from an LLM of this family: the encoder's output.

        Or its residual stream after each of so many layers, at unit root mean square, side by side.
        """
        return self._read(embedded, mask, layers)[0]

    def _read(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        layers: tuple[int, ...],
    ) -> tuple[Float32[Array, "B T KD"], Float32[Array, "B T D"]]:
        """(what `represent` gives, the encoder's output)."""
        if not layers:
            hidden = self.encode(embedded, mask)
            return hidden, hidden
        hidden, states = self.encoder.with_states(embedded, mask)
        return jnp.concatenate([unit(states[layer - 1]) for layer in layers], axis=-1), hidden

    def read(
        self,
        prompt: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        max_steps: int,
        layers: tuple[int, ...],
    ) -> tuple[Float32[Array, "B T KD"], Float32[Array, "B V"], DecoderCache]:
        """(what `represent` gives, and what `prefill` gives), of an embedded prompt read once."""
        represented, hidden = self._read(prompt, mask, layers)
        return represented, *self.prefill(hidden, mask, max_steps)

    def logits(self, x: Float32[Array, "B S D"]) -> Float32[Array, "B S V"]:
        """What the head makes of the decoder's output."""
        if self.config.tied_head:
            scale = self.config.width**-0.5 if self.config.scaled_head else 1.0
            table = self.response_embedding if self.config.vocabulary else self.token_embedding
            return table.attend(x * scale)
        return self.head(x)

    def decode(
        self,
        decoder_ids: Int[AnyArray, "B S"],
        hidden: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool = True,
    ) -> Float32[Array, "B S V"]:
        """Logits, from decoder_ids that are already shifted right and the encoder's output."""
        return self.logits(
            self.decoder(self.embed_response(decoder_ids), hidden, mask, deterministic)
        )

    def __call__(
        self,
        prompt_ids: Int[AnyArray, "B T"],
        prompt_mask: Bool[AnyArray, "B T"],
        decoder_ids: Int[AnyArray, "B S"],
        deterministic: bool = True,
    ) -> Float32[Array, "B S V"]:
        """Logits; decoder_ids are already shifted right."""
        hidden = self.encode(self.embed(prompt_ids), prompt_mask, deterministic)
        return self.decode(decoder_ids, hidden, prompt_mask, deterministic)

    def states(
        self,
        hidden: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        response_ids: Int[AnyArray, "B S"],
        deterministic: bool = True,
    ) -> Float32[Array, "B S D"]:
        """Of which `logits` makes those of each response token; the ids are not shifted yet."""
        start = jnp.full_like(response_ids[:, :1], self.config.decoder_start_id)
        decoder_ids = jnp.concatenate([start, response_ids[:, :-1]], axis=1)
        return self.decoder(self.embed_response(decoder_ids), hidden, mask, deterministic)

    def empty_cache(
        self, hidden: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"], length: int
    ) -> DecoderCache:
        """Encoder output -> a cache for `length` tokens."""
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
        self, hidden: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"], max_steps: int
    ) -> tuple[Float32[Array, "B V"], DecoderCache]:
        """Encoder output -> (logits of the first token, cache for `max_steps` more)."""
        start = jnp.full(mask.shape[:1], self.config.decoder_start_id, jnp.int32)
        return self.step(start, self.empty_cache(hidden, mask, max_steps + 1))

    def extend(
        self, x: Float32[Array, "B K D"], cache: DecoderCache
    ) -> tuple[Float32[Array, "B K V"], DecoderCache]:
        """K embedded tokens that follow what the cache holds -> (logits after each, the cache with
        them in); as K times `step`.
        """
        x, cache = self.decoder.extend(x, cache)
        return self.logits(x), cache

    def step(
        self, token: Int[AnyArray, " B"], cache: DecoderCache
    ) -> tuple[Float32[Array, "B V"], DecoderCache]:
        """(logits of the next token, the cache with this one in)."""
        logits, cache = self.extend(self.embed_response(token[:, None]), cache)
        return logits[:, 0], cache

    @nn.nowrap
    def head_names(self) -> tuple[str, ...]:
        """The parameters that `logits` reads."""
        return (response_table(self.config) if self.config.tied_head else "head",)

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
        head = params[response_table(self.config) if self.config.tied_head else "head"]
        return size(decoder) - cross_inputs + size(head)
