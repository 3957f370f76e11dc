"""Rotary position embedding (Su et al. 2021) as GPT-J has it."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def apply_rotary(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T N H"],
    rotary: tuple[Float[Array, "#B #T 1 R"], Float[Array, "#B #T 1 R"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """Rotates the leading 2 R values of each head by the angles whose (cos, sin) are given; GPT-J pairs neighbours
    (2i, 2i + 1), not halves."""
    cos, sin = rotary
    rotary_dim = 2 * cos.shape[-1]
    qk = jnp.concatenate([q, k], axis=2)
    pairs = qk[..., :rotary_dim].astype(jnp.float32).reshape(*qk.shape[:-1], rotary_dim // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    rotated = rotated.reshape(*qk.shape[:-1], rotary_dim).astype(qk.dtype)
    # Once for both: XLA would else rotate q again for every key that it meets.
    qk = jax.lax.optimization_barrier(jnp.concatenate([rotated, qk[..., rotary_dim:]], axis=-1))
    return qk[:, :, : q.shape[2]], qk[:, :, q.shape[2] :]
