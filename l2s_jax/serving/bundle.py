"""A trained L2S model on disk: config.json, params.safetensors (projector and SLM), tokenizers.

config.json refers to the LLM's directory by path and content hash; `copy` can take it along, or
what encodes of it, in llm/. The SLM's tokenizer lies beside the parameters, with vocabulary.json
where responses have a part of it; the LLM's in llm_tokenizer/ if it is another. README.md, the
model card, is written once there is a report.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from l2s_jax import sealed
from l2s_jax.checkpoints import pretrained
from l2s_jax.checkpoints.engine import own_entries, param_shapes, write_tensors
from l2s_jax.checkpoints.files import TensorFiles, check_hashes, content_hash, hashes_here
from l2s_jax.checkpoints.reading import read_params
from l2s_jax.checkpoints.writing import MAX_SHARD_SIZE, write_directory
from l2s_jax.files import (
    absolute,
    exists,
    is_bucket,
    is_file,
    is_folder,
    make_folder,
    read_bytes,
    write_bytes,
    write_json,
)
from l2s_jax.hub import find, is_name
from l2s_jax.models.systems import LlmToSlm, Params
from l2s_jax.models.vocabulary import with_vocabulary, without_vocabulary
from l2s_jax.serving.bundle_config import FAMILY, check_layers, read_fields
from l2s_jax.tokenizers.cut import read_kept, whole_of
from l2s_jax.tokenizers.tokenizer import Tokenizer, load_tokenizer

# How H comes to the SLM: fields that are there where they are not as by default.
_JOINED = ("layers", "normalize", "stack")
_LLM, _LLM_TOKENIZER = "llm", "llm_tokenizer"
CARD = "README.md"
_GENERATION = "generation_config.json"


@functools.lru_cache(maxsize=8)
def _shapes(system: LlmToSlm) -> dict[str, tuple[int, ...]]:
    return param_shapes(jax.eval_shape(system.init, jax.random.key(0)))


def save(
    system: LlmToSlm,
    trained: Params,
    directory: str,
    *,
    llm_path: str,
    llm_hash: str,
    layer: float,
    llm_tokenizer: Tokenizer,
    slm_tokenizer: Tokenizer,
    generation: Mapping[str, Any],
    llm_whole: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Writes projector, SLM and tokenizers.

    A relative `llm_path` is relative to the bundle's directory, or a name on the hub; `layer` is
    config.llm.layer; `llm_whole` says that all of the LLM is inside; `generation` are the settings
    that `l2s_jax.load` starts from; `max_shard_size` is as of `save_hf`.
    """
    fields = {
        "format": pretrained.FORMAT,
        "family": FAMILY,
        "fusion": system.fusion,
        "projector_width": system.projector_width,
        "shared_vocabulary": system.shared_vocabulary,
        **{name: value for name in _JOINED if (value := getattr(system, name))},
        "slm": pretrained.config_to_native(system.slm_config),
        "llm": {
            "path": llm_path,
            "content_hash": llm_hash,
            "layer": layer,
            **({"whole": True} if llm_whole else {}),
        },
        "generation": dict(generation),
    }
    shapes = _shapes(system)
    tensors = write_tensors(trained, own_entries(shapes), shapes)
    write_directory(directory, fields, tensors, "params", max_shard_size)
    with sealed.writing(directory, _GENERATION):
        write_json(os.path.join(directory, _GENERATION), _generation_config(system, generation))
    slm_tokenizer.save(directory)
    if not system.shared_vocabulary:
        llm_tokenizer.save(os.path.join(directory, _LLM_TOKENIZER))


def save_whole(
    system: LlmToSlm,
    trained: Params,
    frozen: Params,
    directory: str,
    *,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    **others: Any,
) -> None:
    """As `save`, with what encodes of the LLM inside."""
    make_folder(directory)
    reference = _write_llm(system, frozen, directory, max_shard_size)
    save(
        system,
        trained,
        directory,
        llm_path=reference["path"],
        llm_hash=reference["content_hash"],
        layer=reference["layer"],
        max_shard_size=max_shard_size,
        **others,
    )


