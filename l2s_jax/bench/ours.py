"""Our systems as contestants."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from l2s_jax import convert
from l2s_jax.bench.contestants import Case, Setup, has_weights
from l2s_jax.bench.geometry import random_like
from l2s_jax.config import compute_dtypes
from l2s_jax.latency import Stopwatch
from l2s_jax.models.systems import LanguageModel, LlmToSlm, Params, System


class _Ours:
    """One of our systems: "llm", "slm" or "l2s", whose LLM may encode in another dtype."""

    def __init__(self, setup: Setup, name: str, encoder_dtype: str, weights: str):
        self._setup = setup
        self._system, *params = _load(setup, name, encoder_dtype, weights)
        # Nothing but these holds the numbers that were read.
        self._trained, self._frozen = map(_put_away, params)

    def prepare(self, case: Case) -> dict[str, float]:
        self._stopwatch = None  # Its programs and cache go before the next ones come.
        self._stopwatch = Stopwatch(
            self._system, self._trained, self._frozen, self._setup.vocab_size, **case._asdict()
        )
        return {
            "compile_s": self._stopwatch.compile_s,
            "bytes_read_per_token": self._weight_bytes() + self._stopwatch.cache_bytes,
        }

    def _weight_bytes(self) -> int:
        """Of the weights that a step reads."""
        # Each array as one of as many numbers as it has bytes, in which a system counts.
        sizes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((leaf.nbytes,), jnp.uint8), self._trained
        )
        return self._system.parameters_read_per_token(sizes)

    def measure(self) -> dict[str, float]:
        times = self._stopwatch.measure()
        return {
            "encode_ms": times["encode_ms"],
            "first_token_ms": times["encode_ms"] + times["prefill_ms"],
            "decode_ms_per_token": times["decode_ms_per_token"],
            "total_ms": times["total_ms"],
        }

    def trace(self, folder: str) -> None:
        """A profile of one request in a folder, for Perfetto or XProf."""
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            self._stopwatch.run()

    def reset_peak(self) -> None:
        """JAX counts from the start of the process."""

    def peak_bytes(self) -> float | None:
        statistics = jax.local_devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] if statistics else None


def make(setup: Setup, name: str, encoder_dtype: str = "auto", weights: str = "float") -> _Ours:
    """`encoder_dtype` as config.llm.encoder_dtype, `weights` one of models.serving.WEIGHTS."""
    return _Ours(setup, name, encoder_dtype, weights)


def _load(
    setup: Setup, name: str, encoder_dtype: str, weights: str
) -> tuple[System, Params, Params]:
    """(system, trained, frozen) as they serve; projector and prompt map are random."""
    dtype, of_encoder = compute_dtypes(setup.dtype, encoder_dtype)
    if name != "l2s":
        path = setup.llm if name == "llm" else setup.slm
        if not has_weights(path):
            config = dataclasses.replace(convert.read_config(path), dtype=dtype)
            return _random(LanguageModel(name, config), {}, weights)
        module, params = convert.load(path, dtype=dtype, serve=True)
        system = LanguageModel(name, module.config)
        return system, *system.to_serve({name: params}, {}, weights)
    if has_weights(setup.llm):
        llm, frozen = convert.load_encoder(setup.llm, dtype=of_encoder, serve=True)
        llm_config = llm.config
    else:
        whole = dataclasses.replace(convert.read_config(setup.llm), dtype=of_encoder)
        llm_config, frozen = convert.abstract_encoder(whole)
    slm_config = dataclasses.replace(convert.read_config(setup.slm), dtype=dtype)
    if has_weights(setup.slm):
        slm, slm_params = convert.load(setup.slm, dtype=dtype)
        slm_config = slm.config
    system = LlmToSlm(
        llm_config,
        slm_config,
        projector_width=slm_config.width,
        shared_vocabulary=llm_config.vocab_size == slm_config.vocab_size,
    )
    if not (has_weights(setup.llm) or has_weights(setup.slm)):
        return _random(system, frozen, weights)
    if not has_weights(setup.llm):
        frozen = random_like(frozen)
    params = jax.jit(system.init)(jax.random.key(0))
    if has_weights(setup.slm):
        params = {**params, "slm": {key: slm_params[key] for key in params["slm"]}}
    return system, *system.to_serve(params, frozen, weights)


def _random(system: System, frozen: Any, weights: str) -> tuple[System, Params, Params]:
    """A system with random weights; `frozen` has the shapes of an LLM's encoder."""
    shapes = jax.eval_shape(
        lambda key, frozen: system.to_serve(system.init(key), frozen, weights),
        jax.random.key(0),
        frozen,
    )
    return system, *map(random_like, shapes)


def _put_away(params: dict[str, Any]) -> dict[str, Any]:
    """Moves parameters to the device one by one, so that they are never in memory twice."""
    for name, part in params.items():
        params[name] = (
            _put_away(part)
            if isinstance(part, dict)
            else jax.block_until_ready(jax.device_put(part))
        )
    return params
