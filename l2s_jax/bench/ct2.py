"""CTranslate2 as a contestant."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import ctranslate2
import transformers

from l2s_jax.bench.contestants import Case, Setup, milliseconds, split, warmed_up


class _CTranslate2:
    """CTranslate2 on one checkpoint, in its own format and precision."""

    def __init__(self, setup: Setup, name: str, compute_type: str):
        source = setup.llm if name == "llm" else setup.slm
        target = os.path.join(setup.folder, f"ctranslate2-{name}-{compute_type}")
        if not os.path.isdir(target):
            convert(source, target, compute_type)
        self._setup = setup
        self._on_accelerator = setup.accelerator and ctranslate2.get_cuda_device_count() > 0
        options = {
            "device": "cuda" if self._on_accelerator else "cpu",
            "compute_type": compute_type,
            "inter_threads": 1,
            "intra_threads": setup.threads,
        }
        self._encoder_decoder = os.path.exists(os.path.join(target, "shared_vocabulary.json"))
        kind = ctranslate2.Translator if self._encoder_decoder else ctranslate2.Generator
        self._model = kind(target, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        self._pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))

    def prepare(self, case: Case) -> dict[str, float]:
        self._prompts = [[self._pieces[i] for i in row] for row in self._setup.prompts(case)]
        self._case = case
        return warmed_up(self.measure)

    def _generate(self, new_tokens: int) -> None:
        if self._encoder_decoder:
            results = self._model.translate_batch(
                self._prompts,
                beam_size=1,
                max_decoding_length=new_tokens,
                min_decoding_length=new_tokens,
                max_input_length=0,
            )
            lengths = {len(result.hypotheses[0]) for result in results}
        else:
            results = self._model.generate_batch(
                self._prompts,
                beam_size=1,
                max_length=new_tokens,
                min_length=new_tokens,
                include_prompt_in_result=False,
            )
            lengths = {len(result.sequences_ids[0]) for result in results}
        if lengths != {new_tokens}:
            raise RuntimeError(f"decoded {sorted(lengths)} tokens, expected {new_tokens}")

    def measure(self) -> dict[str, float]:
        first = milliseconds(lambda: self._generate(1))
        total = milliseconds(lambda: self._generate(self._case.new_tokens))
        return split(math.nan, first, total, self._case.new_tokens)

    def reset_peak(self) -> None:
        """CTranslate2 doesn't count its memory."""

    def peak_bytes(self) -> float | None:
        return math.nan if self._on_accelerator else None


def convert(source: str, target: str, compute_type: str) -> None:
    """Writes a checkpoint of Hugging Face's in CTranslate2's format.

    Raises:
      RuntimeError: it cannot be converted.
    """
    # In a process of its own, whose memory is not the contestant's.
    command = [sys.executable, "-m", "ctranslate2.converters.transformers"]
    command += ["--model", source, "--output_dir", target, "--quantization", compute_type]
    found = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if found.returncode:
        last = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
        raise RuntimeError(f"cannot be converted: {last}")


def make(setup: Setup, name: str, compute_type: str | None = None) -> _CTranslate2:
    """`name` is "llm" or "slm"; `compute_type` is one of CTranslate2's, None: the setup's dtype."""
    return _CTranslate2(setup, name, compute_type or setup.dtype)
