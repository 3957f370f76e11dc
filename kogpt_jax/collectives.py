"""What a decode step communicates over axes of the mesh: sums, by what `ops.resolve_ops` has chosen, and gathers made
of them. Inside `jax.shard_map`."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from custom_ops.all_reduce import DeviceGroups, all_reduce, all_reduce_in_order, all_reduce_reference, values_problem
from kogpt_jax.config import DeviceGrid, OpsConfig
from kogpt_jax.sharding import MESH_AXES

_ROW_MULTIPLE = 4  # of values, for `custom_ops.all_reduce`


def device_groups(grid: DeviceGrid, axes: tuple[str, ...]) -> DeviceGroups:
    """The devices that add up over axes of the mesh: for each place along the other axes those along these, in order.

    Args:
        grid: [data][pipe][tensor].
        axes: of ``MESH_AXES``, in their order.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for data, stages in enumerate(grid):
        for pipe, shards in enumerate(stages):
            for tensor, device in enumerate(shards):
                place = zip(MESH_AXES, (data, pipe, tensor), strict=True)
                key = tuple(index for axis, index in place if axis not in axes)
                groups.setdefault(key, []).append(device)
    return tuple(map(tuple, groups.values()))


def is_kernel(shape: tuple[int, ...], ops: OpsConfig) -> bool:
    """Whether the project's kernel sums arrays of this shape, [B, D]."""
    return ops.all_reduce == "ffi" and len(shape) == 2 and values_problem(shape) is None


def sum_over(
    x: Float[Array, "B D"],
    axes: tuple[str, ...],
    ops: OpsConfig,
    *,
    bias: Float[Array, " D"] | None = None,
    residual: Float[Array, "B D"] | None = None,
) -> Float[Array, "B D"]:
    """``residual + psum(x) + bias`` of f32 values. ``bias`` is an argument of the jitted phase."""
    if is_kernel(x.shape, ops):
        return all_reduce(
            x,
            axes,
            device_groups=device_groups(ops.devices, axes),
            bias=bias,
            residual=residual,
            prefetch_bias=True,
            implementation="ffi",
        )
    in_order = ops.all_reduce_many_values == "in_order"
    return (all_reduce_in_order if in_order else all_reduce_reference)(x, axes, bias=bias, residual=residual)


def gather(x: Float[Array, "*shape"], axes: tuple[str, ...], ops: OpsConfig) -> Float[Array, "devices *shape"]:
    """Every device's few f32 values, in the order of the devices along the axes."""
    num_devices = jax.lax.axis_size(axes)
    padded_size = -(-num_devices * x.size // _ROW_MULTIPLE) * _ROW_MULTIPLE
    if not is_kernel((1, padded_size), ops):
        return jax.lax.all_gather(x, axes)
    # A sum with zeros is exact. No update of zeros in place: that is two operations more.
    is_own = jnp.arange(num_devices)[:, None] == jax.lax.axis_index(axes)
    own = jnp.where(is_own, x.reshape(1, -1), 0).reshape(1, -1)
    own = jnp.pad(own, ((0, 0), (0, padded_size - own.shape[1])))
    values = sum_over(own, axes, ops)[0, : num_devices * x.size]
    return values.reshape(num_devices, *x.shape)


def num_along(grid: DeviceGrid, axes: tuple[str, ...]) -> int:
    """Devices along axes of the mesh."""
    extents = dict(zip(MESH_AXES, (len(grid), len(grid[0]), len(grid[0][0])), strict=True))
    return math.prod(extents[axis] for axis in axes)
