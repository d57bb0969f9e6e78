"""Content hashes of what an experiment reads, remembered in DIR/hashes.json.

A hash is remembered with the size and the age of the files behind it, in a bucket with their tags
in the place of an age, so that gigabytes are read again only where one of these has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from l2s_jax import sealed
from l2s_jax.data.table import Example
from l2s_jax.experiment.workdir import fingerprint
from l2s_jax.files import (
    is_bucket,
    is_file,
    is_folder,
    read_bytes,
    read_json,
    signatures,
    write_json,
)
from l2s_jax.sealed import with_hash, without_hash


class Hashes:
    """The hashes that a workdir remembers; a new one is written to it if `keep`."""

    def __init__(self, workdir: str, *, keep: bool):
        self._path = os.path.join(workdir, "hashes.json")
        self._keep = keep
        self._known: dict[str, Any] = {}
        self._is_written = True
        for name, known in (read_json(self._path) if is_file(self._path) else {}).items():
            # What is damaged is made again. (Older versions wrote no hash of it.)
            with contextlib.suppress(ValueError):
                if isinstance(known, dict) and {"files", "hash"} <= known.keys():
                    without_hash(known, self._path)
                    self._known[name] = known
        # Those that are read again before they count.
        self._doubted = set(self._known) if sealed.is_anew() else set()

    def of(
        self,
        what: Any,
        files: Sequence[str],
        compute: Callable[[], str],
        *,
        write: bool = True,
    ) -> str:
        """The hash of `what` (JSON-able), which `compute` makes of `files`.

        Without files, or where one is a URL that is in no bucket, it is computed at every start.
        Without `write` it is written with the next one that is asked for.
        """
        facts = _facts(files)
        name = fingerprint({"of": what})
        known = self._known.get(name)
        if known and name not in self._doubted and (facts is None or known["files"] == facts):
            if write and not self._is_written:
                self._write()
            return known["hash"]
        value = compute()
        self._doubted.discard(name)
        self._remember(what, facts, value, write=write)
        return value

    def remember(self, what: Any, files: Sequence[str], value: str) -> None:
        """Has `of` give this hash of `what`, as long as `files` are as they are."""
        self._remember(what, _facts(files), value)

    def _remember(
        self, what: Any, facts: list[list[Any]] | None, value: str, *, write: bool = True
    ) -> None:
        name = fingerprint({"of": what})
        if self._known.get(name, {}).get("hash") == value and self._known[name]["files"] == facts:
            return
        self._known[name] = with_hash({"files": facts, "hash": value})
        self._is_written = self._is_written and not facts
        if write:
            self._write()

    def _write(self) -> None:
        workdir = os.path.dirname(self._path)
        if not self._is_written and self._keep and (is_bucket(workdir) or is_folder(workdir)):
            self._is_written = True
            lasting = {name: known for name, known in self._known.items() if known["files"]}
            write_json(self._path, lasting, sort_keys=True)


def _facts(files: Sequence[str]) -> list[list[Any]] | None:
    try:
        return signatures(files) or None
    except OSError:
        return None


def examples_hash(examples: Iterable[Example], *, responses: bool) -> str:
    """sha256 (hex) over prompts, and responses where asked for, in order."""
    return _hash_of_texts(
        text for example in examples for text in (example.prompt, example.response)[: 1 + responses]
    )


def references_hash(examples: Iterable[Example]) -> str:
    """sha256 (hex) over the references of each example, in order, and how many it has."""
    return _hash_of_texts(
        text for example in examples for text in (str(len(example.references)), *example.references)
    )


def _hash_of_texts(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        encoded = text.encode(errors="surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def hash_of_files(paths: Iterable[str]) -> str:
    """sha256 (hex) over the hashes of files, in order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(read_bytes(path)).digest())
    return digest.hexdigest()
