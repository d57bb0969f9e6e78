"""What the decoder-only families share: the cache, and the four ways to run a model.

A family (gpt2.py, gpt_neox.py, llama.py) is its layers and a subclass of `CausalModel`. Prompts may
be padded anywhere: a token's position is the number of real tokens before it, so nothing depends
on padding. Slots are places in an array or a cache, positions are what a model knows of order.
Letters as in layers.py, and G key/value heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float32, Int, Int32

from l2s_jax.cluster.placement import split_prompt, split_rows
from l2s_jax.cluster.sharding import AnyArray
from l2s_jax.models.attention import at_once, whole_length
from l2s_jax.models.biases import CausalBias, mask_bias
from l2s_jax.models.cache import (
    CausalCache,
    KeyValue,
    ages,
    block,
    gone_on,
    next_slot,
    place,
)
from l2s_jax.models.family import Embeds
from l2s_jax.models.layers import unit
from l2s_jax.models.stacking import each_layer, run_layers
from l2s_jax.models.vocabulary import RESPONSE_TABLE, response_table


class CausalModel(Embeds):
    """A decoder-only language model. `apply({"params": p}, ids, mask)` -> logits [B, T, V].

    A subclass makes in `setup`: `token_embedding` (layers.Embedding), `layers` (make_layers, each
    called as CausalAttention is, on the residual stream), `final_norm`, `embedding_dropout`,
    `head` (layers.Linear) unless `config.tied_head`, and `response_embedding` where there is a
    `config.vocabulary`. `config` has vocab_size, width, num_layers, tied_head, scan_layers, remat
    and `windows`, how many positions back each layer sees (None: all).
    """

    has_encoder: ClassVar[bool] = False

    def enter(
        self, x: Float32[Array, "B T D"], positions: Int32[Array, "B T"]
    ) -> Float32[Array, "B T D"]:
        """The residual stream's start, from embedded tokens; learned positions go in here."""
        return x

    def logits(self, x: Float32[Array, "B T D"]) -> Float32[Array, "B T V"]:
        """What the head makes of states."""
        x = self.final_norm(x)
        if not self.config.tied_head:
            return self.head(x)
        table = self.response_embedding if self.config.vocabulary else self.token_embedding
        return table.attend(x)

    def _run(
        self,
        x: Float32[Array, "B T D"],
        positions: Int32[Array, "B T"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool,
        num_layers: int | None = None,
        kept: str = "",
    ) -> tuple[Float32[Array, "B T D"], tuple[Any, ...]]:
        """All positions at once, slots in order under the mask.

        kept: of each layer: "keys", its keys and values, which prefill needs; "states", what it
          gives; "both", in this order; "", nothing.
        """
        c = self.config
        x = self.embedding_dropout(self.enter(x, positions), deterministic=deterministic)
        x = split_prompt(x)
        length = x.shape[1]
        windows, which = _distinct(c.windows)
        one_of = c.scan_layers and len(windows) > 1
        if one_of:
            windows = [length if window is None else window for window in windows]
        biases: Any = [CausalBias(mask, positions, window) for window in windows]
        if at_once(length, length):
            biases = [bias.block(0, length, 0, length) for bias in biases]
        if one_of:
            biases = jax.tree.map(lambda *each: jnp.stack(each), *biases)

        def run(layer: nn.Module, x: jax.Array, i: Any) -> tuple[jax.Array, Any]:
            if one_of:
                bias = jax.tree.map(lambda each: each[i], biases)
            else:
                bias = biases[0 if c.scan_layers else i]
            x, key_value = layer(x, positions, bias, deterministic=deterministic)
            x = split_prompt(x)
            return x, {"": None, "keys": key_value, "states": x, "both": (key_value, x)}[kept]

        part = num_layers is not None or kept in ("keys", "both")
        layers = each_layer(self.layers)[:num_layers] if part else self.layers
        x, held = run_layers(run, layers, c, x, which[:num_layers])
        return x, tuple(held) if kept else ()

    def hidden_states(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        num_layers: int | None = None,
    ) -> Float32[Array, "B T D"]:
        """Embedded tokens after `num_layers` layers.

        No final norm is applied; None runs all layers, which `scan_layers` needs.
        """
        return self._run(embedded, token_positions(mask), mask, True, num_layers)[0]

    def __call__(
        self,
        ids: Int[AnyArray, "B T"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool = True,
    ) -> Float32[Array, "B T V"]:
        """Logits of each next token."""
        x, _ = self._run(self.embed(ids), token_positions(mask), mask, deterministic)
        return self.logits(x)

    def represent(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        layers: tuple[int, ...] = (),
    ) -> Float32[Array, "B T KD"]:
        """What LLM-to-SLM takes from an LLM of this family.

        The residual stream after the layers that the config has, at unit root mean square: it grows
        with depth, and at a few tokens by orders of magnitude (Sun et al. 2024, arXiv 2402.17762),
        which the layers' own norms hide and a projector would see. Or after each of so many layers,
        side by side.
        """
        if not layers:
            return unit(self.hidden_states(embedded, mask))
        _, states = self._run(embedded, token_positions(mask), mask, True, kept="states")
        return jnp.concatenate([unit(states[layer - 1]) for layer in layers], axis=-1)

    def encode(
        self,
        embedded: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        deterministic: bool = True,
    ) -> Float32[Array, "B T D"]:
        """There is no encoder: a prompt is the prefix of what the model continues."""
        return embedded

    def states(
        self,
        prompt: Float32[Array, "B T D"],
        prompt_mask: Bool[AnyArray, "B T"],
        response_ids: Int[AnyArray, "B S"],
        deterministic: bool = True,
    ) -> Float32[Array, "B S D"]:
        """Of which `logits` makes those of each response token, given the embedded prompt and the
        tokens before it.
        """
        before, length = response_ids[:, :-1], prompt.shape[1]
        # Where `sequence` and `tensor` both split, the gradient of a part of the positions is wrong
        # (jaxlib 0.10.2): parts are joined and taken where each device has all of them.
        x = jnp.concatenate([split_rows(prompt), self.embed_response(before)], axis=1)
        mask = jnp.concatenate([prompt_mask, jnp.ones(before.shape, bool)], axis=1)
        end = x.shape[1]
        has_dropout = not deterministic and self.config.dropout_rate > 0
        room = whole_length(end, has_dropout) - end
        x, mask = jnp.pad(x, [(0, 0), (0, room), (0, 0)]), jnp.pad(mask, [(0, 0), (0, room)])
        x, _ = self._run(x, token_positions(mask), mask, deterministic)
        x = split_rows(x)
        return jnp.concatenate([_last_real(x[:, :length], prompt_mask), x[:, length:end]], axis=1)

    def prefill(
        self, prompt: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"], max_steps: int
    ) -> tuple[Float32[Array, "B V"], CausalCache]:
        """Embedded prompt -> (logits of the first token, cache for `max_steps` more)."""
        x, held = self._run(prompt, token_positions(mask), mask, True, kept="keys")
        return self._continued(x, held, mask, max_steps)

    def read(
        self,
        prompt: Float32[Array, "B T D"],
        mask: Bool[AnyArray, "B T"],
        max_steps: int,
        layers: tuple[int, ...],
    ) -> tuple[Float32[Array, "B T KD"], Float32[Array, "B V"], CausalCache]:
        """(what `represent` gives of these layers, and what `prefill` gives), in one pass."""
        x, held = self._run(prompt, token_positions(mask), mask, True, kept="both")
        keys, states = zip(*held, strict=True)
        hidden = jnp.concatenate([unit(states[layer - 1]) for layer in layers], axis=-1)
        return hidden, *self._continued(x, keys, mask, max_steps)

    def _continued(
        self,
        x: Float32[Array, "B T D"],
        held: tuple[KeyValue, ...],
        mask: Bool[AnyArray, "B T"],
        max_steps: int,
    ) -> tuple[Float32[Array, "B V"], CausalCache]:
        """What `prefill` gives, of the states and the keys and values of all layers."""
        room = [(0, 0), (0, 0), (0, max_steps), (0, 0)]
        cache = place(
            CausalCache(
                index=jnp.zeros((), jnp.int32),
                prompt_mask=jnp.asarray(mask),
                prompt_positions=token_positions(mask),
                prompt_lengths=jnp.sum(mask, axis=1, dtype=jnp.int32),
                layers=jax.tree.map(lambda slots: jnp.pad(slots, room), held),
            )
        )
        return self.logits(_last_real(x, mask))[:, 0], cache

    def extend(
        self, x: Float32[Array, "B K D"], cache: CausalCache
    ) -> tuple[Float32[Array, "B K V"], CausalCache]:
        """K embedded tokens that follow what the cache holds -> (logits after each, the cache with
        them in); as K times `step`.
        """
        rows, count = x.shape[:2]
        own = jnp.broadcast_to(block(cache.index, count), (rows, count))
        positions = cache.prompt_lengths[:, None] + own

        def of_all(prompt: AnyArray, response: jax.Array) -> jax.Array:
            both = ((prompt, cache.prompt_slots), (response, cache.slots))
            return jnp.concatenate(
                [jnp.broadcast_to(part, (rows, count, slots)) for part, slots in both], axis=2
            )

        before = ages(cache, count)
        held = (before >= 0) & (before <= own[:, :, None])
        visible = of_all(cache.prompt_mask[:, None], held)
        before = of_all(positions[:, :, None] - cache.prompt_positions[:, None], before)
        windows, which = _distinct(self.config.windows)
        biases = [_bias(window, visible, before) for window in windows]
        x = split_rows(self.enter(x, positions))
        written = []
        layers, slot = each_layer(self.layers), cache.prompt_slots + next_slot(cache)
        for layer, i, held in zip(layers, which, cache.layers, strict=True):
            x, key_value = layer(x, positions, biases[i], held, slot)
            x = split_rows(x)
            written.append(key_value)
        return self.logits(x), gone_on(cache.replace(layers=tuple(written)), count)

    def step(
        self, token: Int[AnyArray, " B"], cache: CausalCache
    ) -> tuple[Float32[Array, "B V"], CausalCache]:
        """(logits of the next token, the cache with this one in)."""
        logits, cache = self.extend(self.embed_response(token[:, None]), cache)
        return logits[:, 0], cache

    @nn.nowrap
    def head_names(self) -> tuple[str, ...]:
        """The parameters that `logits` reads."""
        c = self.config
        return "final_norm", response_table(c) if c.tied_head else "head"

    @nn.nowrap
    def parameters_read_per_step(self, params: Mapping[str, Any]) -> int:
        """Numbers that `step` reads: all but tables of which a token reads one row."""
        tables = {"position_embedding"}
        if self.config.vocabulary or not self.config.tied_head:
            tables.add("token_embedding")
        if not self.config.tied_head:
            tables.add(RESPONSE_TABLE)
        return sum(
            leaf.size
            for name, part in params.items()
            if name not in tables
            for leaf in jax.tree.leaves(part)
        )


def token_positions(mask: Bool[AnyArray, "B T"]) -> Int32[Array, "B T"]:
    """How many real tokens come before each slot."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def _last_real(x: Float32[Array, "B T D"], mask: Bool[AnyArray, "B T"]) -> Float32[Array, "B 1 D"]:
    """The state at each row's last real token."""
    slots = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, slots, 0), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)


def _distinct(windows: Sequence[int | None]) -> tuple[list[int | None], list[int]]:
    """The windows that differ, and which of them each layer has."""
    distinct = list(dict.fromkeys(windows))
    return distinct, [distinct.index(window) for window in windows]


def _bias(
    window: int | None, visible: Bool[AnyArray, "B Q K"], before: Int32[Array, "B Q K"]
) -> Float32[Array, "B 1 Q K"]:
    """Of the keys that are visible, those of the window: fewer positions before a query."""
    if window is not None:
        visible = visible & (before < window)
    return mask_bias(visible)[:, None]
