"""Who is measured: our systems, and those of other libraries, behind one interface.

A contestant is made from a `Setup`, prepared for one case after another, and then measures itself
on each.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol


class Case(NamedTuple):
    """One shape: rows, prompt tokens and new tokens of each."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all contestants share: folders of checkpoints in Hugging Face's format, and a dtype."""

    llm: str
    slm: str
    dtype: str  # float32 | bfloat16
    threads: int
    folder: str  # for what a contestant makes of the checkpoints
    real_weights: bool


class Contestant(Protocol):
    """One way to answer."""

    def prepare(self, case: Case) -> dict[str, float]:
        """Compiles and warms up; facts about the case, compile_s among them."""

    def measure(self) -> dict[str, float]:
        """One run: encode_ms, first_token_ms (from the start), decode_ms_per_token, total_ms."""

    def trace(self, folder: str) -> None:
        """A profile of one run, for Perfetto or XProf; only of ours."""


class _Ours:
    """One of our systems: "llm", "slm" or "l2s", whose LLM may encode in another dtype."""

    def __init__(self, name: str, setup: Setup, encoder_dtype: str = "auto"):
        self.system, self.vocab_size, *params = _load(name, setup, encoder_dtype)
        # Nothing but these holds the numbers that were read.
        self.trained, self.frozen = map(_put_away, params)

    def prepare(self, case: Case) -> dict[str, float]:
        import jax.numpy as jnp

        from l2s_jax.latency import Stopwatch

        self._stopwatch = None
        self._stopwatch = Stopwatch(
            self.system, self.trained, self.frozen, self.vocab_size, **case._asdict()
        )
        weights = self.system.parameters_read_per_token(self.trained)
        weights *= jnp.dtype(self.system.decoder.dtype).itemsize
        return {
            "compile_s": self._stopwatch.compile_s,
            "bytes_read_per_token": weights + self._stopwatch.cache_bytes,
        }

    def measure(self) -> dict[str, float]:
        times = self._stopwatch.measure()
        return {
            "encode_ms": times["encode_ms"],
            "first_token_ms": times["encode_ms"] + times["prefill_ms"],
            "decode_ms_per_token": times["decode_ms_per_token"],
            "total_ms": times["total_ms"],
        }

    def trace(self, folder: str) -> None:
        import jax

        with jax.profiler.trace(folder, create_perfetto_trace=True):
            self._stopwatch.run()


def _load(
    name: str, setup: Setup, encoder_dtype: str
) -> tuple[Any, int, dict[str, Any], dict[str, Any]]:
    """(system, size of the prompts' vocabulary, trained, frozen), as generation holds them."""
    import jax

    from l2s_jax import convert
    from l2s_jax.config import compute_dtypes
    from l2s_jax.models.systems import LanguageModel, LlmToSlm

    dtype, of_encoder = compute_dtypes(setup.dtype, encoder_dtype)
    if name == "l2s":
        llm, frozen = convert.load_encoder(setup.llm, dtype=of_encoder, serve=True)
        slm, slm_params = convert.load(setup.slm, dtype=dtype)
        same = llm.config.vocab_size == slm.config.vocab_size
        system = LlmToSlm(
            llm.config, slm.config, projector_width=slm.config.width, shared_vocabulary=same
        )
        params = jax.jit(system.init)(jax.random.key(0))
        trained = {**params, "slm": {key: slm_params[key] for key in params["slm"]}}
        return system, llm.config.vocab_size, *system.to_serve(trained, frozen)
    path = setup.llm if name == "llm" else setup.slm
    module, params = convert.load(path, dtype=dtype, serve=True)
    system = LanguageModel(name, module.config)
    return system, module.config.vocab_size, *system.to_serve({name: params}, {})


def _put_away(params: dict[str, Any]) -> dict[str, Any]:
    """Moves parameters to the device one by one, so that they are never in memory twice."""
    import jax

    for name, part in params.items():
        params[name] = (
            _put_away(part)
            if isinstance(part, dict)
            else jax.block_until_ready(jax.device_put(part))
        )
    return params


