"""Sums over the GPUs of one process, of as few values as a decode step has: bound by latency, not by bytes.

A collective library starts a kernel that first meets the others and then moves data in rounds. Here each GPU writes
its part straight into the memory of the others, over NVLink, in messages that say themselves that they are there, and
adds up what has come: one kernel, one trip. What surrounds the sum (residual, bias) costs no kernel of its own.
"""

import ctypes
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from custom_ops import _arguments, _library, _outputs

# Values of a call with implementation "ffi"; the reference takes any number.
MAX_VALUES = 2**19
# Devices of a group, likewise.
MAX_DEVICES = 8

AxisNames = str | tuple[str, ...]
DeviceGroups = tuple[tuple[int, ...], ...]


def all_reduce(
    x: Float32[Array, "B D"],
    axis_names: AxisNames,
    *,
    device_groups: DeviceGroups = (),
    bias: Float[Array, " D"] | None = None,
    residual: Float32[Array, "B D"] | None = None,
    prefetch_bias: bool = False,
    timeout_s: float = 60.0,
    implementation: str,
) -> Float32[Array, "B D"]:
    """The sum of every device's x over mesh axes, inside `jax.shard_map`.

        y = residual + (x of device 0 + x of device 1 + ...) + bias

    In f32. With "ffi" in this order on every device, so that all have the same bits, and a row has them in any batch;
    with "reference" the sum's order is XLA's.

    Args:
        x: this device's part.
        axis_names: the axes of the mesh to add up over.
        device_groups: for "ffi", which devices add up together, in the order of their places along the axes: CUDA's
            numbers (``jax.Device.local_hardware_id``), every device of the mesh in one of the groups.
        bias: f32, fp16 or bf16.
        residual: added to the sum.
        prefetch_bias: promises that the bias is an argument of the jitted function whose values were there before the
            call, as `linear`'s ``prefetch_weight`` does. If the promise is broken the result is undefined. "reference"
            ignores it.
        timeout_s: 0.001 to 1e6. With "ffi" a device that has waited so long for another one's part gives NaN, and tells
            the others; so do all later calls with these devices, or they are errors that name the one that did not come
            (inside XLA's CUDA graphs only NaN). It may come late for many reasons (the host compiles, loads or waits),
            so that this is for what hangs.
        implementation: "reference" (`jax.lax.psum`: any number of values and of processes), or "ffi": on CUDA, at most
            2^19 values, D a multiple of 4, 2 to 8 GPUs of this process that NVLink links, and CUDA's modules
            loaded eagerly (``CUDA_MODULE_LOADING=EAGER`` before CUDA starts): a module that is loaded while one
            device waits for another may make the other wait for the first. Calls on the same devices must come in one
            order on all of them and one after another: within a program each must depend on the one before, as the
            layers of a model do, and programs must be started in one order, as `jax.jit` does where one thread calls.

    Raises:
        ValueError: an argument does not fit the others, or the implementation does not support it.

    One-shot all-reduce with a flag in every message: the protocol LL of NVIDIA's NCCL, with messages of 16 bytes.
    """
    _arguments.check_implementation(implementation)
    _arguments.check_rank("x", x, 2)
    _arguments.check_dtype("x", x, [jnp.float32])
    if bias is not None:
        _arguments.check_dtype("bias", bias, _arguments.FLOAT_DTYPES)
        _arguments.check_shape("bias", bias, x.shape[1:])
    if residual is not None:
        _arguments.check_dtype("residual", residual, [jnp.float32])
        _arguments.check_shape("residual", residual, x.shape)
    timeout_ms(timeout_s)
    if implementation == "reference":
        return all_reduce_reference(x, axis_names, bias=bias, residual=residual)
    return all_reduce_ffi(
        x,
        axis_names,
        device_groups=device_groups,
        bias=bias,
        residual=residual,
        prefetch_bias=prefetch_bias,
        timeout_s=timeout_s,
    )


def all_reduce_reference(
    x: Float32[Array, "B D"],
    axis_names: AxisNames,
    *,
    bias: Float[Array, " D"] | None = None,
    residual: Float32[Array, "B D"] | None = None,
) -> Float32[Array, "B D"]:
    """`all_reduce` by `jax.lax.psum`."""
    return _with_terms(jax.lax.psum(x, axis_names), bias, residual)


