"""The vocabulary cut over a model's devices: looking tokens up, and what is chosen from logits that lie in shards.

Shard i holds the tokens from ``i * shard_len`` on, of the embedding table and of lm_head. Where the vocabulary does not
divide, the last rows stand for no token: nobody looks them up, and their logits are -inf.

    5 tokens, 2 shards  ->  0 1 2 | 3 4 -

The methods that see arrays run inside `jax.shard_map`. Over one shard they communicate nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kogpt_jax import collectives
from kogpt_jax.config import OpsConfig
from kogpt_jax.sharding import VOCAB_AXES


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens, over how many shards they lie, and what runs the sums of a decode step."""

    size: int
    num_shards: int = 1
    ops: OpsConfig = OpsConfig()

    @property
    def shard_len(self) -> int:
        """Rows of a shard."""
        return -(-self.size // self.num_shards)

    @property
    def padded_size(self) -> int:
        """Rows of all shards."""
        return self.shard_len * self.num_shards

    def lookup(self, table: Float[Array, "local_V D"], tokens: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        """The tokens' rows, each from the shard that holds it."""
        if self.num_shards == 1:
            return table[tokens]
        local, is_own = self._local(tokens)
        rows = jnp.where(is_own[..., None], table[local], 0)
        # Exact in any dtype and order: one term is not 0.
        if not collectives.is_kernel(rows.shape, self.ops):
            return jax.lax.psum(rows, VOCAB_AXES)
        return collectives.sum_over(rows.astype(jnp.float32), VOCAB_AXES, self.ops).astype(table.dtype)

    def without_padding(self, logits: Float[Array, "*B local_V"]) -> Float[Array, "*B local_V"]:
        """This shard's logits, -inf behind the end of the vocabulary."""
        if self.padded_size == self.size:
            return logits
        return jnp.where(self._first() + jnp.arange(self.shard_len) < self.size, logits, -jnp.inf)

    def gather(self, logits: Float[Array, "*B local_V"]) -> Float[Array, "*B V"]:
        """The logits of all tokens, on every device."""
        if self.num_shards == 1:
            return logits
        return jax.lax.all_gather(logits, VOCAB_AXES, axis=logits.ndim - 1, tiled=True)[..., : self.size]

    def most_likely(self, logits: Float[Array, "B local_V"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
        """The most likely token of each row, of equal ones the first, and its log-probability.

        Of each shard three numbers a row cross the mesh, not its logits.
        """
        tokens = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        largest = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        # `jax.nn.logsumexp` with the maximum that is there already: a pass over the logits less.
        offset = jnp.where(jnp.isfinite(largest), largest, 0)
        total = offset + jnp.log(jnp.sum(jnp.exp(logits - offset[:, None]), axis=-1))
        if self.num_shards > 1:
            # One collective: a position in a shard is exact in f32.
            best = jnp.stack([largest, total, tokens.astype(jnp.float32)])
            largest, total, tokens = collectives.gather(best, VOCAB_AXES, self.ops).swapaxes(0, 1)  # each [shards, B]
            winner = jnp.argmax(largest, axis=0)  # the first of equal ones, as within a shard
            positions = jnp.take_along_axis(tokens, winner[None], axis=0)[0].astype(jnp.int32)
            tokens = winner.astype(jnp.int32) * self.shard_len + positions
            largest = jnp.take_along_axis(largest, winner[None], axis=0)[0]
            total = jax.nn.logsumexp(total, axis=0)
        return tokens, largest - total

    def logprobs(self, logits: Float[Array, "*B local_V"], tokens: Int[Array, "*B"]) -> Float[Array, "*B"]:
        """The log-probability of a given token of each row."""
        if self.num_shards == 1:
            chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
            return chosen - jax.nn.logsumexp(logits, axis=-1)
        local, is_own = self._local(tokens)
        chosen = jnp.where(is_own, jnp.take_along_axis(logits, local[..., None], axis=-1)[..., 0], 0)
        largest = jax.lax.pmax(jnp.max(logits, axis=-1), VOCAB_AXES)
        total = jnp.sum(jnp.exp(logits - largest[..., None]), axis=-1)
        chosen, total = jax.lax.psum(jnp.stack([chosen, total]), VOCAB_AXES)
        return chosen - (largest + jnp.log(total))

    def _first(self) -> Int[Array, ""]:
        """The first token of this device's shard."""
        return jax.lax.axis_index(VOCAB_AXES) * self.shard_len

    def _local(self, tokens: Int[Array, "*B"]) -> tuple[Int[Array, "*B"], Array]:
        """The tokens' rows in this shard, and whether it holds them; row 0 where it does not."""
        local = tokens - self._first()
        is_own = (local >= 0) & (local < self.shard_len)
        return jnp.where(is_own, local, 0), is_own
