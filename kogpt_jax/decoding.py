"""The jitted phases: prefill, the decode loop, and scoring. The only `jax.jit` and `jax.shard_map` around the forward.

A phase takes the leaves of the parameters as one list, because calling a jitted function over a module costs the host
milliseconds a call, over a list a tenth of one. Steps run in chunks with a trip count that is known when compiling: a
loop whose end is computed makes the host wait for its predicate every step. So the host looks once per chunk whether
all is done.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from custom_ops import make_semaphores
from custom_ops.prefill_attention import token_rows
from kogpt_jax.kv_cache import PAGE_LEN, KVCache, cache_specs, pages_per_row
from kogpt_jax.model import GPTJ, Block, ModelDef, Watch
from kogpt_jax.packing import Packed
from kogpt_jax.sampling import RowSampling, sample
from kogpt_jax.sharding import partition_spec

NO_TOKEN = -1  # stands where a finished row emits nothing

# Any: in the structure of a state they stand where it has arrays.
_ROWS: Any = partition_spec(("batch",))
_ROWS_BY_LEN: Any = partition_spec(("batch", "q_len"))
_ROWS_BY_EMBED: Any = partition_spec(("batch", "embed"))
_TOKENS: Any = partition_spec(("tokens",))
_TOKENS_BY_VOCAB: Any = partition_spec(("tokens", None))
_REPLICATED: Any = PartitionSpec()

# No CUDA graphs (XLA's command buffers) around a decode step: XLA makes one of each op's kernels and puts it into the
# step's as a child, so that a kernel cannot start while the one ahead still runs. 1 to 9 % of a step on an H100
# (docs/performance-notes.md).
WITHOUT_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": 2**31 - 1}

# Tokens that meet lm_head together when texts are scored: logits take [block, V].
SCORE_BLOCK = 1024


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "tokens", "num_remaining", "ignore_eos", "sampling", "semaphores"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
@no_type_check  # JAX and `_state_specs` put other things than arrays into the same structure
class DecodeState:
    """All that a batch carries from step to step. Donated: the caller's copy is gone after a call."""

    cache: KVCache
    tokens: Int[Array, " B"]  # the last token of each row, not yet in the cache
    num_remaining: Int[Array, " B"]  # tokens the row may still get; 0 once it has finished
    ignore_eos: Bool[Array, " B"]
    sampling: RowSampling
    semaphores: Int[Array, " num_semaphores"]  # what the kernels of a step count with: zeros between them


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "logprobs", "all_done"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
@no_type_check  # as `DecodeState`
class Emitted:
    """What a phase gives to the host: tokens in order, `NO_TOKEN` where a row had finished."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    all_done: Bool[Array, ""]


class LayerInputs(NamedTuple):
    """What a layer's two products multiply, from `layer_inputs`: arrays on the device, or fetched to the host."""

    largest_in: Any  # [D] in f32: magnitude of each channel over the tokens
    largest_out: Any  # [K]
    rows_in: Any  # [S, D]: those of single tokens
    rows_out: Any  # [S, K]


