"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745) and Pythia. Letters as in layers.py."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from flax import linen as nn

from l2s_jax.models.causal import CausalModel
from l2s_jax.models.causal_layers import CausalAttention, CausalLayer, FeedForward, SeesAll
from l2s_jax.models.family import FamilyConfig
from l2s_jax.models.layers import ACTIVATIONS, Dropout, Embedding, LayerNorm, Linear
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.sizes import check_sizes
from l2s_jax.models.stacking import make_layers
from l2s_jax.models.vocabulary import response_size


@dataclasses.dataclass(frozen=True)
class GPTNeoXConfig(SeesAll, FamilyConfig):
    """Geometry of a GPT-NeoX model; defaults are those of Pythia-160M."""

    vocab_size: int = 50304
    width: int = 768
    num_heads: int = 12
    feed_forward_width: int = 3072
    num_layers: int = 12
    rotary: Rotary = Rotary(16)  # its width is the share of each head that turns
    parallel_residual: bool = True  # attention and feed-forward read the same state
    attention_bias: bool = True
    activation: str = "gelu"  # a key of layers.ACTIVATIONS
    tied_head: bool = False
    norm_epsilon: float = 1e-5
    dropout_rate: float = 0.0
    pad_id: int = 0
    eos_id: int = 0
    # Tokens at once that a checkpoint was trained on, by its config.json; 0: it doesn't say.
    # Nothing here depends on it, but other programs take an exported model's limit from it.
    trained_positions: int = 0

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width}: expected a multiple of {self.num_heads} heads")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"GPT-NeoX activation {self.activation!r}: expected one of {sorted(ACTIVATIONS)}"
            )
        if self.rotary.width > self.width // self.num_heads:
            raise ValueError(
                f"rotary width {self.rotary.width}: expected at most the head width "
                f"{self.width // self.num_heads}"
            )


class Layer(CausalLayer):
    """Attention and feed-forward, side by side or one after the other."""

    config: GPTNeoXConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.attention_norm = LayerNorm(c.norm_epsilon)
        self.attention = CausalAttention(
            width=c.width,
            num_heads=c.num_heads,
            num_kv_heads=c.num_heads,
            head_width=c.width // c.num_heads,
            initializer=normal,
            output_initializer=normal,
            rotary=c.rotary,
            input_bias=c.attention_bias,
            output_bias=c.attention_bias,
            dropout_rate=c.dropout_rate,
            dtype=c.dtype,
        )
        self.feed_forward_norm = LayerNorm(c.norm_epsilon)
        self.feed_forward = FeedForward(c, normal)
        self.dropout = Dropout(c.dropout_rate)

    @property
    def is_parallel(self) -> bool:
        """As the config says."""
        return self.config.parallel_residual


class GPTNeoX(CausalModel):
    """The whole model; see `CausalModel`."""

    config: GPTNeoXConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(0.02)
        self.token_embedding = Embedding(c.vocab_size, c.width, normal, c.dtype)
        if c.vocabulary:
            self.response_embedding = Embedding(response_size(c), c.width, normal, c.dtype)
        self.embedding_dropout = Dropout(c.dropout_rate)
        self.layers = make_layers(lambda: Layer(c), c, c.num_layers)
        self.final_norm = LayerNorm(c.norm_epsilon)
        if not c.tied_head:
            self.head = Linear(response_size(c), normal, c.dtype, jnp.float32)
