"""The jitted phases: prefill, the decode loop, and scoring. The only `jax.jit` and `jax.shard_map` around the forward.

A phase takes the leaves of the parameters as one list, because calling a jitted function over a module costs the host
milliseconds a call, over a list a tenth of one. Steps run in chunks with a trip count that is known when compiling: a
loop whose end is computed makes the host wait for its predicate every step. So the host looks once per chunk whether
all is done.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, no_type_check

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from custom_ops import NO_TOKEN, make_semaphores
from custom_ops.pages import Pages
from custom_ops.prefill_attention import token_rows
from kogpt_jax.kv_cache import PAGE_LEN, KVCache, cache_specs, make_pages, pages_per_row
from kogpt_jax.model import GPTJ, Block, ModelDef
from kogpt_jax.packing import Packed
from kogpt_jax.pipeline import from_last_stage, microbatch, run_ticks, with_microbatch
from kogpt_jax.sampling import RowSampling, sample
from kogpt_jax.sharding import partition_spec

# Any: in the structure of a state they stand where it has arrays.
_ROWS: Any = partition_spec(("batch",))
_ROWS_BY_LEN: Any = partition_spec(("batch", "q_len"))
_ROWS_BY_EMBED: Any = partition_spec(("batch", "embed"))
_CHUNKS: Any = partition_spec((None, "tokens"))
_CHUNKS_BY_VOCAB: Any = partition_spec((None, "tokens", None))
_CHUNKS_OF_ROWS: Any = partition_spec((None, "batch"))
_IN_FLIGHT: Any = partition_spec(("in_flight", "embed"))
_REPLICATED: Any = PartitionSpec()

# No CUDA graphs (XLA's command buffers) around a decode step: XLA makes one of each op's kernels and puts it into the
# step's as a child, so that a kernel cannot start while the one ahead still runs. 1 to 9 % of a step on an H100
# (docs/performance-notes.md).
WITHOUT_CUDA_GRAPHS = {"xla_gpu_graph_min_graph_size": 2**31 - 1}

# Tokens that meet lm_head together when texts are scored: logits take [block, V].
SCORE_BLOCK = 1024


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "tokens", "num_remaining", "ignore_eos", "sampling", "semaphores", "in_flight"],
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
    in_flight: Float[Array, "B D"] | None  # between a pipeline's stages: a microbatch a stage; None for one stage


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tokens", "logprobs", "all_done"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
@no_type_check  # as `DecodeState`
class Emitted:
    """What a phase gives to the host: tokens in order, `NO_TOKEN` where a row had finished."""

    tokens: Int[Array, "B steps"]
    logprobs: Float[Array, "B steps"]
    all_done: Bool[Array, ""]


_Decoding = tuple[DecodeState, tuple[Array, ...]]  # with what it has emitted
_Scratch = tuple[tuple[tuple[Pages, ...], ...], Array]  # pages of keys and of values, and results
_Carry = TypeVar("_Carry")


class LayerInputs(NamedTuple):
    """What a layer's two products multiply, from `layer_inputs`: arrays on the device, or fetched to the host."""

    largest_in: Any  # [D] in f32: magnitude of each channel over the tokens
    largest_out: Any  # [K]
    rows_in: Any  # [S, D]: those of single tokens
    rows_out: Any  # [S, K]


@functools.partial(jax.jit, static_argnames=("batch", "definition", "mesh"))
def no_hidden(batch: int, *, definition: ModelDef, mesh: Mesh) -> Float[Array, "B D"]:
    """What `prefill` takes first for ``last_hidden``, on the devices as it gives it back: or it is compiled twice."""
    zeros = jnp.zeros((batch, definition.config.model_dim), jnp.float32)
    return jax.lax.with_sharding_constraint(zeros, NamedSharding(mesh, _ROWS_BY_EMBED))


