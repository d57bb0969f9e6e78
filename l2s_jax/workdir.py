"""The working directory of an experiment: stages, each made once from its inputs.

DIR/STAGE/stage.json records what a stage was made from; a stage whose inputs are unchanged is
found again, one whose inputs changed is moved aside, so that nothing is lost or overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from l2s_jax import distributed
from l2s_jax.config import of_settings
from l2s_jax.convert.files import read_json
from l2s_jax.settings.declare import read
from l2s_jax.settings.moved import upgraded
from l2s_jax.settings.sections import Settings

log = logging.getLogger(__name__)

_INPUTS = "stage.json"


def plain(value: Any) -> Any:
    """What `value` becomes on its way through JSON."""
    return json.loads(json.dumps(value))


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON-able values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def write_json(path: str, value: Any) -> None:
    """Writes a JSON file that is never seen half-written."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=True)
        file.write("\n")
    os.replace(temporary, path)


def open_stage(workdir: str, name: str, inputs: Mapping[str, Any]) -> str:
    """The directory of stage `name`, which holds only work on these `inputs`.

    If it holds work on others, that is moved to NAME.old1, NAME.old2, ...
    """
    directory = os.path.join(workdir, name)
    record = os.path.join(directory, _INPUTS)
    inputs = plain(inputs)
    if os.path.exists(record):
        found = read_json(record)
        if found == inputs:
            return directory
        number = 1
        while os.path.exists(f"{directory}.old{number}"):
            number += 1
        os.rename(directory, f"{directory}.old{number}")
        log.info(
            "stage %s: %s changed; what was there is kept in %s.old%d",
            name,
            ", ".join(_differences(found, inputs)),
            directory,
            number,
        )
    os.makedirs(directory, exist_ok=True)
    write_json(record, inputs)
    return directory


def find_stage(workdir: str, name: str, inputs: Mapping[str, Any]) -> str:
    """The directory of stage `name`, which must hold work on these `inputs`; changes nothing.

    Raises:
      ValueError: there is none, or it was made from others.
    """
    directory = os.path.join(workdir, name)
    record = os.path.join(directory, _INPUTS)
    if not os.path.exists(record):
        raise ValueError(f"{directory}: no such stage; expected the workdir of a finished run")
    if changed := _differences(read_json(record), plain(inputs)):
        raise ValueError(
            f"{directory}: made with other settings of {', '.join(changed)}; "
            "--mode=train makes it anew"
        )
    return directory


def _differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Paths at which two JSON values differ."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    return [
        path
        for key in sorted(old.keys() | new.keys())
        for path in _differences(old.get(key), new.get(key), f"{prefix}.{key}".lstrip("."))
    ]


@contextlib.contextmanager
def atomic_directory(path: str) -> Iterator[str]:
    """Gives a temporary directory that becomes `path` when the block ends without an error."""
    temporary = f"{os.path.normpath(path)}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    os.makedirs(temporary)
    try:
        yield temporary
        os.rename(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_config(workdir: str, config: ConfigDict) -> None:
    """Keeps the config of the newest run as DIR/config.json."""
    os.makedirs(workdir, exist_ok=True)
    write_json(os.path.join(workdir, "config.json"), config.to_dict())


def check_shared(workdir: str) -> None:
    """Raises a ValueError, on all processes of a job, unless all see the same workdir."""
    path = os.path.join(workdir, ".shared")

    def write() -> str:
        write_json(path, {"token": uuid.uuid4().hex})
        return read_json(path)["token"]

    token = distributed.on_primary(write)
    seen = os.path.exists(path) and read_json(path)["token"] == token
    blind = [number for number, sees in enumerate(distributed.exchange(seen)) if not sees]
    distributed.on_primary(lambda: os.remove(path))
    if blind:
        raise ValueError(
            f"{workdir}: process {blind[0]} does not see what process 0 writes there; expected a "
            "folder that all hosts share"
        )


def read_config(workdir: str) -> ConfigDict:
    """The config of the newest run in `workdir`.

    Settings that there were not yet when it was written have their defaults, and those that have
    moved since are where they belong. A setting without effect may be among them.

    Raises:
      ValueError: there was none, or it holds what is no setting.
    """
    path = os.path.join(workdir, "config.json")
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; expected the workdir of a run, or --config")
    return of_settings(read(Settings, upgraded(read_json(path)), f"{path}: config"))
