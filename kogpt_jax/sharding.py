"""The device mesh and how arrays lie on it: logical axis names of arrays -> axes of the mesh."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kogpt_jax.errors import InputError

# Outermost to innermost: the tensor axis reduces once a layer, so it gets the closest devices.
MESH_AXES = ("data", "pipe", "tensor")

# The axes that the vocabulary lies over, so that no stage of a pipeline carries a whole embedding table or lm_head.
VOCAB_AXES = ("pipe", "tensor")

# `tensor_shard` is an explicit axis of the fused weights: slicing the concatenation [Q|K|V|FFN] by device would give
# one device all of Q, so the shards are laid out before and stacked. `stage` stacks the layers of a pipeline's stages,
# and each stage has pages of its own.
_MESH_AXES_OF: dict[str, str | tuple[str, ...] | None] = {
    "batch": "data",
    "tokens": "data",
    "pages": ("data", "pipe"),
    "in_flight": ("data", "pipe"),
    "heads": "tensor",
    "stage": "pipe",
    "tensor_shard": "tensor",
    "vocab": VOCAB_AXES,
    "embed": None,
    "q_len": None,
    "kv_len": None,
    "head_dim": None,
    "fused": None,
}


class Split(NamedTuple):
    """How a model's parameters are cut: its layers into stages along "pipe", each layer into shards along "tensor".

    Block j of stage s is layer ``s * layers_per_stage + j``. Where the layers do not fill the last stages, the blocks
    that are left over hold zeros, which add nothing to the residual stream.

        7 layers, 4 stages  ->  0 1 | 2 3 | 4 5 | 6 -
    """

    num_stages: int = 1
    num_shards: int = 1

    @classmethod
    def of(cls, mesh: Mesh) -> "Split":
        """The split of a model on this mesh."""
        return cls(mesh.shape["pipe"], mesh.shape["tensor"])

    def layers_per_stage(self, num_layers: int) -> int:
        """Blocks of a stage."""
        return -(-num_layers // self.num_stages)

    def layers_of_block(self, block: int, num_layers: int) -> range:
        """Which layer a block is, stage by stage; from ``num_layers`` on there is none."""
        layers_per_stage = self.layers_per_stage(num_layers)
        return range(block, self.num_stages * layers_per_stage, layers_per_stage)


ONE_DEVICE = Split()


def parse_mesh(name: str) -> tuple[int, int, int]:
    """Reads a mesh name such as ``"d1p1t2"`` into its (data, pipe, tensor) extents.

    Raises:
        InputError: not of that form.
    """
    match = re.fullmatch(r"d([1-9]\d*)p([1-9]\d*)t([1-9]\d*)", name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"mesh must look like 'd1p1t1' (data, pipe, tensor extents), got {name!r}")
    data, pipe, tensor = (int(extent) for extent in match.groups())
    return data, pipe, tensor


def mesh_name(mesh: Mesh) -> str:
    """The name that `parse_mesh` reads."""
    return "d{data}p{pipe}t{tensor}".format(**mesh.shape)


def make_mesh(data: int = 1, pipe: int = 1, tensor: int = 1, *, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first ``data * pipe * tensor`` of ``devices`` (default: all that JAX sees).

    Raises:
        InputError: fewer devices than the mesh needs, or none of one of several processes among them.
    """
    devices = jax.devices() if devices is None else devices
    size = data * pipe * tensor
    if len(devices) < size:
        raise InputError(f"mesh d{data}p{pipe}t{tensor} needs {size} devices, found {len(devices)}")
    idle = set(range(jax.process_count())) - {device.process_index for device in devices[:size]}
    if idle:
        raise InputError(
            f"mesh d{data}p{pipe}t{tensor} takes {size} of {len(devices)} devices, none of process {min(idle)}: "
            "each process must take part"
        )
    # The forward is manual inside `jax.shard_map`; Auto keeps the little around it out of the type system.
    return jax.make_mesh((data, pipe, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices[:size])


def cuda_devices(mesh: Mesh) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """CUDA's numbers of a mesh's GPUs, [data][pipe][tensor]; () where they are no GPUs or not all of this process."""
    devices = mesh.devices
    if devices.flat[0].platform != "gpu" or any(d.process_index != jax.process_index() for d in devices.flat):
        return ()
    return tuple(tuple(tuple(d.local_hardware_id for d in shards) for shards in stages) for stages in devices)


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """The partition of an array whose axes carry these logical names (None: not partitioned).

    Raises:
        ValueError: two axes of one array fall on the same mesh axis.
        KeyError: an unknown logical axis.
    """
    mesh_axes = [None if axis is None else _MESH_AXES_OF[axis] for axis in logical_axes]
    used = [axis for axes in mesh_axes if axes is not None for axis in ([axes] if isinstance(axes, str) else axes)]
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(logical_axes)} fall twice on one mesh axis: {tuple(mesh_axes)}")
    return PartitionSpec(*mesh_axes)


def named_sharding(mesh: Mesh, logical_axes: Sequence[str | None]) -> NamedSharding:
    """``partition_spec`` on a mesh."""
    return NamedSharding(mesh, partition_spec(logical_axes))