@functools.partial(
    jax.jit,
    static_argnames=("definition", "mesh"),
    donate_argnames=("cache",),
    compiler_options=WITHOUT_CUDA_GRAPHS,
)
def prefill(
    leaves: Sequence[Array],
    cache: KVCache,
    last_hidden: Float[Array, "B D"],
    chunks: Packed,
    *,
    definition: ModelDef,
    mesh: Mesh,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Reads prompts, or chunks of them, into the cache.

    Args:
        leaves: parameters, in the order of ``definition.params``.
        cache: what the calls before have read; donated.
        last_hidden: the residual stream of each row's last token, f32, from the calls before.
        chunks: stacked (`packing.stack`), and read one after another. Rows that have no token in them stay as they are.
    """
    num_stages = definition.split.num_stages

    def local(leaves: Sequence[Array], cache: KVCache, last_hidden: Array, chunks: Packed) -> tuple[KVCache, Array]:
        model = definition.merge(leaves)
        num_chunks = chunks.tokens.shape[0]
        lengths = cache.lengths + jnp.cumsum(chunks.num_new, axis=0)  # after each chunk

        def run(number: Any, x: Array, carry: tuple[KVCache, Array]) -> tuple[Array, tuple[KVCache, Array]]:
            cache, last_hidden = carry
            packed = _chunk(chunks, number)
            before = dataclasses.replace(cache, lengths=_chunk(lengths, number) - packed.num_new)
            if num_stages > 1:
                is_chunk = (number >= 0) & (number < num_chunks)
                packed = dataclasses.replace(packed, num_new=jnp.where(is_chunk, packed.num_new, 0))
            if num_stages == 1:
                last, after = model.prefill(x, packed, before, last_only=True)
            else:  # all stages run one program, and those before the last one hand over all tokens
                x, after = model.prefill(x, packed, before)
                last = x[jnp.maximum(packed.begins + packed.num_new - 1, 0)]
            last_hidden = jnp.where(packed.num_new[:, None] > 0, last, last_hidden)
            return x, (dataclasses.replace(after, lengths=cache.lengths), last_hidden)

        cache, last_hidden = _run_chunks(model, chunks, run, None, (cache, last_hidden), definition)
        return dataclasses.replace(cache, lengths=lengths[-1]), from_last_stage(last_hidden, num_stages)

    cache_spec = cache_specs(definition.config, definition.layers_per_stage)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), cache_spec, _ROWS_BY_EMBED, _chunks_specs(chunks)),
        out_specs=(cache_spec, _ROWS_BY_EMBED),
        check_vma=False,
    )(list(leaves), cache, last_hidden, chunks)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"), donate_argnames=("cache",))
def put_row(
    cache: KVCache,
    last_hidden: Float[Array, "B D"],
    own_cache: KVCache,
    own_hidden: Float[Array, "num_shards D"],
    rows: Int[Array, " num_shards"],
    *,
    definition: ModelDef,
    mesh: Mesh,
) -> tuple[KVCache, Float[Array, "B D"]]:
    """Copies a row that `prefill` has read into a cache of its own to its place in a batch.

    Args:
        cache: of the batch; donated.
        last_hidden: of the batch.
        own_cache: of a row a data shard, with no more pages a row than ``cache`` has.
        own_hidden: what `prefill` gave back with it.
        rows: which of its rows each data shard shall put its one into, -1 for none.
    """

    def local(
        cache: KVCache, last_hidden: Array, own_cache: KVCache, own_hidden: Array, rows: Array
    ) -> tuple[KVCache, Array]:
        is_row = jnp.arange(last_hidden.shape[0]) == rows
        num_pages = own_cache.page_table.shape[1]
        row_pages = cache.page_table[jnp.maximum(rows[0], 0), :num_pages]

        def put(pool: Array, own_pool: Array) -> Array:
            page_ids = jnp.where(rows >= 0, row_pages, pool.shape[0] - 1)  # or the scratch page
            return pool.at[page_ids].set(own_pool[own_cache.page_table[0]])

        k, v = jax.tree.map(put, (cache.k, cache.v), (own_cache.k, own_cache.v))
        lengths = jnp.where(is_row, own_cache.lengths, cache.lengths)
        cache = dataclasses.replace(cache, k=k, v=v, lengths=lengths)
        return cache, jnp.where(is_row[:, None], own_hidden, last_hidden)

    cache_spec = cache_specs(definition.config, definition.layers_per_stage)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(cache_spec, _ROWS_BY_EMBED, cache_spec, _ROWS_BY_EMBED, _ROWS),
        out_specs=(cache_spec, _ROWS_BY_EMBED),
        check_vma=False,
    )(cache, last_hidden, own_cache, own_hidden, rows)


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
    """Samples each row's first token, once `prefill` has read the prompts, and fills the pipeline with them. ``cache``
    is donated. A row of ``max_new_tokens`` 0 is padding and emits nothing."""
    num_stages = definition.split.num_stages

    def local(leaves: Sequence[Array], state: DecodeState, last_hidden: Array) -> tuple[DecodeState, Emitted]:
        model = definition.merge(leaves)
        logits, semaphores = model.next_logits(last_hidden, state.semaphores)
        state = dataclasses.replace(state, semaphores=semaphores)
        state, new_tokens, logprobs = _next_token(state, logits, definition)
        emitted = _emitted(new_tokens[:, None], logprobs[:, None], state)
        state = _decode_ticks(model, state, range(num_stages - 1), definition)[0]
        return state, emitted

    state = DecodeState(
        cache,
        jnp.zeros_like(cache.lengths),
        max_new_tokens,
        ignore_eos,
        sampling,
        make_semaphores(),
        _empty_flight(last_hidden.shape[0], definition),
    )
    specs = _state_specs(definition, sampling)
    state, emitted = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), specs, _ROWS_BY_EMBED),
        out_specs=(specs, _EMITTED_SPECS),
        check_vma=False,
    )(list(leaves), state, last_hidden)
    return state, _on_host(emitted)


@functools.partial(
    jax.jit,
    static_argnames=("definition", "mesh", "num_steps"),
    donate_argnames=("state",),
    compiler_options=WITHOUT_CUDA_GRAPHS,
)
def decode_loop(
    leaves: Sequence[Array], state: DecodeState, *, definition: ModelDef, mesh: Mesh, num_steps: int
) -> tuple[DecodeState, Emitted]:
    """``num_steps`` tokens for each row. ``state`` is donated and its cache updated in place."""
    num_stages = definition.split.num_stages

    def local(leaves: Sequence[Array], state: DecodeState) -> tuple[DecodeState, Emitted]:
        model = definition.merge(leaves)
        if state.sampling.is_greedy and model.takes_steps(len(state.tokens)):
            assert num_stages == 1, "`ops.resolve_ops` takes it where one stage has all layers"
            state, tokens, logprobs = _greedy_steps(model, state, num_steps)
            return state, _emitted(tokens, logprobs, state)
        # `start_decode` has brought the first microbatch to the last stage.
        ticks = range(num_stages - 1, num_stages - 1 + num_steps * num_stages)
        state, tokens, logprobs = _decode_ticks(model, state, ticks, definition)
        return state, _emitted(tokens, logprobs, state)

    specs = _state_specs(definition, state.sampling)
    state, emitted = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), specs),
        out_specs=(specs, _EMITTED_SPECS),
        check_vma=False,
    )(list(leaves), state)
    return state, _on_host(emitted)


def _greedy_steps(model: GPTJ, state: DecodeState, num_steps: int) -> tuple[DecodeState, Array, Array]:
    """`_decode_ticks` of greedy rows over one stage, as one call."""
    steps, cache = model.decode_steps(
        state.tokens, state.num_remaining, state.ignore_eos, state.cache, state.semaphores, num_steps
    )
    state = dataclasses.replace(
        state, cache=cache, tokens=steps.tokens, num_remaining=steps.num_remaining, semaphores=steps.semaphores
    )
    return state, steps.new_tokens, steps.logprobs


def _decode_ticks(
    model: GPTJ, state: DecodeState, ticks: range, definition: ModelDef
) -> tuple[DecodeState, Array, Array]:
    """Ticks of the decode schedule, and the tokens [B, steps] that came out with their log-probabilities; fewer ticks
    than there are stages only fill the pipeline."""
    num_stages = definition.split.num_stages
    batch, num_steps = state.tokens.shape[0], len(ticks) // num_stages
    emitted = (jnp.full((batch, num_steps), NO_TOKEN, jnp.int32), jnp.zeros((batch, num_steps), jnp.float32))

    def enter(number: Any, carry: _Decoding) -> Array:
        return model.embed(microbatch(carry[0].tokens, number, num_stages))

    def run(number: Any, x: Array, carry: _Decoding) -> tuple[Array, _Decoding]:
        state, emitted = carry
        part = microbatch(_rows_of(state), number, num_stages)
        is_running = part.num_remaining > 0
        if num_stages > 1:
            is_running &= number >= 0
        cache = dataclasses.replace(part.cache, k=state.cache.k, v=state.cache.v)
        step = model.decode_step_to_logits if num_stages == 1 else model.decode_step
        x, cache, semaphores = step(x, is_running.astype(jnp.int32), cache, state.semaphores)
        cache = dataclasses.replace(state.cache, k=cache.k, v=cache.v)
        return x, (dataclasses.replace(state, cache=cache, semaphores=semaphores), emitted)

    def leave(number: Any, x: Array, carry: _Decoding) -> _Decoding:
        state, emitted = carry
        logits, semaphores = x, state.semaphores  # over one stage, whose step goes up to them
        if num_stages > 1:
            logits, semaphores = model.next_logits(x, semaphores)
        rows = _rows_of(state)
        part = microbatch(rows, number, num_stages)
        # All stages have the token by now: until then its place is the same for all of them.
        lengths = part.cache.lengths + (part.num_remaining > 0)
        part = dataclasses.replace(part, cache=dataclasses.replace(part.cache, lengths=lengths))
        part, *new = _next_token(part, logits, definition)
        rows = with_microbatch(rows, part, number, num_stages)
        cache = dataclasses.replace(rows.cache, k=state.cache.k, v=state.cache.v)
        state = dataclasses.replace(rows, cache=cache, semaphores=semaphores)
        place = (number % num_stages * len(new[0]), number // num_stages)
        tokens, logprobs = (
            jax.lax.dynamic_update_slice(all_rows, of_part[:, None], place)
            for all_rows, of_part in zip(emitted, new, strict=True)
        )
        return state, (tokens, logprobs)

    carry: _Decoding = (dataclasses.replace(state, in_flight=None), emitted)
    in_flight, (state, (tokens, logprobs)) = run_ticks(
        num_stages, ticks, enter, run, leave if num_steps else None, state.in_flight, carry
    )
    return dataclasses.replace(state, in_flight=in_flight), tokens, logprobs


def _rows_of(state: DecodeState) -> DecodeState:
    """Those arrays of a state that have rows."""
    nothing: Any = None
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, k=(), v=()), semaphores=nothing)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def all_logits(leaves: Sequence[Array], chunks: Packed, *, definition: ModelDef, mesh: Mesh) -> Float[Array, "C T V"]:
    """Logits of each packed token, in f32; each row is whole in one chunk."""

    def local(leaves: Sequence[Array], chunks: Packed) -> Array:
        model = definition.merge(leaves)

        def logits(hidden: Array, packed: Packed) -> Array:
            return definition.vocabulary.gather(model.logits(hidden))

        return _read_whole(model, chunks, logits, definition)

    return _over_chunks(local, _CHUNKS_BY_VOCAB, chunks, definition, mesh)(list(leaves), chunks)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"))
def score(leaves: Sequence[Array], chunks: Packed, *, definition: ModelDef, mesh: Mesh) -> Float[Array, "C T"]:
    """The log-probability of each packed token's successor: entry t is that of ``tokens[t + 1]``, and means nothing
    for a row's last token. Each row is whole in one chunk."""

    def local(leaves: Sequence[Array], chunks: Packed) -> Array:
        model = definition.merge(leaves)

        def block_logprobs(block: tuple[Array, Array]) -> Array:
            hidden, targets = block
            return definition.vocabulary.logprobs(model.logits(hidden), targets)

        def logprobs(hidden: Array, packed: Packed) -> Array:
            blocks = (-1, math.gcd(packed.tokens.shape[0], SCORE_BLOCK))
            targets = jnp.roll(packed.tokens, -1).reshape(blocks)
            # A real loop: unrolled, XLA keeps the logits of all blocks alive at once.
            return jax.lax.map(block_logprobs, (hidden.reshape(*blocks, hidden.shape[1]), targets)).reshape(-1)

        return _read_whole(model, chunks, logprobs, definition)

    return _over_chunks(local, _CHUNKS, chunks, definition, mesh)(list(leaves), chunks)


def _read_whole(
    model: GPTJ, chunks: Packed, result: Callable[[Array, Packed], Array], definition: ModelDef
) -> Float[Array, "C T *result"]:
    """What ``result`` makes of the residual stream of each chunk. Its rows begin in it and are not gone on with, so
    that all layers of a stage share the pages of one."""
    config = model.config
    num_chunks, num_tokens = chunks.tokens.shape
    pages = _scratch_pages(num_tokens, chunks.begins.shape[1], definition)

    def run(number: Any, x: Array, carry: _Scratch) -> tuple[Array, _Scratch]:
        # Where there is no chunk, one is read again: nobody looks at the pages or at what comes out.
        (k, v), results = carry
        packed = _chunk(chunks, number)
        x, cache = model.prefill(x, packed, _scratch_cache(k, v, packed))
        return x, ((cache.k, cache.v), results)

    def leave(number: Any, x: Array, carry: _Scratch) -> _Scratch:
        scratch, results = carry
        # A number below 0 writes what chunk 0 will write again.
        new = result(x, _chunk(chunks, number))
        return scratch, jax.lax.dynamic_update_index_in_dim(results, new, jnp.maximum(number, 0), 0)

    shape = jax.eval_shape(result, jax.ShapeDtypeStruct((num_tokens, config.model_dim), jnp.float32), _chunk(chunks, 0))
    carry: _Scratch = (((pages,), (pages,)), jnp.zeros((num_chunks, *shape.shape), shape.dtype))
    return _run_chunks(model, chunks, run, leave, carry, definition)[1]


def _run_chunks(model: GPTJ, chunks: Packed, run: Any, leave: Any, carry: _Carry, definition: ModelDef) -> _Carry:
    """All chunks through all stages (`run_ticks`), with nothing in flight before and after."""
    num_stages, (num_chunks, num_tokens) = definition.split.num_stages, chunks.tokens.shape
    _, carry = run_ticks(
        num_stages,
        range(num_chunks + num_stages - 1),
        lambda number, _: model.embed(_chunk(chunks, number).tokens),
        run,
        leave,
        _empty_flight(num_tokens, definition),
        carry,
    )
    return carry


def _scratch_pages(num_tokens: int, num_rows: int, definition: ModelDef) -> Pages:
    """Pages of a layer for rows that begin together."""
    # Each row has at most one page that is not full; the last one is scratch.
    num_pages = num_tokens // PAGE_LEN + num_rows + 1
    return make_pages(definition.config, num_pages, definition.config.num_heads // definition.split.num_shards)


def _scratch_cache(k: tuple[Pages, ...], v: tuple[Pages, ...], packed: Packed) -> KVCache:
    """An empty cache over these pages, those of the rows one after another."""
    row_pages = -(-packed.num_new // PAGE_LEN)
    first_pages = jnp.cumsum(row_pages) - row_pages
    page_table = first_pages[:, None] + jnp.arange(pages_per_row(packed.max_len), dtype=jnp.int32)
    return KVCache(k=k, v=v, page_table=page_table, lengths=jnp.zeros_like(packed.num_new))


def _over_chunks(
    local: Callable[..., Array], out_specs: Any, chunks: Packed, definition: ModelDef, mesh: Mesh
) -> Callable[..., Array]:
    in_specs = (definition.leaf_specs(), _chunks_specs(chunks))
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _chunk(chunks: Any, number: Any) -> Any:
    """One of stacked chunks; of a number that is none's, the nearest one."""
    return jax.tree.map(lambda array: array[jnp.clip(number, 0, len(array) - 1)], chunks)


def _empty_flight(rows: int, definition: ModelDef) -> Float[Array, "rows D"] | None:
    """What is between the stages of a pipeline before the first tick."""
    if definition.split.num_stages == 1:
        return None
    return jnp.zeros((rows, definition.config.model_dim), jnp.float32)


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

        model = definition.merge(leaves)
        pages = _scratch_pages(packed.tokens.shape[0], packed.begins.shape[0], definition)
        model.prefill(model.embed(packed.tokens), packed, _scratch_cache((pages,), (pages,), packed), watch)
        return found

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), _REPLICATED, _REPLICATED),
        out_specs=_REPLICATED,
        check_vma=False,
    )(list(leaves), packed, picked)