@functools.partial(jax.jit, static_argnames=("definition", "mesh"), donate_argnames=("cache", "last_hidden"))
def prefill(
    leaves: Sequence[Array],
    cache: KVCache,
    last_hidden: Float[Array, "B D"],
    packed: Packed,
    *,
    definition: ModelDef,
    mesh: Mesh,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Reads prompts, or a chunk of them, into the cache.

    Args:
        leaves: parameters, in the order of ``definition.params``.
        cache: what the chunks before have read; donated.
        last_hidden: the residual stream of each row's last token, f32, from the chunks before; donated.
        packed: the chunk. Rows that have no token in it stay as they are.
    """

    def local(leaves: Sequence[Array], cache: KVCache, last_hidden: Array, packed: Packed) -> tuple[KVCache, Array]:
        hidden, cache = definition.merge(leaves).prefill(packed, cache)
        last = hidden[jnp.maximum(packed.begins + packed.num_new - 1, 0)]
        return cache, jnp.where(packed.num_new[:, None] > 0, last, last_hidden)

    cache_spec = cache_specs(definition.config.num_layers)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), cache_spec, _ROWS_BY_EMBED, _packed_specs(packed)),
        out_specs=(cache_spec, _ROWS_BY_EMBED),
        check_vma=False,
    )(list(leaves), cache, last_hidden, packed)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"), donate_argnames=("cache",))
def start_decode(
    leaves: Sequence[Array],
    cache: KVCache,
    last_hidden: Float[Array, "B D"],
    max_new_tokens: Int[Array, " B"],
    ignore_eos: Bool[Array, " B"],
    sampling: RowSampling,
    *,
    definition: ModelDef,
    mesh: Mesh,
) -> tuple[DecodeState, Emitted]:
    """Samples each row's first token, once `prefill` has read the prompts. ``cache`` is donated. A row of
    ``max_new_tokens`` 0 is padding and emits nothing."""

    def local(leaves: Sequence[Array], state: DecodeState, last_hidden: Array) -> tuple[DecodeState, Emitted]:
        model = definition.merge(leaves)
        state, new_tokens, logprobs = _next_token(state, model.logits(last_hidden), definition)
        return state, _emitted(new_tokens[:, None], logprobs[:, None], state)

    state = DecodeState(cache, jnp.zeros_like(cache.lengths), max_new_tokens, ignore_eos, sampling, make_semaphores())
    specs = _state_specs(definition, sampling)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), specs, _ROWS_BY_EMBED),
        out_specs=(specs, _EMITTED_SPECS),
        check_vma=False,
    )(list(leaves), state, last_hidden)


@functools.partial(
    jax.jit,
    static_argnames=("definition", "mesh", "num_steps"),
    donate_argnames=("state",),
    compiler_options=WITHOUT_CUDA_GRAPHS,
)
def decode_loop(
    leaves: Sequence[Array], state: DecodeState, *, definition: ModelDef, mesh: Mesh, num_steps: int
) -> tuple[DecodeState, Emitted]:
    """``num_steps`` decode steps. ``state`` is donated and its cache updated in place."""

    def local(leaves: Sequence[Array], state: DecodeState) -> tuple[DecodeState, Emitted]:
        model = definition.merge(leaves)
        batch = state.tokens.shape[0]

        def step(i: Array, carry: tuple[DecodeState, Array, Array]) -> tuple[DecodeState, Array, Array]:
            state, tokens, logprobs = carry
            num_new = (state.num_remaining > 0).astype(jnp.int32)
            logits, cache, semaphores = model.decode_step(state.tokens, num_new, state.cache, state.semaphores)
            state = dataclasses.replace(state, cache=cache, semaphores=semaphores)
            state, new_tokens, new_logprobs = _next_token(state, logits, definition)
            return state, tokens.at[:, i].set(new_tokens), logprobs.at[:, i].set(new_logprobs)

        no_tokens = jnp.full((batch, num_steps), NO_TOKEN, jnp.int32)
        no_logprobs = jnp.zeros((batch, num_steps), jnp.float32)
        state, tokens, logprobs = jax.lax.fori_loop(0, num_steps, step, (state, no_tokens, no_logprobs))
        return state, _emitted(tokens, logprobs, state)

    specs = _state_specs(definition, state.sampling)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), specs),
        out_specs=(specs, _EMITTED_SPECS),
        check_vma=False,
    )(list(leaves), state)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def all_logits(leaves: Sequence[Array], packed: Packed, *, definition: ModelDef, mesh: Mesh) -> Float[Array, "T V"]:
    """Logits of each packed token, in f32; rows begin with their first token here."""

    def local(leaves: Sequence[Array], packed: Packed) -> Array:
        model = definition.merge(leaves)
        return definition.vocabulary.gather(model.logits(_read_whole(model, packed)))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), _packed_specs(packed)),
        out_specs=_TOKENS_BY_VOCAB,
        check_vma=False,
    )(list(leaves), packed)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def score(leaves: Sequence[Array], packed: Packed, *, definition: ModelDef, mesh: Mesh) -> Float[Array, " T"]:
    """The log-probability of each packed token's successor: entry t is that of ``tokens[t + 1]``, and means nothing
    for a row's last token. Rows begin with their first token here."""

    def local(leaves: Sequence[Array], packed: Packed) -> Array:
        model = definition.merge(leaves)
        hidden = _read_whole(model, packed)

        def logprobs(block: tuple[Array, Array]) -> Array:
            hidden, targets = block
            return definition.vocabulary.logprobs(model.logits(hidden), targets)

        blocks = (-1, math.gcd(packed.tokens.shape[0], SCORE_BLOCK))
        targets = jnp.roll(packed.tokens, -1).reshape(blocks)
        # A real loop: unrolled, XLA keeps the logits of all blocks alive at once.
        return jax.lax.map(logprobs, (hidden.reshape(*blocks, hidden.shape[1]), targets)).reshape(-1)

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), _packed_specs(packed)),
        out_specs=_TOKENS,
        check_vma=False,
    )(list(leaves), packed)