def all_reduce_in_order(
    x: Float32[Array, "B D"],
    axis_names: AxisNames,
    *,
    bias: Float[Array, " D"] | None = None,
    residual: Float32[Array, "B D"] | None = None,
) -> Float32[Array, "B D"]:
    """`all_reduce` in the order of the devices along the axes, wherever a value stands: what "ffi" gives, bit for bit,
    on any device, from all devices' parts in memory."""
    return _with_terms(functools.reduce(jnp.add, jax.lax.all_gather(x, axis_names)), bias, residual)


def all_reduce_ffi(
    x: Float32[Array, "B D"],
    axis_names: AxisNames,
    *,
    device_groups: DeviceGroups,
    bias: Float[Array, " D"] | None = None,
    residual: Float32[Array, "B D"] | None = None,
    prefetch_bias: bool = False,
    timeout_s: float = 60.0,
) -> Float32[Array, "B D"]:
    """`all_reduce` through XLA's FFI (csrc/all_reduce.h): a CUDA handler only."""
    num_ranks = jax.lax.axis_size(axis_names)
    if problem := find_problem(x.shape, num_ranks, axis_names, device_groups):
        raise ValueError(f'all_reduce with implementation "ffi": {problem}')
    dtype = jnp.float32 if bias is None else bias.dtype
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.ffi.ffi_call("kogpt_all_reduce", result)(
        x,
        _outputs.or_empty(bias, dtype),
        _outputs.or_empty(residual, jnp.float32),
        devices=np.array(device_groups, np.int64).reshape(-1),
        group_size=np.int64(num_ranks),
        prefetch_bias=bool(prefetch_bias),
        timeout_ms=timeout_ms(timeout_s),
    )


def all_reduce_ffi_problem(*, platform: str, device_groups: DeviceGroups) -> str | None:
    """Why "ffi" cannot add up over these devices of this machine, or None if it can.

    Args:
        platform: "cpu" or "gpu".
        device_groups: as `all_reduce` takes them.
    """
    if platform != "gpu":
        return f"it has no kernel for {platform}"
    if problem := _library.load(platform).problem:
        return problem
    sizes = {len(group) for group in device_groups}
    if len(sizes) != 1 or not 2 <= min(sizes) <= MAX_DEVICES:
        return f"groups must have 2 to {MAX_DEVICES} devices, all as many, got {device_groups}"
    return _prepare(device_groups)


def find_problem(
    shape: Sequence[int], num_ranks: int, axis_names: AxisNames, device_groups: DeviceGroups
) -> str | None:
    """Why "ffi" cannot add up arrays of this shape over axes of the mesh, of ``num_ranks`` devices."""
    if any(len(group) != num_ranks for group in device_groups) or not device_groups:
        return f"device_groups must be groups of {num_ranks} devices, as {axis_names} has, got {device_groups}"
    return values_problem(shape) or all_reduce_ffi_problem(platform="gpu", device_groups=device_groups)


def timeout_ms(timeout_s: float) -> np.int64:
    """As the handlers take it. Raises `ValueError` for one out of range."""
    if not 1e-3 <= timeout_s <= 1e6:
        raise ValueError(f"timeout_s must be 0.001 to 1e6 seconds, got {timeout_s}")
    return np.int64(round(1e3 * timeout_s))


def values_problem(shape: Sequence[int]) -> str | None:
    """Why "ffi" cannot add up arrays of this shape, or None if it can."""
    if shape[0] * shape[1] > MAX_VALUES or shape[1] % 4 or not shape[0]:
        return f"x must have 4 to {MAX_VALUES} values in rows of a multiple of 4, got shape {tuple(shape)}"
    return None


def _prepare(device_groups: DeviceGroups) -> str | None:
    """Makes the groups' memory on the devices before a program that needs it runs, once; None, or why that cannot
    be."""
    devices = [device for group in device_groups for device in group]
    array = ctypes.c_int64 * len(devices)
    prepare = _library.cuda_function("KogptOpsPrepareAllReduce", array, ctypes.c_int64, ctypes.c_int64)
    return prepare(array(*devices), len(devices), len(device_groups[0]))


def _with_terms(total: Array, bias: Array | None, residual: Array | None) -> Array:
    y = total if residual is None else residual + total
    return y if bias is None else y + bias.astype(jnp.float32)