@functools.partial(jax.jit, static_argnames=("definition", "mesh"), compiler_options=WITHOUT_CUDA_GRAPHS)
def stepped_logits(
    leaves: Sequence[Array], cache: KVCache, tokens: Int[Array, "B T"], *, definition: ModelDef, mesh: Mesh
) -> Float[Array, "B T V"]:
    """Logits of every position in f32, each token read by a decode step: `all_logits` through the cache. On a mesh
    without stages.

    Args:
        leaves: parameters, in the order of ``definition.params``.
        cache: empty, with room for T tokens.
        tokens: sequences, left-aligned.
    """

    def local(leaves: Sequence[Array], cache: KVCache, tokens: Array) -> Array:
        model = definition.merge(leaves)
        num_new = jnp.ones(tokens.shape[0], jnp.int32)

        def step(carry: tuple[KVCache, Array], tokens: Array) -> tuple[tuple[KVCache, Array], Array]:
            logits, cache, semaphores = model.decode_step_to_logits(model.embed(tokens), num_new, *carry)
            return (cache, semaphores), logits

        _, logits = jax.lax.scan(step, (cache, make_semaphores()), tokens.T)
        return definition.vocabulary.gather(logits.swapaxes(0, 1))

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(definition.leaf_specs(), cache_specs(definition.config, definition.layers_per_stage), _ROWS_BY_LEN),
        out_specs=_ROWS_BY_LEN,
        check_vma=False,
    )(list(leaves), cache, tokens)


