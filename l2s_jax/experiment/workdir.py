"""The working directory of an experiment: stages, each made once from its inputs.

DIR/STAGE/stage.json records what a stage was made from. A stage whose inputs are unchanged is found
again, one whose inputs changed is moved aside, so that nothing is lost or overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from l2s_jax import files, sealed
from l2s_jax.config import of_settings
from l2s_jax.files import is_bucket, plain, read_json, write_json
from l2s_jax.messages import shown
from l2s_jax.settings.declare import read
from l2s_jax.settings.moved import upgraded
from l2s_jax.settings.sections import Settings

# Of a comparison: where its variants' stages lie, each once.
SHARED = "shared"
_RECORD = "stage.json"
# Keys of a record that are no inputs.
_VERSION, _RUN, _SOURCES, _EXTENDED = "version", "run", "sources", "extended"
# Trained for longer, a model is the same one, further on.
_STEPS, _SCHEDULE = "train.steps", "train.schedule"


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """sha256 (hex) of JSON-able values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


class Record:
    """DIR/STAGE/stage.json: inputs of a stage, a version of its code, and the name of its run.

    The run's name is that of the checkpoints that belong to it. Version 0.1 wrote only inputs, and
    other ones: what is in both must agree, and the rest is taken as found.
    """

    def __init__(self, workdir: str, name: str):
        self.directory = os.path.join(workdir, name)
        self._path = os.path.join(self.directory, _RECORD)

    def read(self) -> dict[str, Any] | None:
        """What is recorded; None where nothing is."""
        if not files.is_file(self._path):
            return None
        found = sealed.without_hash(read_json(self._path), self._path)
        train, extended = found.get("train", {"steps": 0}), found.get(_EXTENDED, [])
        are_steps = isinstance(extended, list) and all(type(steps) is int for steps in extended)
        for name, value, kind in (
            (_VERSION, found.get(_VERSION, 0), int),
            (_RUN, found.get(_RUN, ""), str),
            (_EXTENDED, extended if are_steps else None, list),
            ("train.steps", train.get("steps", 0) if isinstance(train, dict) else None, int),
        ):
            if type(value) is not kind or (_VERSION in found) != (_RUN in found):
                raise ValueError(
                    f"{self._path}: {name} is {shown(value)}: damaged; move {self.directory} away, "
                    "and the same command makes it again"
                )
        return found

    @property
    def run(self) -> str:
        """The name of the run, hex."""
        found = self.read()
        if found is None:
            raise ValueError(f"{self._path}: no such file")
        return found[_RUN]

    def write(
        self,
        inputs: Mapping[str, Any],
        version: int,
        sources: Mapping[str, str] | None = None,
        extended: Sequence[int] = (),
    ) -> None:
        """Records inputs; the run stays the one that it was.

        `sources` say for people where the inputs came from, and are not compared. `extended` are
        steps that a training was to end at and went on from, beside those that are recorded.
        """
        found = self.read()
        if found is None:
            run = uuid.uuid4().hex
        elif is_old(found):
            run = fingerprint(found)  # what the checkpoints of version 0.1 say
        else:
            run = found[_RUN]
        files.make_folder(self.directory)
        content = {**plain(inputs), _VERSION: version, _RUN: run}
        if steps := sorted({*(found or {}).get(_EXTENDED, ()), *extended}):
            content[_EXTENDED] = steps
        if sources:
            content[_SOURCES] = dict(sources)
        write_json(self._path, sealed.with_hash(content), sort_keys=True)

    def follow(self, other: Record) -> None:
        """Records that another one's training, from where this one goes on, was extended."""
        ours, theirs = self.read() or {}, (other.read() or {}).get(_EXTENDED, [])
        own = ours.get(_EXTENDED, [])
        if steps := set(theirs) - set(own):
            content = {**ours, _EXTENDED: sorted([*own, *steps])}
            write_json(self._path, sealed.with_hash(content), sort_keys=True)

    @contextlib.contextmanager
    def filling(self, last: str) -> Iterator[str]:
        """Gives a folder whose files come into the stage's when the block ends, `last` at the end.

        So the stage has all of them, hashes too, once it has that one.
        """
        with tempfile.TemporaryDirectory() as temporary:
            yield temporary
            for name in sorted(os.listdir(temporary), key=lambda name: (name == last, name)):
                content = files.read_bytes(os.path.join(temporary, name))
                files.write_bytes(os.path.join(self.directory, name), content)

    @property
    def is_link(self) -> bool:
        """Whether the stage lies elsewhere."""
        return not is_bucket(self.directory) and os.path.islink(self.directory)

    def link(self, place: Record) -> None:
        """Has the stage lie in another record's folder; a folder that was here is moved aside."""
        os.makedirs(place.directory, exist_ok=True)
        folder = os.path.dirname(self.directory)
        os.makedirs(folder, exist_ok=True)
        # Relative, so that the whole may be moved.
        target = os.path.relpath(os.path.realpath(place.directory), os.path.realpath(folder))
        if self.is_link:
            if os.readlink(self.directory) == target:
                return
            os.remove(self.directory)
        elif os.path.exists(self.directory):
            self.move_aside()
        os.symlink(target, self.directory)

    def move_aside(self) -> str:
        """Renames the stage's folder to NAME.old1, NAME.old2, ...; gives the new name."""
        number = 1
        while files.exists(f"{self.directory}.old{number}"):
            number += 1
        aside = f"{self.directory}.old{number}"
        files.rename_folder(self.directory, aside, _RECORD)
        return aside


