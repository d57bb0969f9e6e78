"""OpenVINO as a contestant, on the CPU, with the Python that --peer_python names.

A new environment in which all of this was tried, with Python 3.11:
pip install torch==2.13.0 "optimum-intel[openvino]==2.1.0" transformers==5.5.4 nncf==3.4.0 \
    openvino==2026.4.1 openvino-genai==2026.4.1.0
"""

# Those libraries are in another environment than this package.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from typing import Any, Protocol

import numpy as np

from l2s_jax.bench.contestants import Case, Setup, milliseconds, split, warmed_up

# The classes below import what only they need: libraries count in the process's memory.
try:
    import openvino
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"no {error.name} in {sys.executable}, expected a Python that has it as --peer_python"
    ) from None

_WEIGHT_FORMATS = {"float": "fp32", "int8": "int8"}
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class _Model(Protocol):
    """A converted checkpoint, and the prompts that it answers."""

    has_encoder: bool

    def feed(self, ids: np.ndarray) -> None:
        """Takes prompts, int64 [B, T]."""

    def encode(self) -> None:
        """Runs the encoder alone."""

    def generate(self, new_tokens: int) -> set[int]:
        """Decodes greedily; how many tokens, of each row."""
        ...


class _EncoderDecoder:
    """optimum's `generate`: a step is a call from Python, the cache stays in the compiled model."""

    has_encoder = True

    def __init__(self, folder: str, properties: dict[str, Any]):
        import torch
        import transformers
        from optimum.intel import OVModelForSeq2SeqLM

        transformers.utils.logging.set_verbosity_error()
        torch.set_num_threads(properties["INFERENCE_NUM_THREADS"])
        self._torch = torch
        self._model = OVModelForSeq2SeqLM.from_pretrained(
            folder, device="CPU", ov_config={key: str(item) for key, item in properties.items()}
        )
        # Every row decodes up to the limit, and nothing is computed to see to it.
        self._model.generation_config.eos_token_id = None

    def feed(self, ids: np.ndarray) -> None:
        self._ids = self._torch.tensor(ids)
        self._mask = self._torch.ones_like(self._ids)

    def encode(self) -> None:
        self._model.get_encoder()(input_ids=self._ids, attention_mask=self._mask)

    def generate(self, new_tokens: int) -> set[int]:
        found = self._model.generate(
            self._ids,
            attention_mask=self._mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
        )
        return {found.shape[1] - 1}  # less the token that decoding starts from


class _DecoderOnly:
    """OpenVINO GenAI's pipeline, on token ids."""

    has_encoder = False

    def __init__(self, folder: str, properties: dict[str, Any]):
        import openvino_genai

        self._library = openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        # By default a prompt that has been seen before is not computed again.
        scheduler.enable_prefix_caching = False
        # The pipeline's default without a scheduler's: prompts are not cut into parts.
        scheduler.max_num_batched_tokens = 2**31
        self._pipeline = openvino_genai.LLMPipeline(
            folder, "CPU", scheduler_config=scheduler, **properties
        )

    def feed(self, ids: np.ndarray) -> None:
        self._inputs = self._library.TokenizedInputs(
            openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids))
        )

    def encode(self) -> None:
        raise NotImplementedError("there is no encoder")

    def generate(self, new_tokens: int) -> set[int]:
        # Its defaults are greedy decoding; the checkpoint's own settings don't count.
        settings = self._library.GenerationConfig()
        settings.max_new_tokens, settings.ignore_eos = new_tokens, True
        return {len(row) for row in self._pipeline.generate(self._inputs, settings).tokens}


class _OpenVINO:
    """OpenVINO on one checkpoint, in its own format."""

    def __init__(self, setup: Setup, name: str, weights: str):
        properties = _properties(setup, weights)
        source = setup.llm if name == "llm" else setup.slm
        with open(os.path.join(source, "config.json"), encoding="utf-8") as file:
            encoder_decoder = json.load(file).get("is_encoder_decoder", False)
        folder = os.path.join(setup.folder, f"openvino-{name}-{weights}")
        if not os.path.isdir(folder):
            _convert(source, folder, encoder_decoder, weights)
        self._setup = setup
        kind = _EncoderDecoder if encoder_decoder else _DecoderOnly
        self._model: _Model = kind(folder, properties)

    def prepare(self, case: Case) -> dict[str, float]:
        self._model.feed(self._setup.prompts(case).astype(np.int64))
        self._case = case
        return warmed_up(self.measure)

    def _generate(self, new_tokens: int) -> None:
        lengths = self._model.generate(new_tokens)
        if lengths != {new_tokens}:
            raise RuntimeError(f"decoded {sorted(lengths)} tokens, expected {new_tokens}")

    def measure(self) -> dict[str, float]:
        encode = milliseconds(self._model.encode) if self._model.has_encoder else math.nan
        first = milliseconds(lambda: self._generate(1))
        total = milliseconds(lambda: self._generate(self._case.new_tokens))
        return split(encode, first, total, self._case.new_tokens)

    def reset_peak(self) -> None:
        """The memory is the process's."""

    def peak_bytes(self) -> float | None:
        return None


def _properties(setup: Setup, weights: str) -> dict[str, Any]:
    """Of the CPU's plugin.

    Raises:
      ValueError: there is an accelerator, or the CPU doesn't compute in the setup's dtype.
    """
    if setup.accelerator:
        raise ValueError("runs on the CPU, the others on an accelerator")
    able = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if setup.dtype == "bfloat16" and "BF16" not in able:
        # It would compute in float32, and not say so.
        raise ValueError("this CPU has no products in bfloat16")
    precision = _PRECISIONS[setup.dtype]
    properties = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": setup.threads,
    }
    if weights == "float":
        # The cache, by default in float16, and of weights in int8 in eight bits too.
        properties["KV_CACHE_PRECISION"] = precision
    return properties


def _convert(source: str, target: str, encoder_decoder: bool, weights: str) -> None:
    # In a process of its own, whose memory is not the contestant's.
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "openvino"]
    command += ["--model", source, "--weight-format", _WEIGHT_FORMATS[weights]]
    task = "text2text-generation" if encoder_decoder else "text-generation"
    command += ["--task", f"{task}-with-past", "--disable-convert-tokenizer"]
    with tempfile.TemporaryDirectory(dir=os.path.dirname(target)) as folder:
        part = os.path.join(folder, "model")
        found = subprocess.run(
            [*command, part], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        if found.returncode:
            last = (found.stderr.strip().splitlines() or [f"exit status {found.returncode}"])[-1]
            raise RuntimeError(f"cannot be converted: {last}")
        # Whoever finds the folder finds all of it.
        os.rename(part, target)


def make(setup: Setup, name: str, weights: str = "float") -> _OpenVINO:
    """`name` is "llm" or "slm"; `weights` "float" or "int8", the latter with OpenVINO's defaults.

    These are weights in int8, with a scale and an offset per output, and a cache of eight bits.
    Whether products are of eight bits too is up to the CPU's plugin.

    Raises:
      ValueError: the setup is none that it can be compared in.
      RuntimeError: the checkpoint cannot be converted.
    """
    return _OpenVINO(setup, name, weights)