def _next_token(state: DecodeState, logits: Array, definition: ModelDef) -> tuple[DecodeState, Array, Array]:
    """Samples for the running rows and counts them down; the state's cache already holds the token before."""
    is_running = state.num_remaining > 0
    tokens, logprobs = sample(logits, state.sampling, state.cache.lengths, definition.vocabulary)
    # Number by number: an array of none, as a constant inside `jax.shard_map`, crashes jaxlib 0.11's compiler.
    is_one = [tokens == token_id for token_id in definition.config.eos_token_ids]
    is_eos = functools.reduce(jnp.logical_or, is_one, jnp.zeros(tokens.shape, bool)) & ~state.ignore_eos
    num_remaining = jnp.where(is_running & ~is_eos, state.num_remaining - 1, 0)
    state = dataclasses.replace(state, tokens=jnp.where(is_running, tokens, state.tokens), num_remaining=num_remaining)
    return state, jnp.where(is_running, tokens, NO_TOKEN), jnp.where(is_running, logprobs, 0.0)


def _emitted(tokens: Array, logprobs: Array, state: DecodeState) -> Emitted:
    num_running = jax.lax.psum(jnp.sum(state.num_remaining > 0), "data")
    return Emitted(tokens, logprobs, num_running == 0)


def _on_host(emitted: Emitted) -> Emitted:
    """Copied into the host's memory by the phase itself: a copy by the host begins once it has noticed that the phase
    has ended, half a millisecond later."""
    return jax.device_put(emitted, jax.memory.Space.Host)


def _chunks_specs(chunks: Packed) -> Packed:
    return dataclasses.replace(chunks, tokens=_CHUNKS, begins=_CHUNKS_OF_ROWS, num_new=_CHUNKS_OF_ROWS)


def _state_specs(definition: ModelDef, sampling: RowSampling) -> DecodeState:
    return DecodeState(
        cache=cache_specs(definition.config, definition.layers_per_stage),
        tokens=_ROWS,
        num_remaining=_ROWS,
        ignore_eos=_ROWS,
        sampling=jax.tree.map(lambda _: _ROWS, sampling),
        semaphores=_REPLICATED,  # each device has its own
        in_flight=None if definition.split.num_stages == 1 else _IN_FLIGHT,
    )


_EMITTED_SPECS = Emitted(tokens=_ROWS_BY_LEN, logprobs=_ROWS_BY_LEN, all_done=_REPLICATED)
