"""Generators from configs and folders: a trained L2S model, or a system that a run left."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from l2s_jax import sealed
from l2s_jax.checkpoints import pretrained
from l2s_jax.cluster import sharding
from l2s_jax.config import buckets_of, check_prompts, compute_dtypes, make_mesh, naming_mesh
from l2s_jax.files import is_whole
from l2s_jax.hub import find
from l2s_jax.models.exact import Exact
from l2s_jax.models.families import with_tokens
from l2s_jax.models.systems import LanguageModel, LlmToSlm, Params, System
from l2s_jax.models.vocabulary import with_vocabulary
from l2s_jax.serving import bundle
from l2s_jax.serving.bundle_config import check_given, check_tokenizer
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.model import Model
from l2s_jax.settings.search import Search, alone
from l2s_jax.tokenizers.cut import kept_by, whole_of
from l2s_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer


def generator_settings(config: ConfigDict) -> dict[str, Any]:
    """What a config says of decoding, as arguments of Generator; JSON can hold it."""
    return {
        "prompt_lengths": sorted({prompt for prompt, _ in buckets_of(config)}),
        "max_new_tokens": config.decoding.max_new_tokens,
        "batch_size": config.decoding.batch_size,
        "search": config.decoding.search.to_dict(),
        "weights": config.decoding.weights,
    }


def make_generator(
    config: ConfigDict,
    loaded: tuple[System | Exact, Params, Params],
    prompt_tokenizer: Tokenizer,
    response_tokenizer: Tokenizer,
    **settings: Any,
) -> Generator:
    """A Generator with a config's buckets and decoding settings, but for `settings`; loaded is
    (system, trained, frozen).
    """
    settings = {**generator_settings(config), **settings}
    return Generator(*loaded, prompt_tokenizer, response_tokenizer, **settings)


def load(
    directory: str,
    *,
    dtype: str = "auto",
    encoder_dtype: str = "auto",
    mesh: Mesh | Mapping[str, int] | None = None,
    exact: bool = False,
    verify: bool = False,
    **settings: Any,
) -> Model:
    """The L2S model in a directory, ready to answer: `load(DIR).generate(["..."])`.

    Args:
      directory: what a run left in RUN/l2s/model, or `python -m l2s_jax.convert` made of it; or the
        name on the hub to which that was pushed.
      dtype: as config.dtype.
      encoder_dtype: as config.llm.encoder_dtype.
      mesh: of the devices of this process, along its axes as in config.mesh; data is what is left.
        {} splits batches between all of them, {"tensor": 4} the model between each four. None: one
        device.
      exact: the whole LLM is loaded too, and decides on what L2S drafts: the text is the LLM's.
      verify: files are read for their hashes, whether or not these are remembered.
      settings: arguments of `Generator` to use instead of the model's own.

    Raises:
      ValueError: no L2S model is there, its LLM is gone or no longer the same, or not all there
        with `exact`, or the mesh does not fit the devices, the batch size, the prompts' lengths or
        the model. What is wrong with a setting is said before anything is read.
    """
    check_given(settings, ("dtype", "encoder_dtype", "mesh", "exact", "verify"))
    if verify:
        with sealed.anew():
            given = {"dtype": dtype, "encoder_dtype": encoder_dtype, "mesh": mesh, "exact": exact}
            return load(directory, **given, **settings)
    wanted = settings.get("search", {})
    if not exact and (wanted.exact if isinstance(wanted, Search) else wanted.get("exact")):
        raise ValueError("search with exact=True: expected load(..., exact=True), or no exact")
    directory = find(directory)
    settings = {**bundle.generation_settings(directory), **settings}
    mesh = mesh_of(mesh)
    sharding.check_lengths(settings.get("prompt_lengths", ()), mesh, "prompt_lengths")
    placed = {"weights": settings.get("weights", "float"), "mesh": mesh}
    common, of_encoder = compute_dtypes(dtype, encoder_dtype)
    tokenizers = bundle.load_tokenizers(directory)
    if exact:
        if common != of_encoder:
            raise ValueError(
                f"encoder_dtype={encoder_dtype!r} with exact=True: expected that of all, the LLM "
                "that encodes is the one that decides"
            )
        loaded = load_exact(directory, tokenizers[0], dtype=common, **placed)
        tokenizers = tokenizers[0], tokenizers[0]
    else:
        settings["search"] = alone(settings.get("search", {}))
        loaded = bundle.load(directory, dtype=common, encoder_dtype=of_encoder, **placed)
        _check_tokenizers(directory, loaded[0], *tokenizers)
    return Model(directory, *loaded, *tokenizers, mesh=mesh, **settings)


def _check_tokenizers(
    directory: str, system: LlmToSlm, prompts: Tokenizer, responses: Tokenizer
) -> None:
    """Raises a ValueError where LLM or SLM lack ids for pieces of their tokenizers."""
    check_tokenizer(directory, system.llm_config, prompts)
    check_tokenizer(directory, system.slm_config, responses)


def mesh_of(mesh: Mesh | Mapping[str, int] | None) -> Mesh:
    """A mesh of this process's devices, as `load` takes it.

    Raises:
      ValueError: the sizes do not fit the devices, or an axis that there is not.
    """
    if mesh is None:
        return sharding.one_device()
    if isinstance(mesh, Mesh):
        if mesh.axis_names == sharding.AXES:
            return mesh
        return sharding.make_mesh(dict(mesh.shape), list(mesh.devices.flat))
    rest = {} if -1 in mesh.values() else {"data": -1}
    return sharding.make_mesh({**rest, **mesh}, jax.local_devices())


def load_alone(
    name: str, directory: str, tokenizer: Tokenizer, *, dtype: Any, weights: str, mesh: Mesh
) -> tuple[LanguageModel, Params, Params]:
    """(system, {name: parameters}, {}) of the LLM or SLM in a directory, with its tokenizer.

    They are held as generation on `mesh` holds them; with `weights` "int8" and a cut vocabulary on
    the host in float32, of which rows are taken before what is left is quantized.

    Raises:
      ValueError: no model is there, or a T5 whose pad or eos id is not its tokenizer's.
    """
    whole, kept = whole_of(tokenizer), kept_by(tokenizer)
    placed: dict[str, Any] = {"weights": weights, "mesh": mesh}
    if weights == "int8" and kept is not None:
        placed = {}
    module, params = pretrained.load(directory, dtype=dtype, **placed)
    check_tokenizer(directory, module.config, tokenizer)
    config = with_tokens(module.config, whole.pad_id, whole.eos_id, directory)
    config = with_vocabulary(config, kept)
    return LanguageModel(name, config), {name: params}, {}


def load_exact(
    directory: str, tokenizer: Tokenizer, *, dtype: Any, weights: str, mesh: Mesh
) -> tuple[Exact, Params, Params]:
    """(system, the L2S's parameters, the whole LLM's) of an L2S model's directory.

    `tokenizer` is the LLM's; the LLM is held as generation on `mesh` holds it.

    Raises:
      ValueError: as of `bundle.load`; what is there of the LLM only encodes; or the LLM and the SLM
        have two tokenizers.
    """
    llm_directory = find(bundle.whole_llm(directory))
    # What encodes is a part of the LLM, and is read with it.
    l2s, trained, _ = bundle.load(directory, dtype=dtype, entries=())
    placed: dict[str, Any] = {"weights": weights, "mesh": mesh}
    llm, parameters, _ = load_alone("llm", llm_directory, tokenizer, dtype=dtype, **placed)
    return Exact(l2s, llm), trained, parameters["llm"]


def load_generator(config: ConfigDict, workdir: str, name: str, **settings: Any) -> Generator:
    """The Generator of system `name` (llm, slm, l2s or exact) that a run left in `workdir`.

    On the mesh of config.decoding, see `sharding.decoding_mesh`. Settings as of `make_generator`.

    Raises:
      ValueError: the workdir holds no such system, or the mesh does not fit.
    """
    mesh = sharding.decoding_mesh(make_mesh(config, "decoding"))
    with naming_mesh(config, "decoding"):
        sharding.check_rows(config.decoding.batch_size, mesh, "config.decoding.batch_size")
        check_prompts(config, mesh)
    settings = {"mesh": mesh, **settings}
    exact = name == "exact"
    if not exact:
        settings["search"] = alone(settings.get("search", config.decoding.search.to_dict()))
    directory = os.path.join(workdir, "l2s" if exact else name, "model")
    if name == "llm" and not config.llm.train.steps:
        directory = find(config.llm.path)
    if not is_whole(directory):
        raise ValueError(f"{directory}: no such directory; expected the result of a finished run")
    dtype, encoder_dtype = compute_dtypes(config.dtype, config.llm.encoder_dtype)
    weights = settings.get("weights", config.decoding.weights)
    placed: dict[str, Any] = {"weights": weights, "mesh": mesh}
    if exact:
        prompts, _ = bundle.load_tokenizers(directory)
        loaded = load_exact(directory, prompts, dtype=dtype, **placed)
        return make_generator(config, loaded, prompts, prompts, **settings)
    if name == "l2s":
        loaded = bundle.load(directory, dtype=dtype, encoder_dtype=encoder_dtype, **placed)
        tokenizers = bundle.load_tokenizers(directory)
        _check_tokenizers(directory, loaded[0], *tokenizers)
        return make_generator(config, loaded, *tokenizers, **settings)
    tokenizer = load_tokenizer(directory)
    loaded = load_alone(name, directory, tokenizer, dtype=dtype, **placed)
    return make_generator(config, loaded, whole_of(tokenizer), tokenizer, **settings)
