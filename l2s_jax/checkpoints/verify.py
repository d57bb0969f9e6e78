"""A checkpoint in our hands against the same one in transformers', on random padded prompts.

Needs torch and transformers.
"""

from __future__ import annotations

import dataclasses
import os

import jax
import numpy as np
from flax import linen as nn
from scipy.special import log_softmax

from l2s_jax.checkpoints.engine import Family, Params
from l2s_jax.gguf_file import is_gguf

ROWS, PROMPT_TOKENS, RESPONSE_TOKENS = 2, 24, 12


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far our logits are from the reference's, over all real positions.

    difference: largest |difference|, relative to the largest |logit|.
    kl: mean Kullback-Leibler divergence of our next-token distribution from theirs, in nats.
    top1: share of positions with the same likeliest token.
    """

    difference: float
    kl: float
    top1: float


def compare(family: Family, directory: str, module: nn.Module, params: Params) -> Agreement:
    """Our (module, params) against transformers' reading of a Hugging Face `directory`."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    random = np.random.default_rng(0)
    vocab_size = module.config.vocab_size
    ids = random.integers(0, vocab_size, (ROWS, PROMPT_TOKENS), dtype=np.int32)
    mask = np.arange(PROMPT_TOKENS) < np.array([[PROMPT_TOKENS], [PROMPT_TOKENS * 2 // 3]])
    inputs = {"input_ids": ids, "attention_mask": mask}
    ours = [ids, mask]
    seq2seq = len(family.inputs) == 3
    real = mask
    if seq2seq:
        decoder_ids = random.integers(0, vocab_size, (ROWS, RESPONSE_TOKENS), dtype=np.int32)
        inputs["decoder_input_ids"] = decoder_ids
        ours.append(decoder_ids)
        real = np.ones(decoder_ids.shape, bool)
    auto = transformers.AutoModelForSeq2SeqLM if seq2seq else transformers.AutoModelForCausalLM
    where = {"pretrained_model_name_or_path": directory}
    if is_gguf(directory):
        folder, name = os.path.split(directory)
        where = {"pretrained_model_name_or_path": folder or ".", "gguf_file": name}
    reference = auto.from_pretrained(**where, local_files_only=True).float().eval()
    with torch.no_grad():
        logits = reference(**{k: torch.tensor(v).long() for k, v in inputs.items()}).logits
    with jax.default_matmul_precision("highest"):
        found = jax.jit(module.apply)({"params": params}, *ours)
    return agreement(np.asarray(found)[real], logits.numpy()[real])


def agreement(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Of two arrays of logits [positions, V]."""
    ours, theirs = (log_softmax(x.astype(np.float64), axis=-1) for x in (found, expected))
    return Agreement(
        difference=float(np.abs(found - expected).max() / np.abs(expected).max()),
        kl=float(np.mean(np.sum(np.exp(theirs) * (theirs - ours), axis=-1))),
        top1=float(np.mean(found.argmax(-1) == expected.argmax(-1))),
    )
