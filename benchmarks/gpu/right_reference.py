"""Small random models of each family in transformers, and what PyTorch computes with them.

Needs torch and transformers. Models run on the GPU if torch can use it, else on the CPU.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
import transformers

from benchmarks.gpu.right_checks import PAD_ID, Prompts, Size


def find_device() -> str:
    """Of PyTorch: "cuda" if a product there works, else "cpu"."""
    if torch.cuda.is_available():
        try:
            ones = torch.ones(8, 8, device="cuda")
            (ones @ ones).cpu()
        except RuntimeError:  # of a driver or libraries that do not fit torch
            return "cpu"
        return "cuda"
    return "cpu"


def model_configs(size: Size) -> dict[str, transformers.PretrainedConfig]:
    """Name -> config, one for each family."""
    head_width = size.width // size.heads
    common = {
        "vocab_size": size.vocab,
        "bos_token_id": 1,
        "eos_token_id": 1,
        "pad_token_id": PAD_ID,
    }
    t5 = common | {
        "d_model": size.width,
        "d_kv": head_width,
        "d_ff": 4 * size.width,
        "num_layers": size.layers,
        "num_heads": size.heads,
        "decoder_start_token_id": PAD_ID,
    }
    neox = common | {
        "hidden_size": size.width,
        "intermediate_size": 4 * size.width,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
    }
    llama = neox | {
        "num_key_value_heads": size.heads // 2,
        "head_dim": head_width,
        "tie_word_embeddings": False,
    }
    gpt2 = common | {
        "n_embd": size.width,
        "n_layer": size.layers,
        "n_head": size.heads,
        "n_positions": 2 * (size.longer + size.new),
    }
    own_head = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    return {
        "T5 v1.0": transformers.T5Config(**t5),
        "Flan-T5": transformers.T5Config(**t5 | own_head),
        "GPT-2": transformers.GPT2Config(**gpt2),
        "GPT-NeoX": transformers.GPTNeoXConfig(**neox),
        "Llama": transformers.LlamaConfig(**llama),
        "Qwen3": transformers.Qwen3Config(**llama),
    }


CLASSES = {
    "t5": "T5ForConditionalGeneration",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _draw_weights(model: torch.nn.Module, tied: bool, generator: torch.Generator) -> None:
    """Weights of which every one matters to the logits, norms and biases included.

    The embedding of a tied head is small beside what the layers add to it, else the model would
    say the last token over and over. The head or the norm before it give logits of a standard
    deviation near 2: greedy and beam search then have choices of all kinds.
    """
    config = model.config
    gpt2 = config.model_type == "gpt2"
    embedding = 0.05 if tied else 1.0
    # T5 scales what a tied head reads by width**-0.5.
    final_norm = 2 / embedding / (config.hidden_size**0.5 if gpt2 else 1.0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(generator=generator)
            if name.endswith("bias"):
                weight.mul_(0.1)
            elif weight.ndim == 1:
                weight.mul_(0.3).add_(1)
                if tied and name.startswith(("decoder.final_layer_norm", "transformer.ln_f")):
                    weight.mul_(final_norm)
            elif name.startswith(("lm_head", "embed_out")):
                weight.mul_(2 * weight.shape[1] ** -0.5)
            elif any(part in name for part in ("shared", "wte", "embed_")):
                weight.mul_(embedding)
            elif "wpe" not in name and "relative_attention_bias" not in name:
                conv1d = gpt2 and ".h." in name  # stored [in, out]
                weight.mul_(weight.shape[0 if conv1d else 1] ** -0.5)
            if ".q.weight" in name:  # T5 does not scale its scores
                weight.mul_(config.d_kv**-0.5)


class Rounding(transformers.LogitsProcessor):
    """Moves every logit by up to `amplitude`, another draw for each row."""

    def __init__(self, amplitude: float):
        self._amplitude = amplitude
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = 2 * torch.rand(scores.shape, generator=self._generator) - 1
        return scores + self._amplitude * noise.to(scores.device)


class Reference:
    """A model of transformers; `directory` gets its checkpoint.

    Attention is the plain one ("eager"): what PyTorch's fused kernels compute float32 in depends
    on the kernel.
    """

    def __init__(
        self, config: transformers.PretrainedConfig, directory: str, device: str, seed: int = 0
    ):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_float32_matmul_precision("highest")
        model = getattr(transformers, CLASSES[config.model_type])(config)
        tied = config.model_type == "gpt2"
        if config.model_type == "t5":
            tied = not config.is_gated_act
            if not tied:  # transformers ties it until a checkpoint says otherwise
                model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.shared.weight))
        _draw_weights(model, tied, torch.Generator().manual_seed(seed))
        model.save_pretrained(directory)
        self._device = device
        self._model = model.to(device).eval()
        self._model.set_attn_implementation("eager")
        # Only what a call asks for ends a response.
        self._model.generation_config.eos_token_id = None
        self.encoder_decoder = bool(config.is_encoder_decoder)
        self.parameters = sum(weight.numel() for weight in model.parameters())

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.tensor(array).long().to(self._device)

    def logits(self, prompts: Prompts, response_ids: np.ndarray, dtype: str) -> np.ndarray:
        """float32 [B, S, V] of each token of a response, by the model with weights in `dtype`."""
        model = self._model
        if dtype != "float32":
            model = copy.deepcopy(model)
            # Not of buffers: like checkpoints read in this dtype, frequencies stay float32.
            for weight in model.parameters():
                weight.data = weight.data.to(getattr(torch, dtype))
        ids, mask = (self._tensor(array) for array in prompts)
        before = self._tensor(response_ids)[:, :-1]
        with torch.no_grad():
            if self.encoder_decoder:
                start = torch.full_like(ids[:, :1], PAD_ID)
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    decoder_input_ids=torch.cat([start, before], 1),
                ).logits
            else:
                whole = torch.cat([mask, torch.ones_like(before)], 1)
                logits = model(
                    input_ids=torch.cat([ids, before], 1),
                    attention_mask=whole,
                    position_ids=(whole.cumsum(1) - 1).clamp(min=0),
                ).logits
                last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
                first = logits[torch.arange(len(ids), device=mask.device), last]
                logits = torch.cat([first[:, None], logits[:, mask.shape[1] :]], 1)
        return logits.float().cpu().numpy()

    def generate(
        self,
        prompts: Prompts,
        new_tokens: int,
        num_beams: int = 1,
        eos_id: int | None = None,
        rounding: float = 0.0,
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(int32 [B, S], the eos included and padding after it; scores [B] of beam search).

        Logits are moved at random by up to `rounding`.
        """
        ids, mask = (self._tensor(array) for array in prompts)
        with torch.no_grad():
            found = self._model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                num_beams=num_beams,
                length_penalty=1.0,
                early_stopping=False,
                eos_token_id=eos_id,
                pad_token_id=PAD_ID,
                return_dict_in_generate=True,
                output_scores=num_beams > 1,
                logits_processor=[Rounding(rounding)] if rounding else [],
            )
        tokens = found.sequences.cpu().numpy()
        tokens = tokens[:, 1 if self.encoder_decoder else prompts.ids.shape[1] :]
        tokens = np.pad(tokens, [(0, 0), (0, new_tokens - tokens.shape[1])])
        if eos_id is not None:
            # Beam search fills up with eos where the padding id is 0.
            ends = np.cumsum(tokens == eos_id, axis=1) - (tokens == eos_id)
            tokens = np.where(ends > 0, PAD_ID, tokens)
        scores = found.sequences_scores.cpu().numpy() if num_beams > 1 else None
        return tokens.astype(np.int32), scores

    def may_say(
        self,
        prompt: Prompts,
        tokens: np.ndarray,
        num_beams: int,
        eos_id: int,
        rounding: float,
        draws: int,
    ) -> bool:
        """Whether int32 [S] is what it says to one prompt, in one of `draws` of its rounding.

        Of beams a tie may be of two hypotheses that others replaced later, whose scores are then
        far apart: no comparison of outputs alone would tell it from a fault.
        """
        prompts = Prompts(*(part.repeat(draws, axis=0) for part in prompt))
        said, _ = self.generate(prompts, len(tokens), num_beams, eos_id, rounding)
        return bool((said == tokens).all(1).any())
