"""Who is measured: our systems, and those of other libraries, behind one interface.

A contestant is made from a `Setup`, prepared for one case after another, and then measures itself
on each. It lives in a process of its own (remote.py), the only one that needs its library.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from l2s_jax.data.prompts import random_prompts


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
    vocab_size: int  # the smaller one: prompts fit both models
    real_weights: bool  # of both; a folder that holds none stands for random ones
    accelerator: bool  # whether this machine has one, on which all are measured that can be
    fast_bfloat16: bool  # whether the accelerator, or else the CPU, has products in bfloat16
    llm_positions: int | None = None  # how many tokens a model can take; None: any number
    slm_positions: int | None = None
    vocabulary: int = 0  # pieces that those with a cut vocabulary write with
    draft_tokens: int = 4  # of exact decoding: the most at once
    acceptance: float | None = None  # the share of drafts that pass there

    def prompts(self, case: Case) -> np.ndarray:
        """int32 [B, T], which everybody gets."""
        return random_prompts(case.batch_size, case.prompt_tokens, self.vocab_size)


class Contestant(Protocol):
    """One way to answer. Ours also have `trace(folder)`, which writes a profile of one request."""

    def prepare(self, case: Case) -> dict[str, float]:
        """Compiles and warms up; facts about the case, compile_s among them."""
        ...

    def measure(self) -> dict[str, float]:
        """One run: encode_ms, first_token_ms (from the start), decode_ms_per_token, total_ms."""
        ...

    def reset_peak(self) -> None:
        """What `peak_bytes` gives starts anew, where the library lets it."""

    def peak_bytes(self) -> float | None:
        """The most memory held on the accelerator, NaN if the library doesn't tell.

        None where there is none: then it is that of the process that counts.
        """


class Entry(NamedTuple):
    """How a contestant is called in a table, whose version is recorded, and how it is made."""

    label: str
    library: str
    module: str  # its `make(setup, **arguments)` gives the Contestant
    arguments: Mapping[str, Any]


class Variant(NamedTuple):
    """Settings of a library that may be the faster ones, on some machine and at some shape."""

    label: str
    arguments: Mapping[str, Any] = {}  # of `make`, beside the Entry's
    environment: Mapping[str, str] = {}  # of the process
    threads: int | None = None  # None: the Setup's


def _ours(label: str, name: str, **arguments: Any) -> Entry:
    return Entry(label, "jax", "ours", {"name": name, **arguments})


def _transformers(label: str, name: str, **arguments: Any) -> Entry:
    return Entry(label, "transformers", "hf", {"name": name, **arguments})


def _ctranslate2(label: str, name: str, **arguments: Any) -> Entry:
    return Entry(label, "ctranslate2", "ct2", {"name": name, **arguments})


def _openvino(label: str, name: str, **arguments: Any) -> Entry:
    return Entry(label, "openvino", "openvino", {"name": name, **arguments})


CONTESTANTS: Mapping[str, Entry] = {
    "l2s": _ours("L2S", "l2s"),
    "l2s-bfloat16": _ours("L2S, its LLM in bfloat16", "l2s", encoder_dtype="bfloat16"),
    "l2s-int8": _ours("L2S, int8", "l2s", weights="int8"),
    "l2s-cut": _ours("L2S, vocabulary cut", "l2s", is_cut=True),
    "exact": _ours("LLM, drafted by L2S", "exact"),
    "llm": _ours("LLM", "llm"),
    "llm-int8": _ours("LLM, int8", "llm", weights="int8"),
    "slm": _ours("SLM alone", "slm"),
    "slm-cut": _ours("SLM alone, vocabulary cut", "slm", is_cut=True),
    "slm-int8": _ours("SLM alone, int8", "slm", weights="int8"),
    "hf-llm": _transformers("LLM, transformers", "llm"),
    "hf-slm": _transformers("SLM, transformers", "slm"),
    "hf-llm-bfloat16": _transformers("LLM, transformers, bfloat16", "llm", dtype="bfloat16"),
    "hf-slm-bfloat16": _transformers("SLM, transformers, bfloat16", "slm", dtype="bfloat16"),
    "hf-llm-compiled": _transformers("LLM, transformers, compiled", "llm", compiled=True),
    "hf-slm-compiled": _transformers("SLM, transformers, compiled", "slm", compiled=True),
    "hf-llm-assisted": _transformers(
        "LLM, transformers, assisted by the SLM", "llm", assisted=True
    ),
    "ct2-llm": _ctranslate2("LLM, CTranslate2", "llm"),
    "ct2-slm": _ctranslate2("SLM, CTranslate2", "slm"),
    "ct2-llm-int8": _ctranslate2("LLM, CTranslate2, int8", "llm", compute_type="int8"),
    "ct2-slm-int8": _ctranslate2("SLM, CTranslate2, int8", "slm", compute_type="int8"),
    "ov-llm": _openvino("LLM, OpenVINO", "llm"),
    "ov-slm": _openvino("SLM, OpenVINO", "slm"),
    "ov-llm-int8": _openvino("LLM, OpenVINO, int8", "llm", weights="int8"),
    "ov-slm-int8": _openvino("SLM, OpenVINO, int8", "slm", weights="int8"),
}
OURS = tuple(name for name, entry in CONTESTANTS.items() if entry.module == "ours")
PEERS = tuple(name for name in CONTESTANTS if name not in OURS)
# In an environment of its own, as its libraries want other versions than ours do.
ELSEWHERE = tuple(name for name in PEERS if CONTESTANTS[name].module == "openvino")


def make(name: str, setup: Setup, arguments: Mapping[str, Any]) -> Contestant:
    """The contestant of that name, in this process; `arguments` are its variant's."""
    entry = CONTESTANTS[name]
    module = importlib.import_module(f"l2s_jax.bench.{entry.module}")
    return module.make(setup, **{**entry.arguments, **arguments})


