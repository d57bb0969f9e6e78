"""Every setting of an experiment, with its default. Files in configs/ start here and set values."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from l2s_jax.decoding.search import Search


def model_config(family: str = "t5") -> ConfigDict:
    """Geometry of a model that is made here; the names are those of its family's config class."""
    geometry = {"family": family, "width": 512, "num_heads": 8, "feed_forward_width": 2048}
    if family == "t5":
        geometry |= {
            "head_width": 64,
            "num_encoder_layers": 6,
            "num_decoder_layers": 6,
            "activation": "relu",
            "tied_head": True,
            "num_buckets": 32,
            "max_distance": 128,
        }
    elif family == "gpt2":
        geometry |= {"num_layers": 6, "max_positions": 1024}
    elif family == "gpt_neox":
        geometry |= {"num_layers": 6}
    elif family == "llama":
        geometry |= {"num_layers": 6, "num_kv_heads": 8, "head_width": 64, "tied_head": True}
    else:
        raise ValueError(f"model family {family!r}: expected 't5', 'gpt2', 'gpt_neox' or 'llama'")
    return ConfigDict(geometry)


def tokenizer_config() -> ConfigDict:
    """Where a tokenizer comes from.

    train_vocab_size 0: it lies in the model's directory. Else it is trained on the train split,
    with that many pieces; model_type is "unigram" or "bpe".
    """
    return ConfigDict({"train_vocab_size": 0, "model_type": "unigram"})


def train_config(steps: int = 0) -> ConfigDict:
    """How one system is trained; `steps` 0 leaves an LLM from a directory as it is."""
    return ConfigDict(
        {
            "steps": steps,
            "batch_size": 64,  # examples per update, over all devices
            "accumulation": 1,  # parts that a batch is taken in, to save memory
            "optimizer": "adamw",  # adamw | adafactor
            "learning_rate": 1e-2,  # peak
            "parameter_scale": True,  # learning rate relative to each parameter's own size
            "schedule": "cosine",  # cosine | inverse_sqrt | constant
            "warmup_steps": 0,
            "adam_b2": 0.98,
            "weight_decay": 0.0,
            "clip_norm": 1.0,  # of the global gradient; 0: no clipping
            "label_smoothing": 0.0,
            "dropout_rate": 0.1,
            "ema_decay": 0.0,  # the run returns averaged parameters; 0: the last ones
            "evaluate_every": 1000,  # steps between validations, each with a checkpoint
            "log_every": 10,  # steps between lines of metrics
            # Keep only what enters each layer for the gradient, and compute the rest again.
            "remat": False,
            "select": "best",  # checkpoint to return: best (validation accuracy) | last
            # Regular expressions over whole parameter paths ("slm/decoder/.*"); (): all is trained.
            "trainable": (),
            # Pairs of such an expression and a factor on the learning rate; the first match counts.
            "learning_rate_scales": (),
        }
    )


def lora_config() -> ConfigDict:
    """LoRA on the SLM's kernels (arXiv 2106.09685); rank 0: the SLM itself is trained."""
    return ConfigDict({"rank": 0, "alpha": 16.0, "pattern": ".*(attention|feed_forward)/.*kernel"})


def search_config() -> ConfigDict:
    """How tokens are chosen, greedily by default; decoding/search.py explains each setting."""
    return ConfigDict(dataclasses.asdict(Search()))


def default() -> ConfigDict:
    """A whole experiment."""
    return ConfigDict(
        {
            "seed": 0,
            "dtype": "auto",  # of the products: float32 | bfloat16 | auto (float32 on CPU)
            # Layers of the frozen LLM and of what is trained as one loop: the same results from
            # programs that do not grow, nor take longer to compile, with depth.
            "scan_layers": False,
            "task": {
                "name": "",
                "source": "",  # tfds | jsonl | tsv | text
                "data_dir": "",  # where relative file names start; any fsspec URL
                "tfds_name": "",
                "splits": ConfigDict(),  # see data/tasks.py
                "prompt": "",  # template over field names: "translate to German: {en}"
                "response": "",  # field name
                "references": "",  # field of further references, if there is one
            },
            "tokenizer": tokenizer_config(),  # the LLM's
            "max_prompt_tokens": 128,
            "max_response_tokens": 128,
            # (prompt, response) lengths that batches are padded to, ascending.
            "buckets": ((128, 128),),
            "labels": "data",  # what the SLM and L2S learn to say: data | llm
            # A folder that keeps H of all prompts, computed once; "": each step computes its own.
            "features": {"cache": ""},
            "llm": {
                "path": "",  # a Hugging Face directory, or RUN/llm/model; "": made here
                "model": model_config(),
                # Of a decoder-only LLM: how many of its layers, or which fraction of them, make H;
                # 0: all.
                "layer": 0.0,
                # Of its products where it encodes for L2S: float32 | bfloat16 | auto (as `dtype`).
                # What was trained with one continues and is used with the other too.
                "encoder_dtype": "auto",
                "train": train_config(),
            },
            "slm": {
                "path": "",  # a directory to start from; "": random parameters
                "model": model_config(),
                # train_vocab_size 0: that of the directory; without one, the LLM's.
                "tokenizer": tokenizer_config(),
                "lora": lora_config(),
                "train": train_config(1000),
            },
            "l2s": {
                "fusion": "add",  # add | replace | cross
                "projector_width": 0,  # hidden units; 0: the SLM's width
                "lora": lora_config(),
                "train": train_config(1000),
            },
            "decoding": {
                "max_new_tokens": 128,
                "batch_size": 32,
                "search": search_config(),  # of evaluation, labels and generation
                "weights": "float",  # of evaluation and generation: float | int8
            },
            "evaluation": {
                "split": "test",
                "max_examples": 0,  # of the split; 0: all
                "validation_examples": 2000,  # of the validation split while training; 0: all
                "metrics": ("bleu", "chrf"),  # the first is the primary one
                "latency": {
                    "batch_size": 8,  # the larger batch, beside batch 1
                    "prompt_tokens": 32,
                    "new_tokens": 32,
                    "repeats": 20,
                },
            },
            # Devices of training and generation; one axis may be -1, which takes those left.
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )


def compute_dtype(name: str, platform: str | None = None) -> jnp.dtype:
    """The dtype that `config.dtype` names, on a platform's devices or else this machine's."""
    if name == "auto":
        name = "float32" if (platform or jax.default_backend()) == "cpu" else "bfloat16"
    return _dtype(name, "config.dtype")


def compute_dtypes(
    dtype: str, encoder_dtype: str = "auto", platform: str | None = None
) -> tuple[jnp.dtype, jnp.dtype]:
    """The dtypes that `config.dtype` and `config.llm.encoder_dtype` name, in this order.

    Raises:
      ValueError: one of them is no dtype for products.
    """
    common = compute_dtype(dtype, platform)
    if encoder_dtype == "auto":
        return common, common
    return common, _dtype(encoder_dtype, "config.llm.encoder_dtype")


def _dtype(name: str, where: str) -> jnp.dtype:
    if name == "float16":
        raise ValueError(f"{where}='float16': T5 overflows in it; use 'bfloat16' or 'float32'")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"{where}={name!r}: expected 'float32', 'bfloat16' or 'auto'")
    return jnp.dtype(name)