def is_old(found: Mapping[str, Any]) -> bool:
    """Whether version 0.1 wrote what a record holds."""
    return _VERSION not in found


def changes(
    found: Mapping[str, Any], inputs: Mapping[str, Any], old: Mapping[str, Any], version: int
) -> list[str]:
    """Names of what a record holds otherwise.

    Inputs that are None are unknown here, and are taken as found.

    Args:
      found: what the record holds.
      inputs: of the stage, as they are now.
      old: inputs that only version 0.1 recorded.
      version: of the stage's code.
    """
    if is_old(found):
        return differences(found, plain({**inputs, **old}), common=True)
    changed = differences(
        {k: v for k, v in found.items() if k not in (_VERSION, _RUN, _SOURCES, _EXTENDED)},
        plain(inputs),
    )
    return changed if found[_VERSION] == version else ["the code", *changed]


def only_longer(found: Mapping[str, Any], inputs: Mapping[str, Any], changed: list[str]) -> bool:
    """Whether all that has changed is that training is to take more steps."""
    if changed != [_STEPS] or not holds(found, _STEPS):
        return False
    return inputs["train"]["steps"] > found["train"]["steps"]


def rises_again(found: Mapping[str, Any]) -> bool:
    """Whether the learning rate of a training rises again where it is extended."""
    return holds(found, _SCHEDULE) and found["train"]["schedule"] == "cosine"


def in_one_go(found: Mapping[str, Any]) -> bool:
    """Whether a record is of what is made where its inputs are so from the beginning."""
    return not (found.get(_EXTENDED) and rises_again(found))


def holds(values: Mapping[str, Any], key: str) -> bool:
    """Whether there is a value at a dotted key."""
    first, _, rest = key.partition(".")
    if not isinstance(values, Mapping) or first not in values:
        return False
    return holds(values[first], rest) if rest else True


def without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The values without the one at a dotted key, if there is one."""
    first, _, rest = key.partition(".")
    if not rest:
        return {name: value for name, value in values.items() if name != first}
    inner = values.get(first)
    if not isinstance(inner, Mapping):
        return dict(values)
    return {**values, first: without(inner, rest)}


def differences(old: Any, new: Any, prefix: str = "", *, common: bool = False) -> list[str]:
    """Paths at which two JSON values differ; `common`: of those that both have.

    What is None in the new one is unknown, and taken as it is in the old one; what is not in it is
    another value.
    """
    if new is None and prefix:
        return []
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix]
    names = old.keys() & new.keys() if common else old.keys() | new.keys()
    changed = []
    for name in sorted(names):
        path = f"{prefix}.{name}".lstrip(".")
        if name in new:
            changed += differences(old.get(name), new[name], path, common=common)
        else:
            changed.append(path)
    return changed


def write_config(workdir: str, config: ConfigDict) -> None:
    """Keeps the config of the newest run as DIR/config.json."""
    files.make_folder(workdir)
    write_json(os.path.join(workdir, "config.json"), config.to_dict(), sort_keys=True)


def check_shared(workdir: str) -> None:
    """Raises a ValueError, on all processes of a job, unless all see the same workdir."""
    # Imported here, so that the rest of this module doesn't wait for JAX.
    from l2s_jax.cluster import distributed

    path = os.path.join(workdir, ".shared")

    def write() -> str:
        write_json(path, {"token": uuid.uuid4().hex})
        return read_json(path)["token"]

    token = distributed.on_primary(write)
    seen = files.is_file(path) and read_json(path)["token"] == token
    blind = [number for number, sees in enumerate(distributed.exchange(seen)) if not sees]
    distributed.on_primary(lambda: files.remove(path))
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
    if not files.is_file(path):
        raise ValueError(f"{path}: no such file; expected the workdir of a run, or --config")
    return of_settings(read(Settings, upgraded(read_json(path)), f"{path}: config"))
