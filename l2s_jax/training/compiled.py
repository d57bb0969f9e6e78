"""Training steps that were compiled before a run, in a folder: what they are of, and their loading.

The folder holds compiled.json, which says what each step was compiled from, and a file for each. A
file is a pickle in part: whoever can write one can run code where it is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from l2s_jax import files, messages, sealed
from l2s_jax.cluster import sharding
from l2s_jax.models.systems import Params
from l2s_jax.training import PRNG
from l2s_jax.training.distillation import Distillation
from l2s_jax.training.update import Trainable, TrainState

INDEX = "compiled.json"
_KIND = "training steps compiled by l2s_jax"
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
# How JAX makes programs.
_OPTIONS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_enable_x64",
    "jax_memory_fitting_level",
    "jax_numpy_dtype_promotion",
    "jax_optimization_level",
    "jax_threefry_partitionable",
)
_NO_MATTER = re.compile("--xla_(dump|force_host_platform_device_count)")
# Of a training: these are not in its step.
_OUTSIDE = (
    "evaluate_every", "log_every", "max_bad_steps", "save_minutes", "select", "selection_examples",
)  # fmt: skip

# Nor are these of a model: where responses end, and the dropout of an LLM that only encodes.
_UNUSED = re.compile(r".*\.(pad_id|eos_id|llm_config\.dropout_rate)")

Facts = Mapping[str, str]


def surroundings(mesh: Mesh) -> dict[str, str]:
    """What all programs for a mesh depend on, of this process and its devices."""
    devices = list(mesh.devices.flat)
    kind = devices[0].platform
    facts = {
        "the number and kind of devices": f"{len(devices)} x {devices[0].device_kind}",
        "the mesh": sharding.axes_name([mesh.shape[axis] for axis in sharding.AXES]),
    }
    for i, device in enumerate(devices):
        facts[f"device {i} of the mesh"] = _place(device)
    names, variables = _PACKAGES, ("XLA_FLAGS",)  # these tell the compiler from outside
    if kind == "tpu":
        names, variables = (*names, "libtpu"), (*variables, "LIBTPU_INIT_ARGS")
    facts |= {f"the version of {name}": _version(name) for name in names}
    facts["the code of l2s_jax"] = _code()
    for name in variables:
        flags = sorted(os.environ.get(name, "").split())
        facts[name] = " ".join(flag for flag in flags if not _NO_MATTER.match(flag))
    facts |= {name: str(getattr(jax.config, name, None)) for name in _OPTIONS}
    if kind == "cpu":
        facts["the processor"] = _processor()
    return facts


def step_facts(
    system: Trainable,
    config: ConfigDict,
    seed: int,
    distillation: Distillation | None,
    state: TrainState,
    frozen: Params,
    prng: str = PRNG,
) -> dict[str, str]:
    """What the steps of one training depend on beside that; arrays may be shapes with shardings."""
    settings = {name: one for name, one in config.to_dict().items() if name not in _OUTSIDE}
    given = {
        "train": settings,
        "seed": seed,
        "prng": prng,
        "distillation": distillation and distillation._asdict(),
        "system": system,
    }
    facts = {name: text for name, text in _flat(given) if not _UNUSED.fullmatch(name)}
    return facts | _arrays({"state": state, "frozen": frozen})


def bucket_name(widths: Iterable[int]) -> str:
    """Of a bucket of so many tokens of prompts and of responses: 128x64."""
    return "x".join(map(str, widths))


class CompiledSteps:
    """The steps in a folder, for the devices of a mesh."""

    def __init__(self, directory: str, mesh: Mesh):
        """Reads compiled.json and checks every file beside it.

        Raises:
          ValueError: it is not there, damaged, not ours, or made for others than these devices and
            this code.
        """
        self._directory, self._path = directory, os.path.join(directory, INDEX)
        index = read_index(directory)
        self._stages: dict[str, Any] = index["stages"]
        self._compare("", surroundings(mesh), index["surroundings"])
        for stage in self._stages.values():
            for bucket in stage["buckets"].values():
                self._read(bucket)

    def check(self, stage: str, facts: Facts, bucket: str, batch: Mapping[str, Any]) -> None:
        """Checks that the step of a stage's bucket is there, and was compiled from `facts`.

        Raises:
          ValueError: it is not, or was compiled from others.
        """
        if stage not in self._stages:
            found = ", ".join(self._stages)
            raise ValueError(
                f"{self._path}: no step of the stage {stage}: expected one beside {found}"
            )
        self._compare(f"of {stage} ", facts, self._stages[stage]["facts"])
        buckets = self._stages[stage]["buckets"]
        if bucket not in buckets:
            raise ValueError(
                f"{self._path}: no step of {stage} for the bucket {bucket}: expected it beside "
                f"{', '.join(buckets)}"
            )
        self._compare(f"of {stage} {bucket} ", _arrays({"batch": batch}), buckets[bucket]["batch"])

    def step(
        self,
        stage: str,
        system: Trainable,
        config: ConfigDict,
        seed: int,
        distillation: Distillation | None,
        prng: str = PRNG,
    ) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The stage's step as of `update.make_step`: (state, frozen, batch) -> (state, metrics).

        The step of a bucket is checked and loaded when its first batch comes, as of `check`.
        """
        loaded: dict[str, Callable[..., Any]] = {}

        def run(state: TrainState, frozen: Params, batch: Mapping[str, Any]) -> Any:
            names = (system.prompt_name, "response")
            bucket = bucket_name(batch[f"{name}_ids"].shape[1] for name in names)
            if bucket not in loaded:
                facts = step_facts(system, config, seed, distillation, state, frozen, prng)
                self.check(stage, facts, bucket, batch)
                loaded[bucket] = self._load(stage, bucket, state, frozen, batch)
            return loaded[bucket](state, frozen, batch)

        return run

    def _load(
        self, stage: str, bucket: str, state: Any, frozen: Params, batch: Mapping[str, Any]
    ) -> Callable[..., Any]:
        entry = self._stages[stage]["buckets"][bucket]
        content = self._read(entry)
        metrics = dict.fromkeys(self._stages[stage]["metrics"], 0)
        given = jax.tree.structure(((state, frozen, dict(batch)), {}))
        gives = jax.tree.structure((state, metrics))
        try:
            return serialize_executable.deserialize_and_load(content, given, gives)
        except Exception as error:  # whatever a pickle or a compiler's library may raise
            path = os.path.join(self._directory, entry["file"])
            raise ValueError(f"{path}: cannot be loaded: {messages.one_line(error)}") from error

    def _read(self, entry: Mapping[str, str]) -> bytes:
        """The content of a step's file, which is that of its hash."""
        path = os.path.join(self._directory, entry["file"])
        try:
            content = files.read_bytes(path)
        except FileNotFoundError:
            raise ValueError(f"{path}: no such file, which {INDEX} names") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise ValueError(
                f"{path}: damaged, or not the file that was written: its SHA-256 is not the one in "
                f"{INDEX}"
            )
        return content

    def _compare(self, whose: str, expected: Facts, found: Facts) -> None:
        for name in (*expected, *found):
            one, other = expected.get(name, ""), found.get(name, "")
            if one != other:
                raise ValueError(
                    f"{self._path}: compiled for another run: {name} {whose}is "
                    f"{other or 'nothing'}, expected {one or 'nothing'}; make the plan again, or "
                    "leave out --compiled"
                )


