"""The systems that a server offers by name, of which those that have an LLM in common share it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from l2s_jax.checkpoints.sharing import encoder_part
from l2s_jax.cluster import sharding
from l2s_jax.config import compute_dtypes
from l2s_jax.hub import find
from l2s_jax.models.exact import Exact
from l2s_jax.serving import bundle
from l2s_jax.serving.generator import Generator
from l2s_jax.serving.loading import load_alone, mesh_of
from l2s_jax.settings.search import Search, alone, changed
from l2s_jax.tokenizers.cut import whole_of
from l2s_jax.tokenizers.tokenizer import load_tokenizer

NAMES = ("l2s", "llm", "exact", "slm")


@dataclasses.dataclass(frozen=True)
class Models:
    """What is offered, and how it is held.

    directory: of the L2S model. names: some of NAMES. llm, slm: directories, or "": the LLM that
    the L2S model refers to, and no SLM. mesh: {} is one device. settings: of Generator, where other
    than the model's own. search: changes of the model's own search.
    """

    directory: str
    names: Sequence[str] = ("l2s",)
    llm: str = ""
    slm: str = ""
    dtype: str = "auto"
    encoder_dtype: str = "auto"
    mesh: Mapping[str, int] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    search: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def settings_of(models: Models) -> tuple[dict[str, Any], Search]:
    """The settings of Generator, with the search of models that draft nothing, and that of `exact`.

    Raises:
      ValueError: the model is not there, or the search is one that is not served.
    """
    settings = {**bundle.generation_settings(find(models.directory)), **models.settings}
    is_exact = "exact" in models.names
    if bool(models.search.get("exact", is_exact)) != is_exact:
        raise ValueError(
            f"--search=exact={str(not is_exact).lower()} with --models={','.join(models.names)}: "
            "expected `exact` among --models where the LLM decides, and nowhere else"
        )
    drafting = {"exact": True} if is_exact else {}
    search = changed(settings.get("search", {}), {**drafting, **models.search})
    if is_exact and search.draft_tolerance == 1:
        raise ValueError(
            "draft_tolerance=1 with `exact` among --models: expected less than 1, the LLM decides "
            "nothing there; `l2s` gives the same text"
        )
    if search.num_beams > 1:
        raise ValueError(
            f"{models.directory}: its search has num_beams={search.num_beams}, and a server has no "
            "beam search; expected --search=num_beams=1"
        )
    return {**settings, "search": alone(search)}, search


def load_models(models: Models) -> dict[str, Generator]:
    """The Generator of each name.

    An LLM that is needed whole is read and held once, whoever uses all or a part of it.

    Raises:
      ValueError: a model is not there, or not whole, or doesn't fit the others; or the search
        is one that is not served.
    """
    directory = find(models.directory)
    llm_directory = find(models.llm) if models.llm else None
    settings, search = settings_of(models)
    whole = {"llm", "exact"} & set(models.names)
    mesh = mesh_of(models.mesh or None)
    settings["mesh"] = mesh
    sharding.check_lengths(settings.get("prompt_lengths", ()), mesh, "--prompt_tokens")
    placed = {"weights": settings.get("weights", "float"), "mesh": mesh}
    dtype, encoder_dtype = compute_dtypes(models.dtype, models.encoder_dtype)
    if whole and dtype != encoder_dtype:
        raise ValueError(
            f"--encoder_dtype={models.encoder_dtype} with --models={','.join(models.names)}: "
            f"expected {dtype}, in which the whole LLM computes"
        )
    tokenizers = bundle.load_tokenizers(directory)
    slm = find(models.slm) if "slm" in models.names else ""
    of_slm = load_tokenizer(slm) if slm else None
    made: dict[str, Generator] = {}
    if whole:
        where = llm_directory or find(bundle.whole_llm(directory))
        loaded = load_alone("llm", where, tokenizers[0], dtype=dtype, **placed)
        made["llm"] = Generator(*loaded, tokenizers[0], tokenizers[0], **settings)
    system, trained, frozen = bundle.load(
        directory,
        dtype=dtype,
        encoder_dtype=encoder_dtype,
        **placed,
        entries=() if whole else None,
        llm_directory=llm_directory,
    )
    if whole:
        frozen = encoder_part(system.llm_config, made["llm"].trained["llm"])
    made["l2s"] = Generator(system, trained, frozen, *tokenizers, **settings)
    if "exact" in models.names:
        llm: Any = made["llm"].system
        made["exact"] = Generator(
            Exact(system, llm),
            made["l2s"].trained,
            made["llm"].trained["llm"],
            tokenizers[0],
            tokenizers[0],
            **{**settings, "search": search, "served": True},
        )
    if of_slm:
        loaded = load_alone("slm", slm, of_slm, dtype=dtype, **placed)
        made["slm"] = Generator(*loaded, whole_of(of_slm), of_slm, **settings)
    return {name: made[name] for name in models.names}
