"""T5, Flan-T5 and mT5: Hugging Face's names and config.json <-> ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.checkpoints.engine import TRANSPOSED, Family, Rule
from l2s_jax.checkpoints.fields import (
    read_flag,
    read_fraction,
    read_integer,
    read_token,
    refuse_unsupported,
)
from l2s_jax.messages import shown
from l2s_jax.models.t5 import T5, T5Config

ACTIVATION_OF = {"relu": "relu", "gated-gelu": "gated_gelu", "gated-silu": "gated_silu"}
PROJECTION_OF = {ours: theirs for theirs, ours in ACTIVATION_OF.items()}
# What transformers 4 and 5 write beside feed_forward_proj, and what it must then say.
DENSE_ACTIVATION_OF = {"relu": "relu", "gated-gelu": "gelu_new", "gated-silu": "silu"}

# transformers' defaults for what a config.json leaves out.
DEFAULTS = {
    "t5": {
        "vocab_size": 32128,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "feed_forward_proj": "relu",
    },
    "mt5": {
        "vocab_size": 250112,
        "d_ff": 1024,
        "num_layers": 8,
        "num_heads": 6,
        "feed_forward_proj": "gated-gelu",
    },
}

# Options that would change the computation, and the values under which they do not.
NEUTRAL = {
    "tie_encoder_decoder": (False, None),
    "scalable_attention": (False, None),
    "quantization_config": (None,),
    "is_decoder": (False, None),
}


def _side(side: str, number: int, attention: str, ours: str) -> list[Rule]:
    """Rules of one attention with its norm, at `number` in the layer of the side."""
    key, path = f"{side}.block.{{layer}}.layer.{number}", f"{side}/layers_{{layer}}"
    names = {"q": "query", "k": "key", "v": "value", "o": "output"}
    rules = [
        Rule(f"{key}.{attention}.{q}.weight", (f"{path}/{ours}/{query}/kernel",), TRANSPOSED)
        for q, query in names.items()
    ]
    return [*rules, Rule(f"{key}.layer_norm.weight", (f"{path}/{ours}_norm/scale",))]


def _feed_forward(side: str, number: int, gated: bool) -> list[Rule]:
    key, path = f"{side}.block.{{layer}}.layer.{number}", f"{side}/layers_{{layer}}/feed_forward"
    names = {"wi_0": "wi_gate", "wi_1": "wi", "wo": "wo"} if gated else {"wi": "wi", "wo": "wo"}
    rules = [
        Rule(f"{key}.DenseReluDense.{theirs}.weight", (f"{path}/{ours}/kernel",), TRANSPOSED)
        for theirs, ours in names.items()
    ]
    return [*rules, Rule(f"{key}.layer_norm.weight", (f"{path}_norm/scale",))]


def make_rules(config: T5Config) -> Sequence[Rule]:
    """The table for one config."""
    gated = config.activation.startswith("gated")
    same = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    head = ("lm_head.weight",)
    rules = [
        Rule(
            "shared.weight",
            ("token_embedding/embedding",),
            aliases=same + head if config.tied_head else same,
        ),
        *_side("encoder", 0, "SelfAttention", "attention"),
        *_feed_forward("encoder", 1, gated),
        *_side("decoder", 0, "SelfAttention", "attention"),
        *_side("decoder", 1, "EncDecAttention", "cross_attention"),
        *_feed_forward("decoder", 2, gated),
    ]
    for side in ("encoder", "decoder"):
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        rules.append(Rule(bias, (f"{side}/relative_bias/embedding",)))
        rules.append(Rule(f"{side}.final_layer_norm.weight", (f"{side}/final_norm/scale",)))
    if not config.tied_head:
        rules.append(Rule(*head, ("head/kernel",), TRANSPOSED))
    return rules


def _head(fields: Mapping[str, Any], keys: frozenset[str], source: str) -> tuple[bool, bool]:
    """(tied_head, scaled_head), by the rules of transformers 5, to which 4's agree but for one.

    T5's logits are scaled unless tie_word_embeddings is false (scale_decoder_outputs, where
    written, says so itself); mT5's never are. An unscaled head is its own matrix if the file holds
    one, else the embedding.
    """
    scaled = fields.get("scale_decoder_outputs")
    if scaled is None:
        tied = fields.get("tie_word_embeddings")
        if tied is not None:
            tied = read_flag(fields, "tie_word_embeddings", True, source)
        scaled = fields["model_type"] == "t5" and tied is not False
        by_version_4 = str(fields.get("transformers_version", "5")).startswith("4.")
        if fields["model_type"] == "mt5" and tied and by_version_4 and "lm_head.weight" not in keys:
            raise ValueError(
                f"{source}: an mt5 with tied embeddings, whose logits transformers 4 scales and 5 "
                "does not; set scale_decoder_outputs to true or false"
            )
    if type(scaled) is not bool:
        raise ValueError(
            f"{source}: scale_decoder_outputs is {shown(scaled)}, expected true or false"
        )
    tied_head = scaled or "lm_head.weight" not in keys
    return tied_head, scaled or not tied_head


def config_from_hf(fields: Mapping[str, Any], keys: frozenset[str], source: str) -> T5Config:
    """config.json -> T5Config. `keys` are the tensors' names; `source` is named in errors."""
    defaults = DEFAULTS[fields["model_type"]]
    refuse_unsupported(fields, NEUTRAL, source)
    projection = fields.get("feed_forward_proj", defaults["feed_forward_proj"])
    if not isinstance(projection, str) or projection not in ACTIVATION_OF:
        raise ValueError(
            f"{source}: feed_forward_proj is {shown(projection)}, expected one of "
            f"{list(ACTIVATION_OF)}"
        )
    implied = {
        "is_gated_act": projection.startswith("gated"),
        "dense_act_fn": DENSE_ACTIVATION_OF[projection],
    }
    for name, value in implied.items():
        if fields.get(name, value) != value:
            raise ValueError(
                f"{source}: {name} is {shown(fields[name])}, expected {value!r} beside "
                f"feed_forward_proj {projection!r}"
            )

    def number(name: str, default: Any = None, low: int = 1) -> int:
        return read_integer(fields, name, defaults.get(name, default), source, low)

    def token(name: str, default: int) -> int:
        # Unlike a decoder-only model's, a T5's tokens have one meaning each and no stand-ins.
        given = fields.get(name, default)
        if given is None or (isinstance(given, list) and len(given) != 1):
            raise ValueError(f"{source}: {name} is {shown(given)}, expected an integer >= 0")
        return read_token(fields, name, default, vocab_size, source)

    vocab_size = number("vocab_size")
    num_layers = number("num_layers")
    if fields.get("num_decoder_layers") is None:
        fields = {**fields, "num_decoder_layers": num_layers}
    if fields.get("decoder_start_token_id") is None:
        fields = {**fields, "decoder_start_token_id": fields.get("pad_token_id", 0)}
    num_buckets = number("relative_attention_num_buckets", 32, 4)
    tied_head, scaled_head = _head(fields, keys, source)
    return T5Config(
        vocab_size=vocab_size,
        width=number("d_model", 512),
        num_heads=number("num_heads"),
        head_width=number("d_kv", 64),
        feed_forward_width=number("d_ff"),
        num_encoder_layers=num_layers,
        num_decoder_layers=number("num_decoder_layers"),
        activation=ACTIVATION_OF[projection],
        tied_head=tied_head,
        scaled_head=scaled_head,
        num_buckets=num_buckets,
        max_distance=number("relative_attention_max_distance", 128, num_buckets // 2 + 1),
        norm_epsilon=read_fraction(fields, "layer_norm_epsilon", 1e-6, source),
        dropout_rate=read_fraction(fields, "dropout_rate", 0.1, source),
        pad_id=token("pad_token_id", 0),
        eos_id=token("eos_token_id", 1),
        decoder_start_id=token("decoder_start_token_id", 0),
    )


def config_to_hf(config: T5Config) -> dict[str, Any]:
    """T5Config -> config.json of a T5ForConditionalGeneration (of any mT5 as well)."""
    projection = PROJECTION_OF[config.activation]
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "is_encoder_decoder": True,
        "vocab_size": config.vocab_size,
        "d_model": config.width,
        "num_heads": config.num_heads,
        "d_kv": config.head_width,
        "d_ff": config.feed_forward_width,
        "num_layers": config.num_encoder_layers,
        "num_decoder_layers": config.num_decoder_layers,
        "feed_forward_proj": projection,
        "is_gated_act": projection.startswith("gated"),
        "dense_act_fn": DENSE_ACTIVATION_OF[projection],
        "tie_word_embeddings": config.tied_head,
        "scale_decoder_outputs": config.tied_head and config.scaled_head,
        "relative_attention_num_buckets": config.num_buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_epsilon,
        "dropout_rate": config.dropout_rate,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.decoder_start_id,
    }


def encoder_parameters(config: T5Config, layer: float) -> tuple[T5Config, tuple[str, ...]]:
    """The whole encoder: there is no layer to choose."""
    if layer:
        raise ValueError(f"layer {layer:g} of a T5: expected 0, its encoder has one output")
    return config, ("token_embedding/", "encoder/")


FAMILY = Family(
    name="t5",
    model_types=("t5", "mt5"),
    config_class=T5Config,
    make_module=T5,
    make_rules=make_rules,
    config_from_hf=config_from_hf,
    config_to_hf=config_to_hf,
    inputs=("ids", "mask", "ids"),
    # In files of the first T5 release; no code ever read it.
    ignored_keys=("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",),
    answering=("decoder/", "head/"),
    encoder_parameters=encoder_parameters,
)