def read_index(directory: str) -> dict[str, Any]:
    """The content of a folder's compiled.json.

    Raises:
      ValueError: there is none, or it is damaged or not ours.
    """
    path = os.path.join(directory, INDEX)
    found = files.read_json(path)
    if found.get("kind") != _KIND:
        raise ValueError(f"{path}: not ours: expected what --mode=plan --compiled=DIR writes")
    return sealed.without_hash(found, path, needed=True)


class Writer:
    """Writes steps into a folder, which has them, and no others, when its block ends.

    Where the block ends with an error, the folder has those that it had before.
    """

    def __init__(self, directory: str, mesh: Mesh):
        """Makes the folder.

        Raises:
          ValueError: it has a compiled.json that is damaged or not ours.
        """
        self._directory, self._path = directory, os.path.join(directory, INDEX)
        self._old = read_index(directory)["stages"] if files.exists(self._path) else {}
        files.make_folder(directory)
        self._surroundings = surroundings(mesh)
        self._stages: dict[str, Any] = {}

    def add(
        self,
        stage: str,
        facts: Facts,
        bucket: str,
        batch: Mapping[str, Any],
        compiled: jax.stages.Compiled,
    ) -> int:
        """Writes the step of a stage's bucket; gives its bytes."""
        content, _, gives = serialize_executable.serialize(compiled)
        hash = hashlib.sha256(content).hexdigest()
        # Of its own name, so that what is there stays whole until all is written.
        name = f"{stage}-{bucket}-{hash[:16]}.step"
        files.write_bytes(os.path.join(self._directory, name), content)
        _, metrics = jax.tree.unflatten(gives, [0] * gives.num_leaves)
        entry = self._stages.setdefault(
            stage, {"facts": dict(facts), "metrics": sorted(metrics), "buckets": {}}
        )
        batch = _arrays({"batch": batch})
        entry["buckets"][bucket] = {"file": name, "sha256": hash, "batch": batch}
        return len(content)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            index = {"kind": _KIND, "surroundings": self._surroundings, "stages": self._stages}
            files.write_json(self._path, sealed.with_hash(index))
            gone, kept = self._old, self._stages
        else:
            gone, kept = self._stages, self._old
        for name in _files(gone) - _files(kept):
            with contextlib.suppress(OSError):
                files.remove(os.path.join(self._directory, name))


def _files(stages: Mapping[str, Any]) -> set[str]:
    return {one["file"] for stage in stages.values() for one in stage["buckets"].values()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, text) of all that is in mappings and dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, type(value).__name__
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        for key, one in value.items():
            yield from _flat(one, f"{name}.{key}" if name else str(key))
    else:
        yield name, repr(value)


def _arrays(tree: Any) -> dict[str, str]:
    """Shapes, dtypes and places of a tree's arrays, by their paths."""

    def text(leaf: Any) -> str:
        place = leaf.sharding
        axes = list(place.spec) if isinstance(place, NamedSharding) else [place]
        while axes and axes[-1] is None:
            axes.pop()
        return f"{leaf.dtype}{list(leaf.shape)} over {axes}"

    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): text(x) for path, x in flat}


def _place(device: Any) -> str:
    coordinates = getattr(device, "coords", None)
    if coordinates is None:
        return f"{device.id}"
    core, slice_index = device.core_on_chip, getattr(device, "slice_index", None) or 0
    where = ", ".join(map(str, coordinates))
    return f"{device.id} at ({where}), core {core} of slice {slice_index}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _code() -> str:
    """A hash of the package's modules."""
    root = pathlib.Path(__file__).resolve().parent.parent
    return sealed.hash_of(
        {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in root.rglob("*.py")
        }
    )


def _processor() -> str:
    """What a program for a CPU is compiled for: its kind, and a hash of what it can do."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    found = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    flags = sorted(found[1].split()) if found else []
    return f"{platform.machine()}, {hashlib.sha256(' '.join(flags).encode()).hexdigest()[:16]}"
