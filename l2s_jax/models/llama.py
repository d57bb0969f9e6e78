"""Llama and its kin: Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM2. Letters as in layers.py.

Touvron et al. 2023 (arXiv 2302.13971), with grouped-query attention (Ainslie et al. 2023, arXiv
2305.13245), sliding windows (Mistral), biases (Qwen2) and norms on queries and keys (Qwen3).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float32

from l2s_jax.models.causal import CausalModel
from l2s_jax.models.causal_layers import CausalAttention, CausalLayer
from l2s_jax.models.family import FamilyConfig
from l2s_jax.models.layers import Dropout, Embedding, Linear, RMSNorm
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.sizes import check_sizes
from l2s_jax.models.stacking import make_layers
from l2s_jax.models.vocabulary import response_size


@dataclasses.dataclass(frozen=True)
class LlamaConfig(FamilyConfig):
    """Geometry of a Llama-style model; defaults are those of Llama 2 7B."""

    vocab_size: int = 32000
    width: int = 4096
    num_heads: int = 32
    num_kv_heads: int = 32
    head_width: int = 128
    feed_forward_width: int = 11008
    num_layers: int = 32
    rotary: Rotary = Rotary(128)
    attention_input_bias: bool = False
    attention_output_bias: bool = False
    feed_forward_bias: bool = False
    query_key_norm: bool = False
    sliding_window: int = 0  # positions that a windowed layer sees; 0: no layer is windowed
    # Of each layer, where sliding_window is set: "s" windowed, "f" not; "" stands for all "s".
    window_pattern: str = ""
    tied_head: bool = False
    norm_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    pad_id: int = 0
    eos_id: int = 2
    # Tokens at once that a checkpoint was trained on, by its config.json; 0: it doesn't say.
    # Nothing here depends on it, but other programs take an exported model's limit from it.
    trained_positions: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.num_heads} heads: expected a multiple of the {self.num_kv_heads} "
                "key/value heads"
            )
        if self.rotary.width != self.head_width:
            raise ValueError(
                f"rotary width {self.rotary.width}: expected the head width {self.head_width}"
            )
        if self.sliding_window < 0:
            raise ValueError(
                f"sliding_window {self.sliding_window}: expected a number of positions, or 0 for "
                "none"
            )
        if set(self.window_pattern) - set("sf") or (
            self.window_pattern and len(self.window_pattern) != self.num_layers
        ):
            raise ValueError(
                f"window_pattern {self.window_pattern!r}: expected one of 's' and 'f' for each of "
                f"{self.num_layers} layers"
            )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """How many positions back, itself included, each layer sees; None: all."""
        if not self.sliding_window:
            return (None,) * self.num_layers
        pattern = self.window_pattern or "s" * self.num_layers
        return tuple(self.sliding_window if kind == "s" else None for kind in pattern)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.wi_gate = Linear(c.feed_forward_width, normal, c.dtype, use_bias=c.feed_forward_bias)
        self.wi = Linear(c.feed_forward_width, normal, c.dtype, use_bias=c.feed_forward_bias)
        self.wo = Linear(c.width, normal, c.dtype, jnp.float32, use_bias=c.feed_forward_bias)

    def __call__(self, x: Float32[Array, "B T D"]) -> Float32[Array, "B T D"]:
        return self.wo(nn.silu(self.wi_gate(x)) * self.wi(x))


class Layer(CausalLayer):
    """Attention and feed-forward, each with a norm before and a residual around it."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.attention_norm = RMSNorm(c.norm_epsilon)
        self.attention = CausalAttention(
            width=c.width,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            head_width=c.head_width,
            initializer=normal,
            output_initializer=normal,
            rotary=c.rotary,
            input_bias=c.attention_input_bias,
            output_bias=c.attention_output_bias,
            norm_epsilon=c.norm_epsilon if c.query_key_norm else None,
            dropout_rate=c.dropout_rate,
            dtype=c.dtype,
        )
        self.feed_forward_norm = RMSNorm(c.norm_epsilon)
        self.feed_forward = FeedForward(c)
        self.dropout = Dropout(c.dropout_rate)


class Llama(CausalModel):
    """The whole model; see `CausalModel`."""

    config: LlamaConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embedding = Embedding(c.vocab_size, c.width, normal, c.dtype)
        if c.vocabulary:
            self.response_embedding = Embedding(response_size(c), c.width, normal, c.dtype)
        self.embedding_dropout = Dropout(c.dropout_rate)
        self.layers = make_layers(lambda: Layer(c), c, c.num_layers)
        self.final_norm = RMSNorm(c.norm_epsilon)
        if not c.tied_head:
            self.head = Linear(response_size(c), normal, c.dtype, jnp.float32)
