"""Products and LayerNorm in `jax.numpy`: what the references of the ops and a model's other phases have in common."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def product(x: Float[Array, "*B K"], weight: Float[Array, "M K"], out_dtype: Any) -> Float[Array, "*B M"]:
    """``x @ weight.T``, accumulated in f32; in f32 without TF32 on GPUs."""
    contract_last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract_last, _precision(x.dtype), preferred_element_type=out_dtype)


def einsum(equation: str, a: Array, b: Array) -> Array:
    """A product of two arrays in f32, as `product` is."""
    return jnp.einsum(equation, a, b, precision=_precision(a.dtype), preferred_element_type=jnp.float32)


def layer_norm(
    x: Float[Array, "*B D"], scale: Float[Array, " D"], bias: Float[Array, " D"], epsilon: float
) -> Float[Array, "*B D"]:
    """LayerNorm (Ba et al. 2016), computed and returned in f32."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    normed = (x - mean) * jax.lax.rsqrt(variance + epsilon)
    return normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)


def _precision(dtype: np.dtype) -> jax.lax.Precision | None:
    """In f32 "highest" keeps TF32 out on GPUs; 16 bits are multiplied as they are."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
