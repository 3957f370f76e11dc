"""The device mesh and how arrays lie on it: logical axis names of arrays -> axes of the mesh."""

import re
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kogpt_jax.errors import InputError

# Outermost to innermost: the tensor axis reduces once a layer, so it gets the closest devices.
MESH_AXES = ("data", "pipe", "tensor")

# `tensor_shard` is the explicit leading axis of the fused weights: slicing the concatenation [Q|K|V|FFN] by device
# would give one device all of Q, so the shards are laid out before and stacked.
_MESH_AXIS_OF = {
    "batch": "data",
    "tokens": "data",
    "pages": "data",
    "heads": "tensor",
    "tensor_shard": "tensor",
    "embed": None,
    "vocab": None,
    "q_len": None,
    "kv_len": None,
    "head_dim": None,
    "fused": None,
}


def parse_mesh(name: str) -> tuple[int, int, int]:
    """Reads a mesh name such as ``"d1p1t1"`` into its (data, pipe, tensor) extents.

    Raises:
        InputError: not of that form, or more than one device, which is not supported yet.
    """
    match = re.fullmatch(r"d([1-9]\d*)p([1-9]\d*)t([1-9]\d*)", name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"mesh must look like 'd1p1t1' (data, pipe, tensor extents), got {name!r}")
    data, pipe, tensor = (int(extent) for extent in match.groups())
    if (data, pipe, tensor) != (1, 1, 1):
        raise InputError(f"mesh {name!r} is not supported yet, only 'd1p1t1'")
    return data, pipe, tensor


def make_mesh(data: int = 1, pipe: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first ``data * pipe * tensor`` of ``devices`` (default: all that JAX sees).

    Raises:
        InputError: fewer devices than the mesh needs.
    """
    devices = jax.devices() if devices is None else devices
    size = data * pipe * tensor
    if len(devices) < size:
        raise InputError(f"mesh d{data}p{pipe}t{tensor} needs {size} devices, found {len(devices)}")
    # The forward is manual inside `jax.shard_map`; Auto keeps the little around it out of the type system.
    return jax.make_mesh((data, pipe, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose axes carry these logical names (None: not partitioned).

    Raises:
        ValueError: two axes of one array fall on the same mesh axis.
        KeyError: an unknown logical axis.
    """
    mesh_axes = [None if axis is None else _MESH_AXIS_OF[axis] for axis in logical_axes]
    used = [axis for axis in mesh_axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(logical_axes)} fall twice on one mesh axis: {tuple(mesh_axes)}")
    return PartitionSpec(*mesh_axes)


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """``partition_spec`` on a mesh."""
    return NamedSharding(mesh, partition_spec(logical_axes))
