"""Small GGUF files, written as llama.cpp's convert_hf_to_gguf.py writes them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Where a block keeps its scales, as halves that must be finite.
SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def make_model(kind: str, **config: object) -> torch.nn.Module:
    """A random Llama, Qwen2 or Qwen3 of one layer, 256 wide, of which every number matters."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    base = {
        "vocab_size": 96,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 256,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
    }
    settings = getattr(transformers, f"{kind}Config")(**{**base, **config})
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(generator=generator).mul_(0.1)
            if weight.ndim == 1:
                weight.add_(1.0)
    return model


def _name(key: str) -> str:
    stem, kind = key.rsplit(".", 1)
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def _turned(array: np.ndarray, heads: int) -> np.ndarray:
    """Rotary dimensions half a head apart -> neighbours."""
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def random_blocks(shape: tuple[int, int], kind: str, seed: int) -> np.ndarray:
    """Bytes of a quantized matrix that `gguf` can read and not write."""
    random = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    raw = random.integers(0, 256, (shape[0] * shape[1] // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        scale = random.uniform(-2e-3, 2e-3, len(raw)).astype(np.float16)
        raw[:, place : place + 2] = scale[:, None].view(np.uint8)
    return raw.reshape(shape[0], -1)


def write(
    path: str | Path,
    model: torch.nn.Module,
    *,
    kind: str = "F32",
    architecture: str = "",
    metadata: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    drop: tuple[str, ...] = (),
) -> str:
    """Writes a model, its matrices in a type of GGUF's; `metadata` replaces, `tensors` adds."""
    config = model.config
    name = architecture or config.model_type
    fields: dict[str, object] = {
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.freq_base": config.rope_parameters["rope_theta"],
        f"{name}.vocab_size": config.vocab_size,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.padding_token_id": config.pad_token_id,
    }
    if name == "llama":
        fields["llama.rope.dimension_count"] = config.head_dim
    elif name == "qwen3":
        fields["qwen3.attention.key_length"] = config.head_dim
        fields["qwen3.attention.value_length"] = config.head_dim
    writer = gguf.GGUFWriter(str(path), name)
    for key, value in (fields | (metadata or {})).items():
        _add(writer, key, value)
    heads = {".q_proj": config.num_attention_heads, ".k_proj": config.num_key_value_heads}
    for seed, (key, weight) in enumerate(model.state_dict().items()):
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weight.numpy()
        if name == "llama":
            for part, count in heads.items():
                array = _turned(array, count) if part in key else array
        _add_tensor(writer, _name(key), array, kind, seed, drop)
    for key, array in (tensors or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _add_tensor(
    writer: gguf.GGUFWriter,
    name: str,
    array: np.ndarray,
    kind: str,
    seed: int,
    drop: tuple[str, ...],
) -> None:
    if name in drop:
        return
    if array.ndim == 1 or kind == "F32":
        writer.add_tensor(name, np.ascontiguousarray(array))
    elif kind in SCALES:
        raw = random_blocks(array.shape, kind, seed)
        writer.add_tensor(name, raw, raw_dtype=Type[kind])
    else:
        raw = gguf.quants.quantize(np.ascontiguousarray(array), Type[kind])
        writer.add_tensor(name, raw, raw_dtype=Type[kind])


def _add(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value is not None:
        writer.add_array(key, value)


def read_by_transformers(path: str) -> torch.nn.Module:
    """transformers' own reading of a file; `from_pretrained` does the same by way of accelerate."""
    folder, name = os.path.split(path)
    config = transformers.AutoConfig.from_pretrained(folder, gguf_file=name)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    return model.float().eval()


def tokenizer_metadata(
    tokenizer: tokenizers.Tokenizer, pre: str, user_defined: tuple[str, ...] = ()
) -> dict[str, object]:
    """The metadata of a byte-level BPE; special tokens are those that it says."""
    content = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = {token["content"] for token in content["added_tokens"]} - set(user_defined)
    kinds = [3 if t in special else 4 if t in user_defined else 1 for t in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in content["model"]["merges"]],
    }
