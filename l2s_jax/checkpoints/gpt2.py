"""GPT-2: Hugging Face's names and config.json <-> ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.checkpoints.engine import SAME, TRANSPOSED, Family, Rule, Transform, first_layers
from l2s_jax.checkpoints.fields import (
    read_flag,
    read_fraction,
    read_integer,
    read_token,
    refuse_unsupported,
)
from l2s_jax.messages import shown
from l2s_jax.models.gpt2 import GPT2, GPT2Config

ACTIVATION_OF = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
}
NEUTRAL = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "add_cross_attention": (False, None),
    "is_causal": (True, None),
    "quantization_config": (None,),
}
# Other names of the same fields; transformers lets them win where a file has both.
ALIAS_OF = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
# Queries, keys and values are the three parts of one tensor's last axis. The Conv1D that holds them
# stores [in, out], as we do.
SPLIT = Transform(
    lambda x: tuple(np.split(x, 3, axis=-1)), lambda *parts: np.concatenate(parts, axis=-1)
)


def make_rules(config: GPT2Config) -> Sequence[Rule]:
    """The table for one config."""
    body: list[tuple[str, tuple[str, ...], Transform]] = [
        ("wte.weight", ("token_embedding/embedding",), SAME),
        ("wpe.weight", ("position_embedding/embedding",), SAME),
        ("ln_f.weight", ("final_norm/scale",), SAME),
        ("ln_f.bias", ("final_norm/bias",), SAME),
    ]
    key, path = "h.{layer}", "layers_{layer}"
    for theirs, ours in (("ln_1", "attention_norm"), ("ln_2", "feed_forward_norm")):
        body.append((f"{key}.{theirs}.weight", (f"{path}/{ours}/scale",), SAME))
        body.append((f"{key}.{theirs}.bias", (f"{path}/{ours}/bias",), SAME))
    for theirs, ours in (("weight", "kernel"), ("bias", "bias")):
        attention = tuple(f"{path}/attention/{name}/{ours}" for name in ("query", "key", "value"))
        body.append((f"{key}.attn.c_attn.{theirs}", attention, SPLIT))
        body.append((f"{key}.attn.c_proj.{theirs}", (f"{path}/attention/output/{ours}",), SAME))
        body.append((f"{key}.mlp.c_fc.{theirs}", (f"{path}/feed_forward/wi/{ours}",), SAME))
        body.append((f"{key}.mlp.c_proj.{theirs}", (f"{path}/feed_forward/wo/{ours}",), SAME))
    rules = []
    for name, parameters, transform in body:
        aliases = ("lm_head.weight",) if name == "wte.weight" and config.tied_head else ()
        rules.append(Rule(f"transformer.{name}", parameters, transform, aliases))
    if not config.tied_head:
        rules.append(Rule("lm_head.weight", ("head/kernel",), TRANSPOSED))
    return rules


def config_from_hf(fields: Mapping[str, Any], keys: frozenset[str], source: str) -> GPT2Config:
    """config.json -> GPT2Config."""
    refuse_unsupported(fields, NEUTRAL, source)
    activation = fields.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in ACTIVATION_OF:
        raise ValueError(
            f"{source}: activation_function is {shown(activation)}, expected one of "
            f"{list(ACTIVATION_OF)}"
        )
    named = {name: fields[alias] for name, alias in ALIAS_OF.items() if alias in fields}
    fields = {**fields, **named}
    width = read_integer(fields, "n_embd", 768, source)
    if fields.get("n_inner") is None:
        fields = {**fields, "n_inner": 4 * width}
    vocab_size = read_integer(fields, "vocab_size", 50257, source)
    eos_id = read_token(fields, "eos_token_id", min(50256, vocab_size - 1), vocab_size, source)
    return GPT2Config(
        vocab_size=vocab_size,
        width=width,
        num_heads=read_integer(fields, "n_head", 12, source),
        feed_forward_width=read_integer(fields, "n_inner", None, source),
        num_layers=read_integer(fields, "n_layer", 12, source),
        max_positions=read_integer(fields, "n_positions", 1024, source),
        activation=ACTIVATION_OF[activation],
        tied_head=read_flag(fields, "tie_word_embeddings", True, source),
        norm_epsilon=read_fraction(fields, "layer_norm_epsilon", 1e-5, source),
        dropout_rate=read_fraction(fields, "resid_pdrop", 0.1, source),
        pad_id=read_token(fields, "pad_token_id", eos_id, vocab_size, source),
        eos_id=eos_id,
    )


def config_to_hf(config: GPT2Config) -> dict[str, Any]:
    """GPT2Config -> config.json of a GPT2LMHeadModel."""
    theirs = {ours: name for name, ours in reversed(ACTIVATION_OF.items())}
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_positions,
        "n_embd": config.width,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.feed_forward_width,
        "activation_function": theirs[config.activation],
        "layer_norm_epsilon": config.norm_epsilon,
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate,
        "attn_pdrop": config.dropout_rate,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.eos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    config_class=GPT2Config,
    make_module=GPT2,
    inputs=("ids", "mask"),
    make_rules=make_rules,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    # Causal masks, stored by older versions.
    ignored_keys=(
        "transformer.h.{layer}.attn.bias",
        "transformer.h.{layer}.attn.masked_bias",
    ),
    body="transformer.",  # left out by the first releases' files too
    encoder_parameters=first_layers("token_embedding/", "position_embedding/"),
)
