"""Our systems as contestants."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l2s_jax.bench.contestants import Case, Setup, has_weights
from l2s_jax.bench.geometry import random_like
from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster.sharding import one_device, put_parameters
from l2s_jax.config import compute_dtypes
from l2s_jax.decoding.engine import GREEDY
from l2s_jax.evaluation.latency import Stopwatch
from l2s_jax.models.exact import Exact
from l2s_jax.models.families import ModelConfig
from l2s_jax.models.serving import lay_out_all, to_serve
from l2s_jax.models.systems import LanguageModel, LlmToSlm, Params, System
from l2s_jax.models.vocabulary import of_size, with_vocabulary
from l2s_jax.settings.search import Search


class _Ours:
    """One of our systems: "llm", "slm", "exact", or "l2s", whose LLM may have another dtype."""

    def __init__(self, setup: Setup, name: str, encoder_dtype: str, weights: str, vocabulary: int):
        self._setup = setup
        self._system, *params = _load(setup, name, encoder_dtype, weights, vocabulary)
        mesh = one_device()
        self._trained, self._frozen = (
            lay_out_all(put_parameters(part, mesh), mesh) for part in params
        )

    def prepare(self, case: Case) -> dict[str, float]:
        self._stopwatch: Any = None  # Its programs and cache go before the next ones come.
        self._stopwatch = Stopwatch(
            self._system,
            self._trained,
            self._frozen,
            self._setup.vocab_size,
            search=self._search(),
            **case._asdict(),
        )
        facts = {"compile_s": self._stopwatch.compile_s}
        if not isinstance(self._system, Exact):
            read = bytes_of_weights(self._system, self._trained)
            facts["bytes_read_per_token"] = read + self._stopwatch.cache_bytes
        return facts

    def _search(self) -> Search:
        if not isinstance(self._system, Exact):
            return GREEDY
        return Search(exact=True, draft_tokens=self._setup.draft_tokens)

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


def make(
    setup: Setup,
    name: str,
    encoder_dtype: str = "auto",
    weights: str = "float",
    is_cut: bool = False,
) -> _Ours:
    """`encoder_dtype` as config.llm.encoder_dtype, `weights` one of models.serving.WEIGHTS.

    With `is_cut`, responses are written with `setup.vocabulary` pieces.
    """
    return _Ours(setup, name, encoder_dtype, weights, setup.vocabulary if is_cut else 0)


def bytes_of_weights(system: System, trained: Params) -> int:
    """Of the weights that a step reads."""
    # Each array as one of as many numbers as it has bytes, in which a system counts.
    sizes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.nbytes,), jnp.uint8), trained)
    return system.parameters_read_per_token(sizes)


def _load(
    setup: Setup, name: str, encoder_dtype: str, weights: str, vocabulary: int
) -> tuple[System | Exact, Params, Params]:
    """(system, trained, frozen) as they serve; projector and prompt map are random."""
    dtype, of_encoder = compute_dtypes(setup.dtype, encoder_dtype)
    # What is to be quantized waits on the host: all of it in float may not fit on the device.
    mesh = one_device() if weights == "float" else None
    if name == "exact":
        # What encodes is a part of the LLM, in its dtype.
        l2s, trained, _ = _load(setup, "l2s", setup.dtype, weights, vocabulary)
        llm, parameters, _ = _load(setup, "llm", encoder_dtype, weights, 0)
        assert isinstance(l2s, LlmToSlm)
        assert isinstance(llm, LanguageModel)
        system = Exact(l2s, llm, acceptance=setup.acceptance)
        return system, trained, dict(parameters["llm"])
    if name != "l2s":
        config, params = _model(setup.llm if name == "llm" else setup.slm, dtype, mesh)
        config = _cut(config, vocabulary)
        system = LanguageModel(name, config)
        return system, *system.to_serve({name: params}, {}, weights)
    llm_config, frozen = _encoder(setup.llm, of_encoder, mesh)
    slm_config, slm = _model(setup.slm, dtype, mesh)
    system = LlmToSlm(
        llm_config,
        _cut(slm_config, vocabulary),
        projector_width=slm_config.width,
        shared_vocabulary=llm_config.vocab_size == slm_config.vocab_size,
    )
    shapes = dict(jax.eval_shape(system.init, jax.random.key(0)))
    slm = {key: slm[key] for key in shapes.pop("slm")}
    return system, *system.to_serve({**random_like(shapes), "slm": slm}, frozen, weights)


def _cut(config: ModelConfig, size: int) -> ModelConfig:
    """The config of a model that writes with so many pieces; 0: all."""
    return with_vocabulary(config, of_size(config, size)) if size else config


def _model(path: str, dtype: Any, mesh: Mesh | None) -> tuple[ModelConfig, Params]:
    """(config, parameters as they serve on a mesh) of a folder, random where it holds none."""
    if has_weights(path):
        module, params = pretrained.load(path, dtype=dtype, weights="float", mesh=mesh)
        return module.config, params
    config = dataclasses.replace(pretrained.read_config(path), dtype=dtype)
    shapes = jax.eval_shape(LanguageModel("llm", config).init, jax.random.key(0))
    return config, _random(shapes["llm"], config, mesh)


def _encoder(path: str, dtype: Any, mesh: Mesh | None) -> tuple[ModelConfig, Params]:
    """Likewise, of what encodes a prompt."""
    if has_weights(path):
        module, params = pretrained.load_encoder(path, dtype=dtype, weights="float", mesh=mesh)
        return module.config, params
    config = dataclasses.replace(pretrained.read_config(path), dtype=dtype)
    config, shapes = pretrained.abstract_encoder(config)
    return config, _random(shapes, config, mesh, encodes=True)


def _random(
    shapes: Any, config: ModelConfig, mesh: Mesh | None, *, encodes: bool = False
) -> Params:
    def held(params: Params) -> Params:
        return lay_out_all(to_serve(params, config, "float", encodes=encodes), mesh)

    return random_like(jax.eval_shape(held, shapes))