def _read_whole(model: GPTJ, packed: Packed, watch: Watch | None = None) -> Float[Array, "T D"]:
    """The residual stream of rows that are read once and not gone on with, over pages that the layers share."""
    config = model.config
    num_heads = config.num_heads // jax.lax.axis_size("tensor")
    # Each row has at most one page that is not full; the last one is scratch.
    num_pages = packed.tokens.shape[0] // PAGE_LEN + packed.begins.shape[0] + 1
    pages = jnp.zeros((num_pages, num_heads, PAGE_LEN, config.head_dim), config.jax_dtype)
    row_pages = -(-packed.num_new // PAGE_LEN)
    first_pages = jnp.cumsum(row_pages) - row_pages
    page_table = first_pages[:, None] + jnp.arange(pages_per_row(packed.max_len), dtype=jnp.int32)
    cache = KVCache(k=(pages,), v=(pages,), page_table=page_table, lengths=jnp.zeros_like(packed.num_new))
    return model.prefill(packed, cache, watch)[0]


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def layer_inputs(
    leaves: Sequence[Array],
    packed: Packed,
    picked: Int[Array, " S"],
    *,
    definition: ModelDef,
    mesh: Mesh,
) -> list[LayerInputs]:
    """What the products of each layer multiply, on a mesh of one device: largest magnitudes, and some tokens' rows.

    Args:
        leaves: parameters, in the order of ``definition.params``.
        packed: rows that begin with their first token here.
        picked: of the packed tokens those whose rows are given back.
    """

    def local(leaves: Sequence[Array], packed: Packed, picked: Array) -> list[LayerInputs]:
        found: list[LayerInputs] = []
        _, _, is_read = token_rows(packed.begins, packed.num_new, packed.tokens.shape[0])

        def watch(block: Block, x: Array, act: Array) -> None:
            rows = block.product_inputs(x, act)
            largest = [jnp.max(jnp.abs(x), axis=0, where=is_read[:, None], initial=0) for x in rows]
            found.append(LayerInputs(*(x.astype(jnp.float32) for x in largest), *(x[picked] for x in rows)))

        _read_whole(definition.merge(leaves), packed, watch)
        return found

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), _packed_specs(packed), _REPLICATED),
        out_specs=_REPLICATED,
        check_vma=False,
    )(list(leaves), packed, picked)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"), compiler_options=WITHOUT_CUDA_GRAPHS)
def stepped_logits(
    leaves: Sequence[Array], cache: KVCache, tokens: Int[Array, "B T"], *, definition: ModelDef, mesh: Mesh
) -> Float[Array, "B T V"]:
    """Logits of every position in f32, each token read by a decode step: `all_logits` through the cache.

    Args:
        leaves: parameters, in the order of ``definition.params``.
        cache: empty, with room for T tokens.
        tokens: sequences, left-aligned.
    """

    def local(leaves: Sequence[Array], cache: KVCache, tokens: Array) -> Array:
        model = definition.merge(leaves)
        num_new = jnp.ones(tokens.shape[0], jnp.int32)

        def step(carry: tuple[KVCache, Array], tokens: Array) -> tuple[tuple[KVCache, Array], Array]:
            logits, cache, semaphores = model.decode_step(tokens, num_new, *carry)
            return (cache, semaphores), logits

        _, logits = jax.lax.scan(step, (cache, make_semaphores()), tokens.T)
        return definition.vocabulary.gather(logits.swapaxes(0, 1))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), cache_specs(definition.config.num_layers), _ROWS_BY_LEN),
        out_specs=_ROWS_BY_LEN,
        check_vma=False,
    )(list(leaves), cache, tokens)


def _next_token(state: DecodeState, logits: Array, definition: ModelDef) -> tuple[DecodeState, Array, Array]:
    """Samples for the running rows and counts them down; the state's cache already holds the token before."""
    is_running = state.num_remaining > 0
    tokens, logprobs = sample(logits, state.sampling, state.cache.lengths, definition.vocabulary)
    eos_token_ids = jnp.array(definition.config.eos_token_ids, jnp.int32)
    is_eos = jnp.any(tokens[:, None] == eos_token_ids, axis=-1) & ~state.ignore_eos
    num_remaining = jnp.where(is_running & ~is_eos, state.num_remaining - 1, 0)
    state = dataclasses.replace(state, tokens=jnp.where(is_running, tokens, state.tokens), num_remaining=num_remaining)
    return state, jnp.where(is_running, tokens, NO_TOKEN), jnp.where(is_running, logprobs, 0.0)


def _emitted(tokens: Array, logprobs: Array, state: DecodeState) -> Emitted:
    num_running = jax.lax.psum(jnp.sum(state.num_remaining > 0), "data")
    return Emitted(tokens, logprobs, num_running == 0)


def _packed_specs(packed: Packed) -> Packed:
    return dataclasses.replace(packed, tokens=_TOKENS, begins=_ROWS, num_new=_ROWS)


def _state_specs(definition: ModelDef, sampling: RowSampling) -> DecodeState:
    return DecodeState(
        cache=cache_specs(definition.layers_per_stage),
        tokens=_ROWS,
        num_remaining=_ROWS,
        ignore_eos=_ROWS,
        sampling=jax.tree.map(lambda _: _ROWS, sampling),
        semaphores=_REPLICATED,  # each device has its own
    )


_EMITTED_SPECS = Emitted(tokens=_ROWS_BY_LEN, logprobs=_ROWS_BY_LEN, all_done=_REPLICATED)
