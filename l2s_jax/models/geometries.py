"""Published geometries, for measuring and planning without the weights.

Sources: the config.json files of the models of the same names on huggingface.co; llama-3-70b is
meta-llama/Meta-Llama-3-70B, which has the shape of Meta-Llama-3-70B-Instruct.
"""

from __future__ import annotations

from typing import Any

from l2s_jax.models.families import ModelConfig
from l2s_jax.models.gpt2 import GPT2Config
from l2s_jax.models.gpt_neox import GPTNeoXConfig
from l2s_jax.models.llama import LlamaConfig
from l2s_jax.models.rotary import Rotary
from l2s_jax.models.t5 import T5Config

_FLAN = {"activation": "gated_gelu", "tied_head": False}


def _t5(width: int, heads: int, hidden: int, layers: int, **others: Any) -> T5Config:
    return T5Config(
        width=width,
        num_heads=heads,
        head_width=64,
        feed_forward_width=hidden,
        num_encoder_layers=layers,
        num_decoder_layers=layers,
        **others,
    )


GEOMETRIES: dict[str, ModelConfig] = {
    "tiny": _t5(64, 2, 128, 2),
    "t5-small": _t5(512, 8, 2048, 6),
    "t5-base": _t5(768, 12, 3072, 12),
    "t5-large": _t5(1024, 16, 4096, 24),
    "flan-t5-small": _t5(512, 6, 1024, 8, **_FLAN),
    "flan-t5-base": _t5(768, 12, 2048, 12, **_FLAN),
    "flan-t5-large": _t5(1024, 16, 2816, 24, **_FLAN),
    "flan-t5-xl": _t5(2048, 32, 5120, 24, **_FLAN),
    "flan-t5-xxl": _t5(4096, 64, 10240, 24, **_FLAN),
    "mt5-small": _t5(512, 6, 1024, 8, vocab_size=250112, **_FLAN),
    "gpt2": GPT2Config(),
    "pythia-160m": GPTNeoXConfig(
        vocab_size=50304,
        width=768,
        num_heads=12,
        feed_forward_width=3072,
        num_layers=12,
        rotary=Rotary(16),
    ),
    "smollm2-135m": LlamaConfig(
        vocab_size=49152,
        width=576,
        num_heads=9,
        num_kv_heads=3,
        head_width=64,
        feed_forward_width=1536,
        num_layers=30,
        rotary=Rotary(64, 1e5),
        tied_head=True,
    ),
    "qwen3-0.6b": LlamaConfig(
        vocab_size=151936,
        width=1024,
        num_heads=16,
        num_kv_heads=8,
        head_width=128,
        feed_forward_width=3072,
        num_layers=28,
        rotary=Rotary(128, 1e6),
        query_key_norm=True,
        tied_head=True,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151936,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        feed_forward_width=12288,
        num_layers=36,
        rotary=Rotary(128, 1e6),
        query_key_norm=True,
    ),
    "llama-3-8b": LlamaConfig(
        vocab_size=128256,
        width=4096,
        num_heads=32,
        num_kv_heads=8,
        head_width=128,
        feed_forward_width=14336,
        num_layers=32,
        rotary=Rotary(128, 5e5),
    ),
    "llama-3-70b": LlamaConfig(
        vocab_size=128256,
        width=8192,
        num_heads=64,
        num_kv_heads=8,
        head_width=128,
        feed_forward_width=28672,
        num_layers=80,
        rotary=Rotary(128, 5e5),
    ),
}
GEOMETRIES["llama-3-70b-instruct"] = GEOMETRIES["llama-3-70b"]
