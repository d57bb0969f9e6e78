"""transformers' `generate` as a contestant."""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers

from l2s_jax.bench.contestants import Case, Setup, has_weights, milliseconds, split, warmed_up


def ready(model: Any) -> Any:
    """A model that was loaded, to generate with.

    The cache that `generate` makes has as many layers as the config's `num_layers` says
    (transformers 5.23). In a T5 these are the encoder's, and the decoder may have more.
    """
    config = model.config
    if config.is_encoder_decoder:
        config.num_layers = config.num_decoder_layers
    return model.eval()


class _Transformers:
    """transformers on one checkpoint, eager, compiled or assisted by the SLM."""

    def __init__(self, setup: Setup, name: str, dtype: str, assisted: bool, compiled: bool):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(setup.threads)
        self._setup, self._dtype = setup, getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = self._load(setup.llm if name == "llm" else setup.slm)
        self._settings: dict[str, Any] = {"do_sample": False, "num_beams": 1}
        self._compiled = compiled
        if assisted:
            self._settings["assistant_model"] = self._load(setup.slm)

    def _load(self, directory: str) -> Any:
        config = transformers.AutoConfig.from_pretrained(directory)
        kind: Any = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        if has_weights(directory):
            model = kind.from_pretrained(directory, dtype=self._dtype)
        else:
            with torch.device(self._device):
                model = kind.from_config(config, dtype=self._dtype)
        # Every row decodes up to the limit, and nothing is computed to see to it.
        model.generation_config.eos_token_id = None
        return ready(model).to(self._device)

    def compile(self, mode: str, whole: bool) -> None:
        """`whole` compiles the forward of every call, else generate compiles that of its steps."""
        # Without it, who is compiled too often goes on uncompiled, and does not say so.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        if self._device == "cpu" and mode == "max-autotune":
            inductor: Any = importlib.import_module("torch._inductor.config")
            inductor.freezing = True
        self._settings["cache_implementation"] = "static"
        if self._model.config.is_encoder_decoder:
            encoder = self._model.get_encoder()
            encoder.forward = torch.compile(encoder.forward, mode=mode)
        if whole:
            self._settings["disable_compile"] = True
            self._model.forward = torch.compile(self._model.forward, mode=mode)
            return
        config: Any = transformers.CompileConfig(mode=mode)
        config._compile_all_devices = True
        self._settings["compile_config"] = config

    def prepare(self, case: Case) -> dict[str, float]:
        if self._compiled:
            torch._dynamo.reset()
        self._ids = torch.tensor(self._setup.prompts(case)).long().to(self._device)
        self._case = case
        return warmed_up(self.measure)

    def _generate(self, new_tokens: int) -> None:
        with torch.inference_mode():
            found = self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=new_tokens,
                **self._settings,
            )
        self._wait()
        before = 1 if self._model.config.is_encoder_decoder else self._ids.shape[1]
        if found.shape[1] - before != new_tokens:
            raise RuntimeError(f"decoded {found.shape[1] - before} tokens, expected {new_tokens}")

    def _encode(self) -> None:
        with torch.inference_mode():
            self._model.get_encoder()(self._ids, attention_mask=torch.ones_like(self._ids))
        self._wait()

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def measure(self) -> dict[str, float]:
        encoder_decoder = self._model.config.is_encoder_decoder
        encode = milliseconds(self._encode) if encoder_decoder else 0.0
        first = milliseconds(lambda: self._generate(1))
        total = milliseconds(lambda: self._generate(self._case.new_tokens))
        return split(encode, first, total, self._case.new_tokens)

    def reset_peak(self) -> None:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> float | None:
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else None


def make(
    setup: Setup,
    name: str,
    dtype: str = "",
    assisted: bool = False,
    compiled: bool = False,
    mode: str = "default",
    whole: bool = False,
) -> _Transformers:
    """`name` is "llm" or "slm"; `assisted` has the SLM write drafts; `dtype`: "" is the setup's.

    `compiled` with torch.compile's `mode`: the encoder, and each step's forward by `generate`, or
    with `whole` every call's forward.
    """
    made = _Transformers(setup, name, dtype or setup.dtype, assisted, compiled)
    if compiled:
        made.compile(mode, whole)
    return made
