"""transformers' `generate` as a contestant."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from l2s_jax.bench.contestants import Case, Setup, milliseconds, split, warmed_up


class _Transformers:
    """transformers on one checkpoint, eager, compiled or assisted by the SLM."""

    def __init__(self, setup: Setup, name: str, static: bool, assisted: bool):
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(setup.threads)
        self._setup = setup
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = self._load(setup.llm if name == "llm" else setup.slm)
        self._settings = {"do_sample": False, "num_beams": 1}
        if static:
            self._settings["cache_implementation"] = "static"
            self._model.forward = torch.compile(self._model.forward)
        if assisted:
            self._settings["assistant_model"] = self._load(setup.slm)

    def _load(self, directory: str) -> Any:
        config = transformers.AutoConfig.from_pretrained(directory)
        kind = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        model = kind.from_pretrained(directory, dtype=getattr(torch, self._setup.dtype))
        return model.to(self._device).eval()

    def prepare(self, case: Case) -> dict[str, float]:
        self._ids = torch.tensor(self._setup.prompts(case)).long().to(self._device)
        self._case = case
        return warmed_up(self.measure)

    def _generate(self, new_tokens: int) -> None:
        with torch.inference_mode():
            self._model.generate(
                self._ids,
                attention_mask=torch.ones_like(self._ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **self._settings,
            )
        self._wait()

    def _encode(self) -> None:
        with torch.inference_mode():
            self._model.get_encoder()(self._ids)
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


def make(setup: Setup, name: str, static: bool = False, assisted: bool = False) -> _Transformers:
    """`name` is "llm" or "slm"; `static` compiles, `assisted` has the SLM write drafts."""
    return _Transformers(setup, name, static, assisted)
