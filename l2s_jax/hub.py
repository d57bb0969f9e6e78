"""Names on the Hugging Face hub, wherever a folder may stand: "org/name" or "org/name@revision".

Through `huggingface_hub`, with its cache, token, progress bars and offline mode.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from typing import Any

from l2s_jax.copies import PICKLES, local
from l2s_jax.files import absolute, exists, is_bucket, matching_names
from l2s_jax.gguf_file import is_gguf

# Of which a tokenizer needs one: a tokenizer of bytes, ByT5's, has none, and is not read.
VOCABULARY_FILES = (
    "spiece.model",
    "tokenizer.model",
    "tekken.json",
    "tokenizer.json",
    "vocab.json",
)
# Beside the weights of a model, and of use in any format.
TOKENIZER_FILES = (
    *VOCABULARY_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocabulary.json",  # ours: which of the pieces write responses
    "chat_template.jinja",
    "chat_template.json",
)
_CONFIGS = ("config.json", "generation_config.json", "SHA256SUMS")
_WEIGHTS = tuple(
    f"{stem}{rest}.safetensors{index}"
    for stem in ("model", "params")
    for rest, index in (("", ""), ("-*-of-*", ""), ("", ".index.json"))
)
# Of a model of ours: its LLM, and the LLM's tokenizer.
_FOLDERS = ("llm/*.json", "llm/params*.safetensors", "llm/SHA256SUMS", "llm_tokenizer/*")
PARTS = {
    "config": _CONFIGS,
    "tokenizer": (*_CONFIGS, *TOKENIZER_FILES, "llm_tokenizer/*"),
    "all": (*_CONFIGS, *TOKENIZER_FILES, *_WEIGHTS, *_FOLDERS, "README.md"),
}
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_name(path: str) -> bool:
    """Whether nothing lies at a path that could be the name of a repository."""
    if is_bucket(path):
        return False
    there = os.path.exists(os.path.expanduser(path))
    return not there and not is_gguf(path) and bool(_NAME.fullmatch(path))


def find(path: str, part: str = "all") -> str:
    """A path as it is, also of a bucket, if something lies there; else a repository's folder.

    Args:
      path: a folder or file, "org/name", or "org/name@revision".
      part: of a repository what is needed, one of PARTS, which is downloaded where it isn't in the
        cache. In a process a name stands for one commit, whoever asks for whatever part.

    Raises:
      ValueError: one line: there is no such thing, it can't be had, or not as a whole.
    """
    if is_bucket(path):
        return local(path) if is_gguf(path) else _in_bucket(path)  # (one is read in place)
    expanded = os.path.expanduser(path)
    if exists(expanded):
        return expanded
    if not is_name(path):
        raise ValueError(f"{path}: no such {'file' if is_gguf(path) else 'directory'}")
    return _download(path, part)


@functools.cache
def _in_bucket(path: str) -> str:
    """The path, once something is found there: many ask, of what a process goes on to read."""
    if not exists(path):
        raise ValueError(f"{path}: no such directory")
    return path


def cached(path: str, part: str = "all") -> str | None:
    """As `find`, of what is on this machine; None where it isn't."""
    if not is_name(path):
        there = os.path.expanduser(path)
        return there if exists(there) else None
    import huggingface_hub

    name, _, revision = path.partition("@")
    try:
        return huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=list(PARTS[part]), local_files_only=True
        )
    except (OSError, ValueError):
        return None


def reference(path: str) -> str:
    """What to record of a path: "org/name@commit" of a repository, else where it lies."""
    if not is_name(path):
        return absolute(os.path.expanduser(path))
    return f"{path.partition('@')[0]}@{os.path.basename(find(path, 'config'))}"


@functools.cache
def _commits() -> dict[str, str]:
    """What names stand for in this process."""
    return {}


@functools.cache
def _download(path: str, part: str) -> str:
    # Imported here: it takes a while, and most runs have their checkpoints in folders.
    import huggingface_hub

    name, _, revision = path.partition("@")
    revision = _commits().get(path, revision) or "main"
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(PARTS[part])
        )
        _commits()[path] = os.path.basename(folder)
        if part == "all" and not matching_names(folder, "*.safetensors"):
            _raise_without_weights(path, name, os.path.basename(folder))
        return folder
    except Exception as error:  # of its transport's errors the library says nothing
        if isinstance(error, ValueError) and str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: {_reason(error, name, revision)}") from None


def check_name(name: str) -> None:
    """Raises a ValueError unless a model can be published under that name."""
    if not _NAME.fullmatch(name) or "@" in name:
        raise ValueError(f"{name!r}: not a name on the hub, expected one like 'org/name'")


def push(folder: str, name: str, *, private: bool) -> str:
    """Publishes a folder as a repository, which is made if need be; gives "org/name@commit".

    Raises:
      ValueError: the hub refuses it, or can't be reached.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="An L2S model, by l2s_jax"
        )
    except Exception as error:
        raise ValueError(f"{name}: not published: {_reason(error, name, 'main')}") from None
    return f"{name}@{commit.oid}"


def _raise_without_weights(path: str, name: str, commit: str) -> None:
    import huggingface_hub

    files = huggingface_hub.HfApi().list_repo_files(name, revision=commit)
    if pickles := sorted(file for file in files if file.endswith(PICKLES)):
        raise ValueError(
            f"{path}: the repository has pickled weights only ({pickles[0]}), which are not read; "
            "expected safetensors"
        )
    if ggufs := sorted(file for file in files if is_gguf(file)):
        raise ValueError(
            f"{path}: the repository has GGUF files only; expected the path of one, which "
            f"`hf download {name} {ggufs[0]}` fetches"
        )
    raise ValueError(f"{path}: the repository has no model.safetensors")


def _reason(error: Exception, name: str, revision: str) -> str:
    """What went wrong, for people."""
    from huggingface_hub import constants, errors

    known: tuple[tuple[Any, str], ...] = (
        (
            errors.GatedRepoError,
            f"the repository is gated: ask for access on {constants.ENDPOINT}/{name}, then give "
            "your token with `hf auth login` or HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            f"no such directory, and {constants.ENDPOINT} has no such repository, or a private one "
            "that wants a token (`hf auth login` or HF_TOKEN)",
        ),
        (errors.RevisionNotFoundError, f"the repository has no revision {revision!r}"),
        (errors.HFValidationError, "no such directory, and not the name of a repository"),
    )
    for kind, reason in known:
        if isinstance(error, kind):
            return reason
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 9:
        chain.append(cause)  # type: ignore[arg-type]
    for one in chain:
        if isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT):
            return f"the disk is full: the download to {constants.HF_HUB_CACHE} did not end"
    if constants.HF_HUB_OFFLINE:
        return (
            f"no such directory, and not, or not as a whole, in {constants.HF_HUB_CACHE}, while "
            "HF_HUB_OFFLINE forbids a download"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return f"{constants.ENDPOINT} answered {error.response.status_code}"
    if isinstance(error, errors.LocalEntryNotFoundError) or not isinstance(error, OSError):
        return (
            f"no such directory, and {constants.ENDPOINT} can't be reached to look for a "
            f"repository ({type(chain[-1]).__name__})"
        )
    return f"cannot be downloaded: {' '.join(str(error).split())}"