def _write_llm(
    system: LlmToSlm, frozen: Params, directory: str, max_shard_size: int | str
) -> dict[str, Any]:
    """Writes what encodes of the LLM; the reference to it."""
    inside = os.path.join(directory, _LLM)
    shapes = param_shapes(frozen)
    write_directory(
        inside,
        pretrained.config_to_native(system.llm_config),
        write_tensors(frozen, own_entries(shapes), shapes),
        "params",
        max_shard_size,
    )
    # Of a decoder-only LLM, the layers above the chosen one are gone: all that are there count.
    return {"path": _LLM, "content_hash": content_hash(inside), "layer": 0.0}


def _write_whole_llm(
    source: str, layer: float, directory: str, max_shard_size: int | str
) -> dict[str, Any]:
    """Writes the LLM of a directory; the reference to it, of which `layer` encodes."""
    inside = os.path.join(directory, _LLM)
    module, params = pretrained.load(source)
    pretrained.save_native(module.config, params, inside, max_shard_size=max_shard_size)
    return {"path": _LLM, "content_hash": content_hash(inside), "layer": layer}


def _generation_config(system: LlmToSlm, generation: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings as other programs read them; what is as by default is left out."""
    search, config = dict(generation.get("search", {})), without_vocabulary(system.slm_config)
    fields = {
        "max_new_tokens": generation.get("max_new_tokens"),
        "do_sample": search.get("temperature", 0) > 0,
        "num_beams": search.get("num_beams", 1),
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
        "decoder_start_token_id": getattr(config, "decoder_start_id", None),
    }
    names = ["min_new_tokens", "repetition_penalty", "no_repeat_ngram_size"]
    if fields["do_sample"]:
        names += ["temperature", "top_k", "top_p", "min_p"]
    if fields["num_beams"] > 1:
        names += ["length_penalty", "early_stopping"]
    fields |= {name: search[name] for name in names if name in search}
    return {name: value for name, value in fields.items() if value is not None}


def copy(
    source: str,
    target: str,
    *,
    include_llm: bool | str,
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Copies an L2S model, with a reference to its LLM or with the LLM inside.

    Args:
      source: the model's directory.
      target: a directory that there is, or not.
      include_llm: True takes the part of the LLM along that encodes, "whole" all of it, for exact
        decoding. What is inside already stays inside.
      max_shard_size: as of `save_hf`.

    Raises:
      ValueError: as of `load`; "whole" of a model that has no more than what encodes; or another
        include_llm.
    """
    if include_llm not in (False, True, "whole"):
        raise ValueError(f"include_llm={include_llm!r}: expected True, False or 'whole'")
    fields, _ = read_fields(source)
    whole = include_llm == "whole" or fields["llm"].get("whole")
    llm_directory = find(whole_llm(source)) if whole else ""
    # A whole LLM is read from its own directory.
    system, trained, frozen = load(source, entries=() if whole else None)
    reference = fields["llm"]
    if whole:
        reference = _write_whole_llm(llm_directory, reference["layer"], target, max_shard_size)
    elif include_llm or reference["path"] == _LLM:
        reference = _write_llm(system, frozen, target, max_shard_size)
    else:
        path = _llm_path(source, reference["path"])
        reference = {**reference, "path": path if is_name(path) else absolute(path)}
    llm_tokenizer, slm_tokenizer = load_tokenizers(source)
    save(
        system,
        trained,
        target,
        llm_path=reference["path"],
        llm_hash=reference["content_hash"],
        layer=reference["layer"],
        llm_whole=bool(whole),
        llm_tokenizer=llm_tokenizer,
        slm_tokenizer=slm_tokenizer,
        generation=fields["generation"],
        max_shard_size=max_shard_size,
    )
    card = os.path.join(source, CARD)
    if is_file(card):
        write_bytes(os.path.join(target, CARD), read_bytes(card))


def llm_path(directory: str) -> str:
    """Where the LLM of the L2S model in a directory is; see `_llm_path`."""
    fields, _ = read_fields(directory)
    return _llm_path(directory, fields["llm"]["path"])


def llm_hash(directory: str) -> str:
    """The content hash of the LLM of the L2S model in a directory."""
    fields, _ = read_fields(directory)
    return fields["llm"]["content_hash"]


def whole_llm(directory: str) -> str:
    """Where the whole LLM of the L2S model in a directory is, as `llm_path` gives it.

    Raises:
      ValueError: the model has no more of it than what encodes.
    """
    fields, _ = read_fields(directory)
    path = llm_path(directory)
    inside = _beside(directory, _LLM)
    partial = path == inside and not fields["llm"].get("whole")
    if partial or (not is_name(path) and pretrained.encodes_only(path)):
        raise ValueError(
            f"{directory}: has what encodes of its LLM, and exact decoding asks all of it; "
            "expected a model that refers to a whole LLM, or one copied with --include-llm=whole"
        )
    return path


def _llm_path(directory: str, path: str) -> str:
    """Where the LLM of the bundle in a directory is: a place here, or a name on the hub."""
    inside = _beside(directory, path)
    return path if not exists(inside) and is_name(path) else inside


def _beside(directory: str, path: str) -> str:
    """A path as it is said in a folder."""
    if is_bucket(path):
        return path
    joined = os.path.join(directory, path)
    return absolute(joined) if is_bucket(joined) else os.path.normpath(joined)


def inspect(directory: str) -> list[pretrained.Parameter]:
    """As `pretrained.inspect`, of projector and SLM."""
    with TensorFiles(directory, "params") as files:
        return [
            pretrained.Parameter(key, files.shape(key), files.dtype(key), key)
            for key in sorted(files.keys)
        ]


def generation_settings(directory: str) -> dict[str, Any]:
    """What `save` was given as `generation`."""
    fields, _ = read_fields(directory)
    return dict(fields["generation"])


def load(
    directory: str,
    *,
    dtype: Any = jnp.float32,
    encoder_dtype: Any = None,
    weights: str = "",
    mesh: Mesh | None = None,
    scan_layers: bool = False,
    entries: Sequence[str] | None = None,
    llm_directory: str | None = None,
    llm_hash: str | None = None,
) -> tuple[LlmToSlm, Params, Params]:
    """(system, trained, frozen): what `save` wrote, and the part of the LLM that encodes.

    The arguments after `dtype` are about the LLM, as of `pretrained.load_encoder`: its dtype is
    `dtype` where none of its own is given. `llm_directory` is where it lies, if elsewhere than the
    model says, and `llm_hash` its content hash, where that is known: process 0 reads all of it
    otherwise.

    Raises:
      ValueError: no L2S model is there, or its LLM is gone or no longer the same.
    """
    fields, path = read_fields(directory)
    check_hashes(directory)
    llm_path = llm_directory or _llm_path(directory, fields["llm"]["path"])
    expected, layer = fields["llm"]["content_hash"], fields["llm"]["layer"]
    slm_config = pretrained.config_from_native(fields["slm"], path)
    slm_config = dataclasses.replace(slm_config, dtype=dtype)
    slm_config = with_vocabulary(slm_config, read_kept(directory))
    names = ("fusion", "projector_width", "shared_vocabulary")
    settings = {name: fields[name] for name in names}
    settings |= {name: fields[name] for name in _JOINED if name in fields}
    if "layers" in settings:
        settings["layers"] = tuple(map(tuple, settings["layers"]))
    encoder, frozen = pretrained.load_encoder(
        llm_path,
        layer=layer,
        dtype=encoder_dtype or dtype,
        weights=weights,
        mesh=mesh,
        scan_layers=scan_layers,
        entries=entries,
        is_known=True,
    )
    if (llm_hash or (content_hash(llm_path) if hashes_here() else expected)) != expected:
        raise ValueError(
            f"{llm_path}: this LLM is not the one that {directory} was trained with "
            "(content hashes differ)"
        )
    check_layers(path, encoder.config, settings.get("layers", ()))
    with TensorFiles(directory, "params") as files:
        pretrained.check_layers(slm_config, files, path, stack=settings.get("stack", 0))
        system = LlmToSlm(encoder.config, slm_config, **settings)
        shapes = _shapes(system)
        return system, read_params(files, own_entries(shapes), shapes), frozen


def load_tokenizers(directory: str) -> tuple[Tokenizer, Tokenizer]:
    """(the prompts' tokenizer, the responses'), which are often the same, or one cut from it."""
    own = load_tokenizer(directory)
    of_llm = os.path.join(directory, _LLM_TOKENIZER)
    return (load_tokenizer(of_llm) if is_folder(of_llm) else whole_of(own)), own
