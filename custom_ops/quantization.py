"""Weights in 8 bits: symmetric, one scale per output channel."""

import dataclasses
import functools
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int8


@functools.partial(jax.tree_util.register_dataclass, data_fields=["qvalue", "scale"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX puts other things than arrays into the same structure
class QuantizedArray:
    """An array w = qvalue * scale; ``scale`` has the rank of ``qvalue``, with 1 along the axes that share a scale."""

    qvalue: Int8[Array, "..."]
    scale: Float32[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.qvalue.shape

    @property
    def ndim(self) -> int:
        return self.qvalue.ndim

    def __getitem__(self, index: Any) -> "QuantizedArray":
        """Both parts indexed alike, which serves leading axes that are stacked, such as that of the tensor shards."""
        return QuantizedArray(self.qvalue[index], self.scale[index])


def quantize_weight(weight: Float[Array, "..."], contract_axes: tuple[int, ...] = (-1,)) -> QuantizedArray:
    """Rounds a weight to integers in [-127, 127] with one scale per output: max |w| / 127 over the axes that a product
    sums over, the last one of an output-major weight.

    Symmetric and without -128, so that a product needs no zero point. An output of zeros gets scale 1. The arithmetic
    is f32 whatever the weight's dtype.
    """
    weight = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(weight), axis=contract_axes, keepdims=True)
    # So that NaN and infinity stay: a product shows them. XLA's maximum on CPUs may lose NaN.
    largest = jnp.where(jnp.any(jnp.isnan(weight), axis=contract_axes, keepdims=True), jnp.nan, largest)
    scale = jnp.where(largest == 0, 1.0, largest / 127)
    # The quotient may round up past 127 where the scale was rounded down.
    qvalue = jnp.clip(jnp.round(weight / scale), -127, 127).astype(jnp.int8)
    return QuantizedArray(qvalue, scale)


def dequantize(weight: QuantizedArray, dtype: Any = jnp.float32) -> Array:
    """qvalue * scale, computed in f32."""
    return (weight.qvalue.astype(jnp.float32) * weight.scale).astype(dtype)