def _split(encode_ms: float, first_ms: float, total_ms: float, new_tokens: int) -> dict[str, float]:
    return {
        "encode_ms": encode_ms,
        "first_token_ms": first_ms,
        "decode_ms_per_token": (total_ms - first_ms) / max(new_tokens - 1, 1),
        "total_ms": total_ms,
    }


def _milliseconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


class _Transformers:
    """transformers' generate on one checkpoint, eager, compiled or assisted by the SLM."""

    def __init__(self, name: str, setup: Setup, *, static: bool = False, assisted: bool = False):
        import torch
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(setup.threads)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._torch = torch

        def load(directory: str) -> Any:
            config = transformers.AutoConfig.from_pretrained(directory)
            kind = (
                transformers.AutoModelForSeq2SeqLM
                if config.is_encoder_decoder
                else transformers.AutoModelForCausalLM
            )
            model = kind.from_pretrained(directory, dtype=getattr(torch, setup.dtype))
            return model.to(self._device).eval()

        self._model = load(setup.llm if name == "llm" else setup.slm)
        self._settings = {"do_sample": False, "num_beams": 1}
        if static:
            self._settings["cache_implementation"] = "static"
            self._model.forward = torch.compile(self._model.forward)
        if assisted:
            self._settings["assistant_model"] = load(setup.slm)

    def prepare(self, case: Case) -> dict[str, float]:
        from l2s_jax.latency import random_prompts

        ids = random_prompts(
            case.batch_size, case.prompt_tokens, self._model.config.get_text_config().vocab_size
        )
        self._ids = self._torch.tensor(ids).long().to(self._device)
        self._case = case
        compile_s = _milliseconds(self.measure) / 1e3
        self.measure()
        return {"compile_s": compile_s}

    def _generate(self, new_tokens: int) -> None:
        with self._torch.inference_mode():
            self._model.generate(
                self._ids,
                attention_mask=self._torch.ones_like(self._ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                **self._settings,
            )
        self._wait()

    def _encode(self) -> None:
        with self._torch.inference_mode():
            self._model.get_encoder()(self._ids)
        self._wait()

    def _wait(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def measure(self) -> dict[str, float]:
        encoder_decoder = self._model.config.is_encoder_decoder
        encode = _milliseconds(self._encode) if encoder_decoder else 0.0
        first = _milliseconds(lambda: self._generate(1))
        total = _milliseconds(lambda: self._generate(self._case.new_tokens))
        return _split(encode, first, total, self._case.new_tokens)


class _CTranslate2:
    """CTranslate2 on one checkpoint, in its own format and precision."""

    def __init__(self, name: str, setup: Setup, compute_type: str):
        import ctranslate2

        source = setup.llm if name == "llm" else setup.slm
        target = os.path.join(setup.folder, f"ctranslate2-{name}-{compute_type}")
        if not os.path.isdir(target):
            converter = ctranslate2.converters.TransformersConverter(source)
            converter.convert(target, quantization=compute_type)
        options = {
            "device": "cuda" if ctranslate2.get_cuda_device_count() else "cpu",
            "compute_type": compute_type,
            "inter_threads": 1,
            "intra_threads": setup.threads,
        }
        self._encoder_decoder = os.path.exists(os.path.join(target, "shared_vocabulary.json"))
        kind = ctranslate2.Translator if self._encoder_decoder else ctranslate2.Generator
        self._model = kind(target, **options)
        self._pieces = _pieces(source)

    def prepare(self, case: Case) -> dict[str, float]:
        from l2s_jax.latency import random_prompts

        ids = random_prompts(case.batch_size, case.prompt_tokens, len(self._pieces))
        self._prompts = [[self._pieces[i] for i in row] for row in ids]
        self._case = case
        compile_s = _milliseconds(self.measure) / 1e3
        self.measure()
        return {"compile_s": compile_s}

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
        first = _milliseconds(lambda: self._generate(1))
        total = _milliseconds(lambda: self._generate(self._case.new_tokens))
        return _split(float("nan"), first, total, self._case.new_tokens)


def _pieces(directory: str) -> list[str]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return tokenizer.convert_ids_to_tokens(range(len(tokenizer)))


class _Bandwidth:
    """A plain compiled product of one vector and one large matrix: bytes per second."""

    MEGABYTES = 512

    def __init__(self):
        import jax
        import jax.numpy as jnp

        # In float32 whatever the models are in: a CPU multiplies one row of bfloat16 more slowly
        # than it reads it.
        rows = 4096
        columns = self.MEGABYTES * 2**20 // (rows * 4)
        matrix = jax.random.normal(jax.random.key(0), (rows, columns), jnp.float32)
        vector = jnp.ones((1, rows), jnp.float32)
        product = jax.jit(lambda vector, matrix: vector @ matrix)
        self._run = lambda: jax.block_until_ready(product(vector, matrix))
        self._bytes = matrix.nbytes

    def prepare(self, case: Case) -> dict[str, float]:
        self._run()
        return {}

    def measure(self) -> dict[str, float]:
        seconds = statistics.median(_milliseconds(self._run) for _ in range(5)) / 1e3
        return {"gb_per_s": self._bytes / seconds / 1e9}


BANDWIDTH = "bandwidth"

# Name: what it is called in a table, the library whose version is recorded, how it is made.
CONTESTANTS: Mapping[str, tuple[str, str, Callable[[Setup], Contestant]]] = {
    "l2s": ("L2S", "jax", lambda setup: _Ours("l2s", setup)),
    "l2s-bfloat16": (
        "L2S, its LLM in bfloat16",
        "jax",
        lambda setup: _Ours("l2s", setup, "bfloat16"),
    ),
    "llm": ("LLM", "jax", lambda setup: _Ours("llm", setup)),
    "slm": ("SLM alone", "jax", lambda setup: _Ours("slm", setup)),
    "hf-llm": ("LLM, transformers", "transformers", lambda setup: _Transformers("llm", setup)),
    "hf-slm": ("SLM, transformers", "transformers", lambda setup: _Transformers("slm", setup)),
    "hf-llm-compiled": (
        "LLM, transformers, compiled",
        "transformers",
        lambda setup: _Transformers("llm", setup, static=True),
    ),
    "hf-slm-compiled": (
        "SLM, transformers, compiled",
        "transformers",
        lambda setup: _Transformers("slm", setup, static=True),
    ),
    "hf-llm-assisted": (
        "LLM, transformers, assisted by the SLM",
        "transformers",
        lambda setup: _Transformers("llm", setup, assisted=True),
    ),
    "ct2-llm": (
        "LLM, CTranslate2",
        "ctranslate2",
        lambda setup: _CTranslate2("llm", setup, setup.dtype),
    ),
    "ct2-slm": (
        "SLM, CTranslate2",
        "ctranslate2",
        lambda setup: _CTranslate2("slm", setup, setup.dtype),
    ),
    "ct2-llm-int8": (
        "LLM, CTranslate2, int8",
        "ctranslate2",
        lambda setup: _CTranslate2("llm", setup, "int8"),
    ),
    "ct2-slm-int8": (
        "SLM, CTranslate2, int8",
        "ctranslate2",
        lambda setup: _CTranslate2("slm", setup, "int8"),
    ),
    BANDWIDTH: ("matrix times vector", "jax", lambda _setup: _Bandwidth()),
}
OURS = ("l2s", "l2s-bfloat16", "llm", "slm")
PEERS = tuple(name for name in CONTESTANTS if name not in (*OURS, BANDWIDTH))


def unfit(name: str, setup: Setup, case: Case) -> str:
    """Why a contestant is not measured on a case; "" where it is."""
    if name == "l2s-bfloat16" and setup.dtype == "bfloat16":
        return "the same as L2S, all of which is in bfloat16"
    if name == "hf-llm-assisted":
        if not setup.real_weights:
            return "random weights accept no draft, expected checkpoints"
        if case.batch_size > 1:
            return "assisted generation takes one prompt at a time"
    return ""
