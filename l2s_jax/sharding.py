"""Where arrays live: the mesh, and the rules from parameter paths to its axes.

Axes: `data` splits the batch; `fsdp` splits the batch and the parameters; `tensor` splits heads,
feed-forward and vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from l2s_jax.models.stacking import is_stacked

AXES = ("data", "fsdp", "tensor")

# Path pattern (the whole path must match) -> axes of the parameter's dimensions.
RULES: tuple[tuple[str, P], ...] = (
    # The vocabulary over `tensor`. Over `fsdp` too, whose devices have different rows of a batch,
    # each would need all of it: the compiler gathers the table, or adds up whole batches.
    (r"(.*/)?token_embedding/embedding", P("tensor", "fsdp")),
    (r"(.*/)?position_embedding/embedding", P(None, "fsdp")),
    (r".*/(query|key|value|wi|wi_gate)/kernel", P("fsdp", "tensor")),
    (r".*/(query|key|value|wi|wi_gate)/bias", P("tensor")),
    (r".*/(output|wo)/kernel", P("tensor", "fsdp")),
    (r"(.*/)?(output|wo|attention_norm|feed_forward_norm|final_norm)/bias", P()),
    (r"(.*/)?head/kernel", P("fsdp", "tensor")),
    (r"projector/inward/kernel", P("fsdp", "tensor")),
    (r"projector/outward/kernel", P("tensor", "fsdp")),
    (r"prompt_map/kernel", P("fsdp", "tensor")),
    (r"lora/.*/a", P("fsdp", None)),
    (r"lora/.*/b", P(None, "tensor")),
    (r".*/relative_bias/embedding", P()),
    (r".*/scale", P()),
)


def make_mesh(config: ConfigDict | Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `config.data`, `.fsdp` and `.tensor`; one -1 takes the rest.

    It is over `devices`, or all that there are.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [config[axis] for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count or min(sizes) < 1:
        shape = ", ".join(f"{axis}={config[axis]}" for axis in AXES)
        raise ValueError(f"mesh {shape}: the product must be the number of devices, {count}")
    return jax.make_mesh(
        tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def one_device() -> Mesh:
    """A mesh over the first device of this process."""
    return make_mesh(dict.fromkeys(AXES, 1), jax.local_devices()[:1])


def path_name(path: tuple) -> str:
    """('a', 'b') of a tree path -> 'a/b'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def mesh_name(mesh: Mesh) -> str:
    """As in the command line: mesh data=4, fsdp=2, tensor=1."""
    return "mesh " + ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def parameter_shardings(params: Any, mesh: Mesh) -> Any:
    """A tree like `params` of NamedShardings; every parameter must match exactly one rule.

    No axis splits the layers of a stacked parameter (models/stacking.py).

    Raises:
      ValueError: a parameter that no rule matches, or several, or that does not divide.
    """
    problems = []

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = path_name(path)
        specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, name)]
        if len(specs) != 1:
            problems.append(f"{name} ({len(specs)} rules)")
            return NamedSharding(mesh, P())
        spec = P(None, *specs[0]) if is_stacked(name) else specs[0]
        _check_divides(name, np.shape(leaf), spec, mesh)
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(sharding, params)
    if problems:
        raise ValueError(
            f"parameters that don't match exactly one sharding rule: {', '.join(problems)}"
        )
    return shardings


def _check_divides(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=False):
        if axis and size % mesh.shape[axis]:
            raise ValueError(
                f"{mesh_name(mesh)}: {name} {list(shape)} does not divide into "
                f"{axis}={mesh.shape[axis]}; expected a divisor of {size}"
            )


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


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """x with its leading dimensions split by these axes, in a program for a mesh.

    What the compiler may choose: the dimensions named None, those that do not divide, and those
    after. Nothing changes without `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    spec = [P.UNCONSTRAINED] * x.ndim
    for i, (size, axis) in enumerate(zip(x.shape, axes, strict=False)):
        ways = math.prod(mesh.shape[name] for name in np.atleast_1d(axis)) if axis else 1
        if ways > 1 and size % ways == 0:
            spec[i] = axis
    if spec == [P.UNCONSTRAINED] * x.ndim:
        return x
    return jax.lax.with_sharding_constraint(x, P(*spec))


def split_rows(x: jax.Array) -> jax.Array:
    """x [B, ...] with its rows where those of a batch lie, in a program for a mesh.

    Without it, the compiler may leave parameters that `fsdp` splits where they are, split the
    activations along their width too, and add up those of the whole batch over all devices.
    """
    return constrain(x, ("data", "fsdp"))


def split_parameters(params: Any) -> Any:
    """Parameters where the rules put them, and their gradient too, in a program for a mesh.

    Nothing changes without `jax.set_mesh`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return params
    return jax.lax.with_sharding_constraint(params, parameter_shardings(params, mesh))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def batch_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Which rows of a global batch the devices of this process hold, ascending, int64."""
    held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique([np.arange(batch_size)[rows] for (rows,) in held.values()])


def put_batch(
    batch: dict[str, np.ndarray], mesh: Mesh, batch_size: int | None = None
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
    """Arrays that are the same on all processes -> global arrays; what lies right stays."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree, shardings)


def gather(tree: Any) -> Any:
    """Global arrays -> host arrays, whole on every process."""

    def whole(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(whole, tree)
