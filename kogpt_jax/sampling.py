"""From logits to one token a row: what a caller asks for, the same as arrays, and the pure function that draws."""

import dataclasses
import functools
import numbers
import secrets
from collections.abc import Sequence
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from kogpt_jax import distributed
from kogpt_jax.errors import InputError
from kogpt_jax.vocabulary import Vocabulary

_MAX_SEED = 2**32 - 1
_MAX_TEMPERATURE = float(np.finfo(np.float32).max)  # what the device's arrays hold

# Which of a prompt's continuations a key is for. There is one so far; it counts already, so that seeds keep their
# meaning.
_SAMPLE_INDEX = 0
_MAX_TOP_K = 2**31 - 1  # more than any vocabulary holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one request is continued.

    The filters apply in the order top-k, top-p, min-p, after the temperature; each looks at what the one before left,
    with probabilities made to sum to one again.

    Raises:
        InputError: a value outside its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 takes the most likely token; the filters and the seed then play no part
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    top_p: float = 1.0  # keep the most likely tokens until their probabilities reach top_p (Holtzman et al. 2020)
    min_p: float = 0.0  # keep tokens with at least min_p times the probability of the most likely (Nguyen et al. 2024)
    seed: int | None = None  # None draws one; the same seed gives the same text in any batch and slot
    ignore_eos: bool = False  # go on to max_new_tokens (benchmarks)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Integral) and not (name == "seed" and value is None):
                raise InputError(f"{name} must be an integer, got {value!r}")
        for name in ("temperature", "top_p", "min_p"):
            if not isinstance(getattr(self, name), numbers.Real):
                raise InputError(f"{name} must be a number, got {getattr(self, name)!r}")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature <= _MAX_TEMPERATURE:
            raise InputError(f"temperature must be finite and at least 0, got {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be at least 0, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be between 0 and 1, got {self.min_p}")
        if self.seed is not None and not 0 <= self.seed <= _MAX_SEED:
            raise InputError(f"seed must be between 0 and {_MAX_SEED}, got {self.seed}")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_k", "top_p", "min_p", "seed"],
    meta_fields=["is_greedy"],
)
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX puts other things than arrays into the same structure, partitions for one
class RowSampling:
    """`SamplingParams` of a batch, an array per parameter.

    ``is_greedy`` says that no row draws its tokens. It is static, so that a batch of greedy rows runs a program of its
    own without the sort: a `lax.cond` on the device would make the host wait for its predicate every step.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    seed: UInt[Array, " B"]
    is_greedy: bool

    @classmethod
    def from_params(cls, rows: Sequence[SamplingParams]) -> "RowSampling":
        """Stacks the rows' parameters; a row without a seed gets one of the system's entropy, process 0's."""
        seeds = [secrets.randbelow(_MAX_SEED + 1) if row.seed is None else row.seed for row in rows]
        # NumPy's, for `jax.jit` to put where they belong: to put each by itself takes a program a parameter.
        arrays: Any = {
            "temperature": np.array([row.temperature for row in rows], np.float32),
            "top_k": np.array([min(row.top_k, _MAX_TOP_K) for row in rows], np.int32),
            "top_p": np.array([row.top_p for row in rows], np.float32),
            "min_p": np.array([row.min_p for row in rows], np.float32),
            "seed": distributed.of_process_0(np.array(seeds, np.uint32)),
        }
        return cls(**arrays, is_greedy=all(row.temperature == 0 for row in rows))


def sample(
    logits: Float[Array, "B local_V"], rows: RowSampling, positions: Int[Array, " B"], vocabulary: Vocabulary
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draws a token a row.

    A greedy batch chooses without moving its logits. Where a row draws, all logits of the batch are gathered on every
    device, which then does what one device alone would: the same text on any mesh.

    Args:
        logits: f32, this device's shard of the vocabulary.
        rows: the parameters of each row.
        positions: where in its sequence the new token will stand. The random key is a function of the row's seed and
            this position only, so that a request's text does not depend on its slot or its neighbours.
        vocabulary: how the logits lie over the mesh.

    Returns:
        The tokens, and their log-probabilities under the model itself (before temperature and filters).
    """
    with jax.named_scope("sample"):
        if rows.is_greedy:
            return vocabulary.most_likely(logits)
        logits = vocabulary.gather(logits)
        most_likely = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        tokens = jnp.where(rows.temperature > 0, _draw(logits, rows, positions), most_likely)
        return tokens, Vocabulary(vocabulary.size).logprobs(logits, tokens)


def _draw(logits: Float[Array, "B V"], rows: RowSampling, positions: Int[Array, " B"]) -> Int[Array, " B"]:
    """Gumbel-max over the tokens that the filters keep: argmax(logits + g) is distributed as softmax(logits)."""
    # From the maximum down, so that the smallest temperature overflows to -inf and never to inf.
    scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
    scaled /= jnp.where(rows.temperature > 0, rows.temperature, 1.0)[:, None]
    kept = jnp.where(scaled >= keep_threshold(scaled, rows)[:, None], scaled, -jnp.inf)

    def noise(seed: Array, position: Array) -> Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), _SAMPLE_INDEX)
        key = jax.random.fold_in(key, position)
        return jax.random.gumbel(key, (logits.shape[-1],), jnp.float32)

    return jnp.argmax(kept + jax.vmap(noise)(rows.seed, positions), axis=-1).astype(jnp.int32)


def keep_threshold(scaled: Float[Array, "B V"], rows: RowSampling) -> Float[Array, " B"]:
    """The smallest scaled logit that top-k, top-p and min-p keep. Tokens that tie with it are kept too."""
    vocab_size = scaled.shape[-1]
    descending = -jnp.sort(-scaled, axis=-1)
    rank = jnp.arange(vocab_size)
    num_kept = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, vocab_size), vocab_size)
    probs = jax.nn.softmax(jnp.where(rank < num_kept[:, None], descending, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    # A token stays while those before it have not reached top_p; top_p = 1 keeps all, whatever the sum's rounding.
    in_nucleus = (mass_before < rows.top_p[:, None]) | (rows.top_p[:, None] >= 1)
    num_kept = jnp.minimum(num_kept, jnp.sum(in_nucleus, axis=-1))
    last_kept = jnp.take_along_axis(descending, jnp.maximum(num_kept, 1)[:, None] - 1, axis=-1)[:, 0]
    return jnp.maximum(last_kept, descending[:, 0] + jnp.log(rows.min_p))
