"""Small random checkpoints, made by transformers."""

from __future__ import annotations

import torch
import transformers
import xla

# Of programs that are compared with transformers: no optimizations, which take longer to compile
# than they save, but the code generator that users have and conftest.py turns off.
COMPILATION = {"xla_backend_optimization_level": 0} | xla.AS_USERS_HAVE_IT

# model_type -> (class name, a small geometry)
CAUSAL = {
    "gpt2": ("GPT2", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 256}),
    "gpt_neox": (
        "GPTNeoX",
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 40,
        },
    ),
} | {
    model_type: (
        name,
        {
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 40,
        },
    )
    for model_type, name in (
        ("llama", "Llama"),
        ("mistral", "Mistral"),
        ("qwen2", "Qwen2"),
        ("qwen3", "Qwen3"),
    )
}

SMALL = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "decoder_start_token_id": 0,
}


def make_t5(
    directory: str | None = None,
    *,
    family: str = "T5",
    own_head: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: object,
) -> torch.nn.Module:
    """A T5 or MT5 (`family`) ForConditionalGeneration; saved where a directory is given.

    Weights are drawn so that every one of them matters to the logits: norms are not ones and the
    relative bias is as large as the scores. `own_head` unties lm_head from the embedding.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = getattr(transformers, f"{family}Config")(**{**SMALL, **config})
    model = getattr(transformers, f"{family}ForConditionalGeneration")(settings)
    if own_head:
        model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(generator=generator)
            if "layer_norm" in name:
                weight.mul_(0.3).add_(1)
            elif "relative_attention_bias" not in name and name != "shared.weight":
                weight.mul_(weight.shape[1] ** -0.5)
            if ".q.weight" in name:
                weight.mul_(settings.d_kv**-0.5)
    model = model.to(dtype).eval()
    if directory is not None:
        model.save_pretrained(directory, max_shard_size=max_shard_size)
    return model


def make_causal(
    directory: str | None = None, *, model_type: str, seed: int = 0, **config: object
) -> torch.nn.Module:
    """A decoder-only model of a `model_type` of CAUSAL, saved where a directory is given.

    Weights are drawn so that every one of them matters to the logits, biases and norms included.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name, small = CAUSAL[model_type]
    fields = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    settings = getattr(transformers, f"{name}Config")(**{**fields, **small, **config})
    head = "LMHeadModel" if model_type == "gpt2" else "ForCausalLM"
    model = getattr(transformers, f"{name}{head}")(settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(generator=generator)
            if weight.ndim == 1:
                weight.mul_(0.3)
                if "bias" not in name:
                    weight.add_(1)
            elif "wte" not in name and "embed" not in name:
                conv1d = model_type == "gpt2" and ".h." in name  # stored [in, out]
                weight.mul_(weight.shape[0 if conv1d else 1] ** -0.5)
    model = model.eval()
    if directory is not None:
        model.save_pretrained(directory)
    return model
