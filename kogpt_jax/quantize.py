"""Weight-only quantisation on the devices: INT8 with one f32 scale an output, symmetric.

An output's scale is that of its whole row of weights, however a mesh cuts it: any mesh gives the same values.
"""

import functools
from collections.abc import Callable, Sequence

import jax
from jax.sharding import NamedSharding
from jaxtyping import Array

from custom_ops import quantize_weight

# What the paths of scales add to those of their weights.
SCALE_SUFFIX = "_scale"


def quantize_leaf(
    leaf: Array, scale_shape: Sequence[int], sharding: NamedSharding, scale_sharding: NamedSharding
) -> tuple[Array, Array]:
    """A weight's INT8 values and scales. ``scale_shape`` has 1 along the axes that a scale spans."""
    contract_axes = tuple(axis for axis, extent in enumerate(scale_shape) if extent == 1)
    return _quantizer(contract_axes, sharding, scale_sharding)(leaf)


@functools.cache
def _quantizer(
    contract_axes: tuple[int, ...], sharding: NamedSharding, scale_sharding: NamedSharding
) -> Callable[[Array], tuple[Array, Array]]:
    def quantize(leaf: Array) -> tuple[Array, Array]:
        quantized = quantize_weight(leaf, contract_axes)
        return quantized.qvalue, quantized.scale

    return jax.jit(quantize, out_shardings=(sharding, scale_sharding))
