"""Token ids of a split, kept in the workdir: DIR/tokens/HASH/tokens-NUMBER-HASH.arrow.

The folder's hash is of all that decides the tokens, so what is in it is never stale. Each file has
the tokens of so many examples, as Arrow writes lists, and the hash of its content in its name. A
run that is interrupted goes on with the files that are missing. Files are mapped into memory: the
processes of a machine share what the system keeps of them, and a row is read in a microsecond.
(ArrayRecord, whose records are larger elsewhere, takes ten and more, and 40% more room.)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from l2s_jax import sealed
from l2s_jax.cluster import distributed
from l2s_jax.copies import local
from l2s_jax.data import fitting
from l2s_jax.data.ragged import Ragged
from l2s_jax.data.table import Example, chunks
from l2s_jax.data.tokens import AT_ONCE, Loss, Tokenization, Tokens, total
from l2s_jax.files import (
    UNFINISHED,
    is_bucket,
    is_file,
    make_folder,
    matching_names,
    read_json,
    remove,
    write_bytes,
    write_json,
)

log = logging.getLogger(__name__)

# Of the code that tokenizes and writes: higher where it gives other tokens.
VERSION = 1
# Written last: what the tokens are of, and how many files there are.
_FACTS = "tokens.json"
_NAME = re.compile(r"tokens-(\d{5,})-([0-9a-f]{16})\.arrow")


def kept(
    directory: str, identity: Mapping[str, Any], examples: Iterable[Example], how: Tokenization
) -> Tokens:
    """Tokens of examples, from a folder; what is missing is made first.

    The processes of a job, which share the folder, call it together, and share the work. Examples
    are read only where something is missing.

    Args:
      directory: of these tokens alone.
      identity: what decides them, JSON-able.
      examples: what to tokenize.
      how: by which tokenizers, and how long.
    """
    files = distributed.on_primary(lambda: _whole(directory))
    if files is None:
        files = _made(directory, identity, examples, how)
    return joined([_read(os.path.join(directory, name)) for name in files], AT_ONCE)


def _made(
    directory: str, identity: Mapping[str, Any], examples: Iterable[Example], how: Tokenization
) -> list[str]:
    log.info("tokens: made of what is missing in %s", directory)
    there = {_number(name) for name in distributed.on_primary(lambda: _there(directory))}
    make_folder(directory)
    processes, me = jax.process_count(), jax.process_index()
    count = 0
    for number, some in enumerate(chunks(examples, AT_ONCE)):
        if number % processes == me and number not in there:
            _write(directory, number, how(some))
        count = number + 1
    distributed.barrier("tokens")

    def finish() -> list[str]:
        write_json(
            os.path.join(directory, _FACTS),
            sealed.with_hash({"files": count, "identity": dict(identity)}),
            sort_keys=True,
        )
        _tidy(directory)
        return _there(directory)

    return distributed.on_primary(finish)


def _whole(directory: str) -> list[str] | None:
    """Names of the files, in order; None where some are missing."""
    facts = os.path.join(directory, _FACTS)
    if not is_file(facts):
        return None
    try:
        count = sealed.without_hash(read_json(facts), facts, needed=True)["files"]
    except ValueError:
        return None
    files = _there(directory)
    return files if [*map(_number, files)] == [*range(count)] else None


def _there(directory: str) -> list[str]:
    """Names of the files that are as they were written, in order; others are removed."""
    found = {}
    for path in matching_names(directory, "tokens-*.arrow"):
        name = os.path.basename(path)
        if (parts := _NAME.fullmatch(name)) and _hash(path) == parts[2]:
            found[int(parts[1])] = name
        else:
            log.warning("%s: damaged; it is made again", path)
            with contextlib.suppress(FileNotFoundError):
                remove(path)
    return [found[number] for number in sorted(found)]


def _number(name: str) -> int:
    return int(name.split("-")[1])


def _hash(path: str) -> str:
    try:
        with open(local(path), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""


def _tidy(directory: str) -> None:
    """Removes what killed runs left of files that are all there now."""
    if not is_bucket(directory):
        for path in matching_names(directory, f"*{UNFINISHED}"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _write(directory: str, number: int, tokens: Tokens) -> None:
    columns = {
        "prompt": _lists(tokens.prompts),
        "response": _lists(tokens.responses),
        "cut": pa.array(tokens.cut),
    }
    batch = pa.record_batch(columns).replace_schema_metadata(
        {"loss": json.dumps(tokens.loss._asdict())}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue().to_pybytes()
    digest = hashlib.sha256(content).hexdigest()[:16]
    write_bytes(os.path.join(directory, f"tokens-{number:05d}-{digest}.arrow"), content)


def _lists(ragged: Any) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(ragged.offsets), pa.array(ragged.values))


def _read(path: str) -> Tokens:
    # (Arrow's own way to map a file keeps it open, of which a process may have a thousand.)
    mapped = np.memmap(local(path), np.uint8, mode="r")
    batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
    prompts, responses = (
        Ragged(batch[name].values.to_numpy(), batch[name].offsets.to_numpy())
        for name in ("prompt", "response")
    )
    loss = Loss(**json.loads(batch.schema.metadata[b"loss"]))
    fields = {field: fitting.Loss(*lost) for field, lost in loss.fields.items()}
    cut = batch["cut"].to_numpy(zero_copy_only=False)
    return Tokens(prompts, responses, cut, loss._replace(fields=fields))


class _Joined:
    """Sequences of parts, of which all but the last have `size`."""

    def __init__(self, parts: Sequence[Any], size: int):
        self._parts, self._size = parts, size
        self.lengths = np.concatenate([np.zeros(0, np.int32), *(part.lengths for part in parts)])

    def __getitem__(self, index: int) -> np.ndarray:
        part, place = divmod(index, self._size)
        return self._parts[part][place]


def joined(parts: Sequence[Tokens], size: int) -> Tokens:
    """The tokens of all parts, in order; all but the last have `size` examples."""
    return Tokens(
        _Joined([part.prompts for part in parts], size),
        _Joined([part.responses for part in parts], size),
        np.concatenate([np.zeros(0, bool), *(part.cut for part in parts)]),
        total(part.loss for part in parts),
    )
