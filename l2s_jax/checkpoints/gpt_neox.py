"""GPT-NeoX and Pythia: Hugging Face's names and config.json <-> ours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from l2s_jax.checkpoints.engine import SAME, TRANSPOSED, Family, Rule, Transform, first_layers
from l2s_jax.checkpoints.fields import (
    read_flag,
    read_fraction,
    read_integer,
    read_token,
    read_trained_positions,
    refuse_unsupported,
)
from l2s_jax.checkpoints.rope import read_rotary, write_rotary
from l2s_jax.messages import shown
from l2s_jax.models.gpt_neox import GPTNeoX, GPTNeoXConfig

ACTIVATION_OF = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}
NEUTRAL = {
    "is_causal": (True, None),
    "is_decoder": (False, True, None),
    "quantization_config": (None,),
}


def _split_heads(num_heads: int) -> tuple[Transform, Transform]:
    """(kernel, bias): rows go head by head, each with its query, key and value."""

    def apart(x: np.ndarray) -> np.ndarray:
        by_head = x.reshape(num_heads, 3, -1, *x.shape[1:])
        return np.moveaxis(by_head, 1, 0).reshape(3, -1, *x.shape[1:])

    def together(*parts: np.ndarray) -> np.ndarray:
        stacked = np.stack(parts).reshape(3, num_heads, -1, *parts[0].shape[1:])
        return np.moveaxis(stacked, 0, 1).reshape(-1, *parts[0].shape[1:])

    kernel = Transform(
        lambda x: tuple(part.T for part in apart(x)),
        lambda *parts: together(*(part.T for part in parts)),
    )
    return kernel, Transform(lambda x: tuple(apart(x)), together)


def make_rules(config: GPTNeoXConfig) -> Sequence[Rule]:
    """The table for one config."""
    key, path = "gpt_neox.layers.{layer}", "layers_{layer}"
    rules = [
        Rule("gpt_neox.embed_in.weight", ("token_embedding/embedding",)),
        Rule("gpt_neox.final_layer_norm.weight", ("final_norm/scale",)),
        Rule("gpt_neox.final_layer_norm.bias", ("final_norm/bias",)),
    ]
    norms = {"input_layernorm": "attention_norm", "post_attention_layernorm": "feed_forward_norm"}
    for theirs, ours in norms.items():
        rules.append(Rule(f"{key}.{theirs}.weight", (f"{path}/{ours}/scale",)))
        rules.append(Rule(f"{key}.{theirs}.bias", (f"{path}/{ours}/bias",)))
    kernel, bias = _split_heads(config.num_heads)
    kinds = [("weight", "kernel", kernel, TRANSPOSED), ("bias", "bias", bias, SAME)]
    for theirs, ours, split, plain in kinds:
        if ours == "kernel" or config.attention_bias:
            inward = tuple(f"{path}/attention/{name}/{ours}" for name in ("query", "key", "value"))
            rules += [
                Rule(f"{key}.attention.query_key_value.{theirs}", inward, split),
                Rule(
                    f"{key}.attention.dense.{theirs}", (f"{path}/attention/output/{ours}",), plain
                ),
            ]
        rules += [
            Rule(f"{key}.mlp.dense_h_to_4h.{theirs}", (f"{path}/feed_forward/wi/{ours}",), plain),
            Rule(f"{key}.mlp.dense_4h_to_h.{theirs}", (f"{path}/feed_forward/wo/{ours}",), plain),
        ]
    if config.tied_head:
        rules[0] = Rule(
            "gpt_neox.embed_in.weight",
            ("token_embedding/embedding",),
            aliases=("embed_out.weight",),
        )
    else:
        rules.append(Rule("embed_out.weight", ("head/kernel",), TRANSPOSED))
    return rules


def config_from_hf(fields: Mapping[str, Any], keys: frozenset[str], source: str) -> GPTNeoXConfig:
    """config.json -> GPTNeoXConfig."""
    refuse_unsupported(fields, NEUTRAL, source)
    activation = fields.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATION_OF:
        raise ValueError(
            f"{source}: hidden_act is {shown(activation)}, expected one of {list(ACTIVATION_OF)}"
        )
    width = read_integer(fields, "hidden_size", 6144, source)
    num_heads = read_integer(fields, "num_attention_heads", 64, source)
    vocab_size = read_integer(fields, "vocab_size", 50432, source)
    eos_id = read_token(fields, "eos_token_id", 2, vocab_size, source)
    return GPTNeoXConfig(
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        feed_forward_width=read_integer(fields, "intermediate_size", 24576, source),
        num_layers=read_integer(fields, "num_hidden_layers", 44, source),
        rotary=read_rotary(
            fields,
            width // num_heads,
            source,
            theta_field="rotary_emb_base",
            share_field="rotary_pct",
            default_share=0.25,
        ),
        parallel_residual=read_flag(fields, "use_parallel_residual", True, source),
        attention_bias=read_flag(fields, "attention_bias", True, source),
        activation=ACTIVATION_OF[activation],
        tied_head=read_flag(fields, "tie_word_embeddings", False, source),
        norm_epsilon=read_fraction(fields, "layer_norm_eps", 1e-5, source),
        dropout_rate=read_fraction(fields, "hidden_dropout", 0.0, source),
        pad_id=read_token(fields, "pad_token_id", eos_id, vocab_size, source),
        eos_id=eos_id,
        trained_positions=read_trained_positions(fields, source),
    )


def _share(width: int, head_width: int) -> float:
    """The share of a head that readers, who multiply and round down, turn into `width` again."""
    share = width / head_width
    return share if int(head_width * share) == width else math.nextafter(share, 1)


def config_to_hf(config: GPTNeoXConfig) -> dict[str, Any]:
    """GPTNeoXConfig -> config.json of a GPTNeoXForCausalLM."""
    theirs = {ours: name for name, ours in reversed(ACTIVATION_OF.items())}
    share = _share(config.rotary.width, config.width // config.num_heads)
    fields = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.feed_forward_width,
        "hidden_act": theirs[config.activation],
        "rotary_pct": share,
        "rotary_emb_base": config.rotary.base,
        "rope_parameters": {**write_rotary(config.rotary), "partial_rotary_factor": share},
        "use_parallel_residual": config.parallel_residual,
        "attention_bias": config.attention_bias,
        "attention_dropout": config.dropout_rate,
        "hidden_dropout": config.dropout_rate,
        "layer_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "bos_token_id": config.eos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    if config.trained_positions:
        fields["max_position_embeddings"] = config.trained_positions
    return fields


FAMILY = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    config_class=GPTNeoXConfig,
    make_module=GPTNeoX,
    inputs=("ids", "mask"),
    make_rules=make_rules,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    # Causal masks and frequencies, stored by older versions.
    ignored_keys=(
        "gpt_neox.layers.{layer}.attention.bias",
        "gpt_neox.layers.{layer}.attention.masked_bias",
        "gpt_neox.layers.{layer}.attention.rotary_emb.inv_freq",
    ),
    body="gpt_neox.",
    encoder_parameters=first_layers("token_embedding/"),
)
