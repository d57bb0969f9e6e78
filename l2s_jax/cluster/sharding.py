"""Where arrays live: the mesh, and the rules from parameter paths to its axes.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `sequence` splits the
positions of prompts; `tensor` splits heads, feed-forward and vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2s_jax.cluster import granules
from l2s_jax.cluster.paths import is_stacked, path_name

AXES = ("data", "fsdp", "sequence", "tensor")
ROWS = ("data", "fsdp")  # the axes that split a batch

# On devices or on the host, as what a caller has may be.
AnyArray = jax.Array | np.ndarray

# Path pattern (the whole path must match) -> axes of the parameter's dimensions.
RULES: tuple[tuple[str, P], ...] = (
    # The vocabulary over `tensor`. Over `fsdp` too, whose devices have different rows of a batch,
    # each would need all of it: the compiler gathers the table, or adds up whole batches.
    (r"(.*/)?(token|response)_embedding/embedding", P("tensor", "fsdp")),
    (r"(.*/)?position_embedding/embedding", P(None, "fsdp")),
    (r".*/(query|key|value|wi|wi_gate)/kernel", P("fsdp", "tensor")),
    (r".*/(query|key|value|wi|wi_gate)/bias", P("tensor")),
    (r".*/(output|wo)/kernel", P("tensor", "fsdp")),
    (r"(.*/)?(output|wo|attention_norm|feed_forward_norm|final_norm)/bias", P()),
    (r"(.*/)?head/kernel", P("fsdp", "tensor")),
    (r"projector/inward/kernel", P("fsdp", "tensor")),
    (r"projector/outward/kernel", P("tensor", "fsdp")),
    (r"mix/weights_\d+", P()),
    (r"prompt_map/kernel", P("fsdp", "tensor")),
    # Trained as (llm_)lora/MODULE/a and b; in products they lie beside the kernel.
    (r"((llm_)?lora/.*|.*/kernel)/a", P("fsdp", None)),
    (r"((llm_)?lora/.*|.*/kernel)/b", P(None, "tensor")),
    (r".*/relative_bias/embedding", P()),
    (r".*/scale", P()),
)
_VOCABULARY = r"(.*/)?((token|response)_embedding/embedding|head/kernel)"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of these sizes of AXES, 1 where one is not named; one -1 takes the rest.

    It is over `devices`, or all that there are. `slices` and `process_is_granule` are those of
    config.mesh: `data` goes from slice to slice last, so that the rest of the mesh is in one.

    Raises:
      ValueError: an axis that there is not, another number of devices, or other slices.
    """
    if unknown := set(sizes) - {*AXES, "slices", "process_is_granule"}:
        raise ValueError(f"mesh: no axis {min(unknown)!r}, expected some of {', '.join(AXES)}")
    count = jax.device_count() if devices is None else len(devices)
    asked = [sizes.get(axis, 1) for axis in AXES]
    shape = list(asked)
    known = math.prod(size for size in shape if size != -1)
    if shape.count(-1) == 1 and known > 0 and count % known == 0:
        shape[shape.index(-1)] = count // known
    if math.prod(shape) != count or min(shape) < 1:
        raise ValueError(
            f"mesh {axes_name(asked)}: the product must be the number of devices, {count}, as in "
            f"{axes_name(_nearest(asked, count))}"
        )
    axis_types = (AxisType.Auto,) * len(AXES)
    slices, by_process = sizes.get("slices", 1), bool(sizes.get("process_is_granule"))
    devices = jax.devices() if devices is None else devices
    granules.check(slices, devices, by_process)
    if shape[0] % slices:
        within = [math.gcd(size, count // slices) for size in shape[1:]]
        raise ValueError(
            f"mesh {axes_name(shape)}: {slices} slices split data, expected a multiple of {slices} "
            f"there, as in {axes_name(_nearest([slices, *within], count, slices))}"
        )
    return Mesh(granules.arranged(shape, slices, devices, by_process), AXES, axis_types=axis_types)


def axes_name(sizes: Sequence[int]) -> str:
    """Of sizes in the order of AXES: data=4, fsdp=2, tensor=1; `sequence` where it is not 1."""
    named = zip(AXES, sizes, strict=True)
    return ", ".join(f"{axis}={size}" for axis, size in named if axis != "sequence" or size != 1)


def _nearest(sizes: Sequence[int], count: int, slices: int = 1) -> list[int]:
    """Sizes for `count` devices: those that split parameters where they divide, data the rest."""
    shape = []
    count //= slices
    for size in reversed(sizes[1:]):
        shape.insert(0, size if size > 0 and count % size == 0 else 1)
        count //= shape[0]
    return [count * slices, *shape]


def mesh_name(mesh: Mesh | AbstractMesh) -> str:
    """As in the command line: mesh data=4, fsdp=2, tensor=1."""
    return f"mesh {axes_name([mesh.shape[axis] for axis in AXES])}"


def one_device() -> Mesh:
    """A mesh over the first device of this process."""
    return make_mesh({}, jax.local_devices()[:1])


def decoding_mesh(mesh: Mesh) -> Mesh:
    """What a process of a job generates on, when the job trains on `mesh`.

    Its own devices, if those of every process hold whole copies of the model: processes then answer
    different prompts and never wait for each other. Else all of `mesh`, for all processes together.
    """
    copy = math.prod(mesh.shape[axis] for axis in AXES if axis != "data")
    own: dict[int, list[Any]] = {}
    for device in mesh.devices.flat:
        own.setdefault(device.process_index, []).append(device)
    if len(own) == 1 or any(len(devices) % copy for devices in own.values()):
        return mesh
    return make_mesh({**mesh.shape, "data": -1}, own[jax.process_index()])


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """Between how many devices, or groups of them, the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def check_rows(rows: int, mesh: Mesh, what: str) -> None:
    """Raises a ValueError if the mesh cannot split a batch of so many rows; `what` names them."""
    ways = batch_ways(mesh)
    if rows % ways:
        raise ValueError(
            f"{what}={rows}: {mesh_name(mesh)} splits a batch between {ways} devices, expected a "
            f"multiple of {ways}, such as {-(-rows // ways) * ways}"
        )


def sequence_parts(mesh: Mesh | AbstractMesh | None) -> int:
    """Into how many parts of one length a prompt has to divide: one, without a `sequence` axis.

    Each device along it takes two, of which one may be from the end: see models/sequence.py.
    """
    ways = mesh.shape["sequence"] if mesh else 1
    return 2 * ways if ways > 1 else 1


def check_lengths(lengths: Iterable[int], mesh: Mesh, what: str) -> None:
    """Raises a ValueError if the mesh cannot split prompts of these lengths; `what` names them."""
    parts = sequence_parts(mesh)
    for length in lengths:
        if length % parts:
            raise ValueError(
                f"{what}: prompts of {length} tokens, which {mesh_name(mesh)} takes in {parts} "
                f"parts; expected a multiple of {parts}"
            )


def parameter_shardings(params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A tree like `params` of NamedShardings; every parameter must match exactly one rule.

    No axis splits the layers of a stacked parameter (models/stacking.py). The parts of a quantized
    parameter lie as it would, and so does what a low-rank change is added to. A vocabulary that
    `tensor` does not divide, such as GPT-2's, is not split by it.

    Raises:
      ValueError: a parameter that no rule matches, or several, or that does not divide.
    """
    problems = []

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        last = path[-1]
        is_part = isinstance(last, jax.tree_util.GetAttrKey) and last.name not in ("a", "b")
        name = path_name(path[:-1] if is_part else path)
        specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
        if len(specs) != 1:
            problems.append(f"{name} ({len(specs)} rules)")
            return NamedSharding(mesh, P())
        axes = [None, *specs[0]] if is_stacked(name) else list(specs[0])
        for i, (size, axis) in enumerate(zip(np.shape(leaf), axes, strict=False)):
            if axis is None or size % mesh.shape[axis] == 0:
                continue
            if size > 1 and not (axis == "tensor" and re.fullmatch(_VOCABULARY, name)):
                raise ValueError(
                    f"{mesh_name(mesh)}: {name} {list(np.shape(leaf))} does not divide into "
                    f"{axis}={mesh.shape[axis]}; expected a divisor of {size}"
                )
            axes[i] = None
        return NamedSharding(mesh, P(*axes))

    shardings = jax.tree_util.tree_map_with_path(sharding, params)
    if problems:
        raise ValueError(
            f"parameters that don't match exactly one sharding rule: {', '.join(problems)}"
        )
    return shardings


def optimizer_shardings(
    optimizer: optax.GradientTransformation, params: Any, shardings: Any, mesh: Mesh
) -> Any:
    """Shardings of `optimizer.init(params)`: what has a parameter's shape lies where it lies."""
    replicated = NamedSharding(mesh, P())
    abstract = jax.eval_shape(optimizer.init, params)

    def has_no_state(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    def place(leaf: Any, param: Any, sharding: NamedSharding) -> Any:
        if has_no_state(leaf):
            return leaf
        return sharding if leaf.shape == param.shape else replicated

    return optax.tree_map_params(
        optimizer,
        place,
        abstract,
        params,
        shardings,
        transform_non_params=lambda _: replicated,
        is_leaf=has_no_state,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(ROWS))


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending, int64."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique([np.arange(batch_size)[rows] for rows in held.values()])


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
) -> dict[str, jax.Array]:
    """This process's `batch_rows` of a batch of `batch_size` rows (None: all) -> global arrays."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, rows, global_shape=(batch_size or len(rows), *rows.shape[1:])
        )
        for name, rows in batch.items()
    }


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that are the same on all processes -> global arrays; what lies right stays.

    shardings: a tree like `tree`, or one for all of its arrays.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(shardings, NamedSharding):
        return jax.tree.map(lambda x: place(x, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def put_parameters(params: Any, mesh: Mesh) -> Any:
    """Parameters -> global arrays that lie where the rules say."""
    return put(params, parameter_shardings(params, mesh))


def gather(tree: Any) -> Any:
    """Global arrays -> host arrays, whole on every process."""
    return jax.tree.map(_whole, tree)


def gather_on_primary(tree: Any) -> Any:
    """Global arrays -> host arrays, whole on process 0; the others have None for each of them.

    They go there one after another: no other process has more than one at a time.
    """
    is_primary = jax.process_index() == 0

    def take(x: Any) -> np.ndarray | None:
        whole = _whole(x) if is_primary or _is_in_parts(x) else None
        return whole if is_primary else None

    return jax.tree.map(take, tree)


def free(tree: Any, shardings: Any) -> None:
    """Frees the arrays that lie as `shardings`, a tree like `tree`, say; others are left alone."""

    def delete(x: Any, sharding: NamedSharding) -> None:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            x.delete()

    jax.tree.map(delete, tree, shardings)


def _whole(x: Any) -> np.ndarray:
    return multihost_utils.process_allgather(x, tiled=True) if _is_in_parts(x) else np.asarray(x)


def _is_in_parts(x: Any) -> bool:
    """Whether no process has the whole array, so that all must take part in gathering it."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