def variants(name: str, setup: Setup) -> list[Variant]:
    """The settings among which the best of a contestant are found, its own defaults first."""
    entry = CONTESTANTS[name]
    choices = [Variant("defaults")]
    if entry.module == "ours":
        return choices
    if entry.arguments.get("compiled"):
        # Of torch.compile: CUDA graphs are its reduce-overhead, and a CPU has none.
        usual = "reduce-overhead" if setup.accelerator else "default"
        choices = [
            Variant(f"steps compiled, mode {usual}", {"mode": usual}),
            Variant(f"forward compiled, mode {usual}", {"mode": usual, "whole": True}),
            Variant("steps compiled, mode max-autotune", {"mode": "max-autotune"}),
        ]
    elif entry.arguments.get("compute_type") == "int8" and setup.fast_bfloat16:
        # What is not int8: the rest of the products and all that lies between them. CTranslate2 has
        # float32 on every CPU, bfloat16 not on each that has such products.
        others = ["int8_bfloat16", *(["int8_float16"] if setup.accelerator else [])]
        choices = [
            Variant(compute_type, {"compute_type": compute_type})
            for compute_type in ("int8_float32", *others)
        ]
    if entry.module == "openvino" and setup.threads > 1:
        return [*choices, Variant("defaults, one thread", threads=1)]
    if setup.accelerator or entry.arguments.get("compiled"):
        return choices
    # OpenMP's threads may spin while they wait for each other, or sleep; a second one need not pay.
    threading = {"": {}, ", threads that spin": {"environment": {"OMP_WAIT_POLICY": "ACTIVE"}}}
    if setup.threads > 1:
        threading[", one thread"] = {"threads": 1}
    return [
        variant._replace(label=variant.label + label, **changes)
        for label, changes in threading.items()
        for variant in choices
    ]


def unfit(name: str, setup: Setup, case: Case) -> str:
    """Why a contestant is not measured on a case; "" where it is."""
    if name.endswith("-bfloat16"):
        if setup.dtype == "bfloat16":
            whole = name.removesuffix("-bfloat16")
            return f"the same as {CONTESTANTS[whole].label}, all of which is in bfloat16"
        if not setup.fast_bfloat16:
            return "this CPU has no products in bfloat16"
    if CONTESTANTS[name].arguments.get("is_cut") and not setup.vocabulary:
        return "the size of its vocabulary is not given: --vocabulary"
    if name == "exact" and setup.acceptance is None:
        return "its projector is random: how many drafts pass is not given, --acceptance"
    if name == "hf-llm-assisted":
        if not setup.real_weights:
            return "random weights accept no draft, expected checkpoints"
        if case.batch_size > 1:
            return "assisted generation takes one prompt at a time"
    whole = case.prompt_tokens + case.new_tokens
    arguments = CONTESTANTS[name].arguments
    needed: dict[str, int] = {
        "l2s": {"llm": case.prompt_tokens, "slm": whole},
        "llm": {"llm": whole},
        "slm": {"slm": whole},
        "exact": dict.fromkeys(("llm", "slm"), whole + setup.draft_tokens),
    }.get(arguments.get("name", ""), {})
    if arguments.get("assisted"):
        needed["slm"] = whole  # it writes drafts of the same row
    for model, tokens in needed.items():
        positions = getattr(setup, f"{model}_positions")
        if positions is not None and tokens > positions:
            return f"{tokens} tokens, the {model.upper()} has {positions} positions"
    return ""


def has_weights(folder: str) -> bool:
    """Whether a folder in Hugging Face's format, or in ours, holds more than its config."""
    return any(name.endswith(".safetensors") for name in os.listdir(folder))


def milliseconds(call: Callable[[], Any]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def warmed_up(measure: Callable[[], Any]) -> dict[str, float]:
    """`prepare` of a library that compiles, if it does, when it first runs."""
    first, second = milliseconds(measure), milliseconds(measure)
    return {"compile_s": max(first - second, 0.0) / 1e3}


def split(encode_ms: float, first_ms: float, total_ms: float, new_tokens: int) -> dict[str, float]:
    """`measure` of a library that gives a response as a whole: a token is the rest's mean."""
    return {
        "encode_ms": encode_ms,
        "first_token_ms": first_ms,
        "decode_ms_per_token": (total_ms - first_ms) / max(new_tokens - 1, 1),
        "total_ms": total_ms,
    }
