"""Llama, Mistral, Qwen2 and Qwen3: Hugging Face's names and config.json <-> ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.checkpoints.engine import SAME, TRANSPOSED, Family, Rule, first_layers
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
from l2s_jax.models.llama import Llama, LlamaConfig

# transformers' defaults for what a config.json leaves out, where the kinds differ or ours do.
DEFAULTS = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008},
    "mistral": {"vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32},
    "qwen3": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "head_dim": 128,
    },
}
NEUTRAL = {
    "hidden_act": ("silu",),
    "is_causal": (True, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
}


def make_rules(config: LlamaConfig) -> Sequence[Rule]:
    """The table for one config."""
    key, path = "model.layers.{layer}", "layers_{layer}"
    embedding = ("token_embedding/embedding",)
    aliases = ("lm_head.weight",) if config.tied_head else ()
    rules = [
        Rule("model.embed_tokens.weight", embedding, aliases=aliases),
        Rule("model.norm.weight", ("final_norm/scale",)),
        Rule(f"{key}.input_layernorm.weight", (f"{path}/attention_norm/scale",)),
        Rule(f"{key}.post_attention_layernorm.weight", (f"{path}/feed_forward_norm/scale",)),
    ]
    inner = {
        "self_attn.q_proj": ("attention/query", config.attention_input_bias),
        "self_attn.k_proj": ("attention/key", config.attention_input_bias),
        "self_attn.v_proj": ("attention/value", config.attention_input_bias),
        "self_attn.o_proj": ("attention/output", config.attention_output_bias),
        "mlp.gate_proj": ("feed_forward/wi_gate", config.feed_forward_bias),
        "mlp.up_proj": ("feed_forward/wi", config.feed_forward_bias),
        "mlp.down_proj": ("feed_forward/wo", config.feed_forward_bias),
    }
    for theirs, (ours, bias) in inner.items():
        rules.append(Rule(f"{key}.{theirs}.weight", (f"{path}/{ours}/kernel",), TRANSPOSED))
        if bias:
            rules.append(Rule(f"{key}.{theirs}.bias", (f"{path}/{ours}/bias",), SAME))
    if config.query_key_norm:
        rules += [
            Rule(f"{key}.self_attn.q_norm.weight", (f"{path}/attention/query_norm/scale",)),
            Rule(f"{key}.self_attn.k_norm.weight", (f"{path}/attention/key_norm/scale",)),
        ]
    if not config.tied_head:
        rules.append(Rule("lm_head.weight", ("head/kernel",), TRANSPOSED))
    return rules


def config_from_hf(fields: Mapping[str, Any], keys: frozenset[str], source: str) -> LlamaConfig:
    """config.json -> LlamaConfig.

    A model has one eos_id: of several eos_token_ids the first is taken and the others, such as the
    end of a chat turn, are not kept. Without a pad_token_id padding is the eos token.
    """
    refuse_unsupported(fields, NEUTRAL, source)
    kind = fields["model_type"]
    fields = DEFAULTS[kind] | dict(fields)
    width = read_integer(fields, "hidden_size", 4096, source)
    num_layers = read_integer(fields, "num_hidden_layers", 32, source)
    num_heads = read_integer(fields, "num_attention_heads", 32, source)
    for name, default in (("num_key_value_heads", num_heads), ("head_dim", width // num_heads)):
        if fields.get(name) is None:
            fields[name] = default
    head_width = read_integer(fields, "head_dim", None, source)
    vocab_size = read_integer(fields, "vocab_size", None, source)
    eos_id = read_token(
        fields, "eos_token_id", 2 if kind in ("llama", "mistral") else 0, vocab_size, source
    )
    bias = kind == "qwen2" or (
        kind != "mistral" and read_flag(fields, "attention_bias", False, source)
    )
    window, pattern = _windows(fields, kind, num_layers, source)
    return LlamaConfig(
        vocab_size=vocab_size,
        width=width,
        num_heads=num_heads,
        num_kv_heads=read_integer(fields, "num_key_value_heads", None, source),
        head_width=head_width,
        feed_forward_width=read_integer(fields, "intermediate_size", None, source),
        num_layers=num_layers,
        rotary=read_rotary(fields, head_width, source),
        attention_input_bias=bias,
        attention_output_bias=bias and kind != "qwen2",
        feed_forward_bias=kind == "llama" and read_flag(fields, "mlp_bias", False, source),
        query_key_norm=kind == "qwen3",
        sliding_window=window,
        window_pattern=pattern,
        tied_head=read_flag(fields, "tie_word_embeddings", False, source),
        norm_epsilon=read_fraction(fields, "rms_norm_eps", 1e-6, source),
        dropout_rate=read_fraction(fields, "attention_dropout", 0.0, source),
        pad_id=read_token(fields, "pad_token_id", eos_id, vocab_size, source),
        eos_id=eos_id,
        trained_positions=read_trained_positions(fields, source),
    )


def _windows(fields: Mapping[str, Any], kind: str, num_layers: int, source: str) -> tuple[int, str]:
    """(sliding_window, window_pattern) as in LlamaConfig."""
    if kind == "llama":
        return 0, ""
    if kind == "mistral":
        if fields.get("layer_types") is not None:
            raise ValueError(f"{source}: layer_types of a mistral, which is not supported")
        window = fields.get("sliding_window", 4096)
        none = window is None or (type(window) is int and window == 0)
        return (0 if none else read_integer(fields, "sliding_window", 4096, source)), ""
    used = read_flag(fields, "use_sliding_window", False, source)
    if not used or fields.get("sliding_window", 4096) is None:
        return 0, ""
    first = read_integer(fields, "max_window_layers", 28, source, 0)
    pattern = "".join("s" if i >= first else "f" for i in range(num_layers))
    names = {"sliding_attention": "s", "full_attention": "f"}
    if fields.get("layer_types") is not None:
        given = fields["layer_types"]
        if not isinstance(given, list) or any(name not in list(names) for name in given):
            raise ValueError(
                f"{source}: layer_types is {shown(given)}, expected {sorted(names)} only"
            )
        pattern = "".join(names[name] for name in given)
        if len(pattern) != num_layers:
            raise ValueError(
                f"{source}: layer_types has {len(pattern)} entries, expected {num_layers}"
            )
    if "s" not in pattern:
        return 0, ""
    return read_integer(fields, "sliding_window", 4096, source), pattern


def _kind(config: LlamaConfig) -> str:
    """The model_type that can say what a config needs."""
    wants = (
        config.query_key_norm,
        bool(config.sliding_window),
        config.attention_input_bias,
        config.attention_output_bias,
        config.feed_forward_bias,
    )
    if not any(wants[:2]) and wants[2] == wants[3]:
        return "llama"
    if wants[0] and wants[2] == wants[3] and not wants[4]:
        return "qwen3"
    if wants[2:] == (True, False, False) and not wants[0]:
        return "qwen2"
    if wants == (False, True, False, False, False) and "f" not in config.window_pattern:
        return "mistral"
    raise ValueError(
        "no model_type of transformers has this model's mix of windows, biases and norms"
    )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """LlamaConfig -> config.json of a Llama, Mistral, Qwen2 or Qwen3 ForCausalLM."""
    kind = _kind(config)
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[kind]
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.feed_forward_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
        "attention_dropout": config.dropout_rate,
        "rope_theta": config.rotary.base,
        "rope_parameters": write_rotary(config.rotary),
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    if config.rotary.kind != "default":
        fields["rope_scaling"] = write_rotary(config.rotary)
    if config.trained_positions:
        fields["max_position_embeddings"] = config.trained_positions
    if kind in ("llama", "qwen3"):
        fields["attention_bias"] = config.attention_input_bias
    if kind == "llama":
        fields["mlp_bias"] = config.feed_forward_bias
    if kind == "mistral":
        fields["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3"):
        windowed = [window is not None for window in config.windows]
        names = ["sliding_attention" if one else "full_attention" for one in windowed]
        fields["use_sliding_window"] = any(windowed)
        fields["sliding_window"] = config.sliding_window or None
        fields["layer_types"] = names
    return fields


FAMILY = Family(
    name="llama",
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    config_class=LlamaConfig,
    make_module=Llama,
    inputs=("ids", "mask"),
    make_rules=make_rules,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    ignored_keys=("model.layers.{layer}.self_attn.rotary_emb.inv_freq",),
    body="model.",
    encoder_parameters=first_layers("token_embedding/"),
)
